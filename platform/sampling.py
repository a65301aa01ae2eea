"""A few continuations from the final state, so that a finished run can be read and not only measured."""

from __future__ import annotations

import numpy as np

from openmoe.model import sample, sharding, step
from openmoe.pipelines import tokenizer
from openmoe.platform.recorder import Recorder
from openmoe.platform.spec import RunSpec

PROMPTS = (
    "import os\nimport sys\n\ndef main(argv):\n    for name in",
    "class Handler:\n    def __init__(self, parent):\n        self",
    "Return the value of the option as a string, or raise an error if",
    "This module implements an interface to the system calls which are",
)
PROMPT_TOKENS = 10  # of each text: prompts of one length are sampled together
TEMPERATURE = 0.7


def record_samples(spec: RunSpec, state: step.TrainState, recorder: Recorder) -> None:
    """Samples `train.sample_tokens` tokens for each prompt and journals the texts; all processes must call it.

    A prompt takes UL2's prefix form, as trained: mode prompt "[S2S] ", text, EOS, then the continuation.
    """
    if spec.train.sample_tokens == 0:
        return
    model = tokenizer.load(spec.data.tokenizer)
    vocabulary = model.vocabulary(spec.data.num_sentinels)
    texts = [ids[:PROMPT_TOKENS].tolist() for ids in model.encode(list(PROMPTS))]
    prompts = np.asarray([[*vocabulary.prompts["S2S"], *ids, vocabulary.eos_id] for ids in texts], np.int32)
    tokens = sample.sample(
        state.params,
        spec.model,
        prompts,
        spec.train.sample_tokens,
        temperature=TEMPERATURE,
        seed=spec.seed,
        mesh=sharding.make_mesh(data=spec.mesh.data, expert=spec.mesh.expert),
    )
    continuations = [_until(row.tolist(), vocabulary.eos_id) for row in tokens[:, prompts.shape[1] :]]
    pairs = [
        [model.decode(ids), model.decode(continuation, spec.data.num_sentinels)]
        for ids, continuation in zip(texts, continuations, strict=True)
    ]
    recorder.event("sampled", step=int(state.step), samples=pairs)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
