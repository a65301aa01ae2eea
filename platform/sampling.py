"""A few continuations from the final state, so that a finished run can be read and not only measured."""

from __future__ import annotations

from jax.sharding import Mesh

from openmoe.model import sample, step
from openmoe.pipelines import tokenizer
from openmoe.platform.recorder import Recorder
from openmoe.platform.spec import RunSpec

PROMPTS = (
    "import os\nimport sys\n\ndef main(argv):\n    for name in",
    "class Handler:\n    def __init__(self, parent):\n        self",
    "Return the value of the option as a string, or raise an error if",
    "This module implements an interface to the system calls which are",
)
SAMPLING = sample.Sampling(temperature=0.7)


def record_samples(spec: RunSpec, mesh: Mesh, state: step.TrainState, recorder: Recorder) -> None:
    """Samples `train.sample_tokens` tokens for each prompt and journals the texts; all processes must call it.

    A prompt takes UL2's prefix form, as trained: mode prompt "[S2S] ", text, EOS, then the continuation.
    """
    if spec.train.sample_tokens == 0:
        return
    model = tokenizer.load(spec.data.tokenizer)
    vocabulary = model.vocabulary(spec.data.num_sentinels)
    drawn = sample.stream(
        state.params,
        spec.model,
        [[*vocabulary.prompts["S2S"], *ids, vocabulary.eos_id] for ids in model.encode(list(PROMPTS))],
        spec.train.sample_tokens,
        sampling=SAMPLING,
        eos_id=vocabulary.eos_id,
        seed=spec.seed,
        mesh=mesh,
    )
    continuations = [model.decode(ids, spec.data.num_sentinels) for ids in sample.by_prompt(drawn)]
    recorder.event("sampled", step=int(state.step), samples=[list(p) for p in zip(PROMPTS, continuations, strict=True)])
