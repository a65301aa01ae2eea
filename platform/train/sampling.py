"""A few continuations from the final state, so that a finished run can be read and not only measured."""

from __future__ import annotations

from jax.sharding import Mesh

from openmoe.model import sample, step
from openmoe.pipelines import chat, tokenizer
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train.recorder import Recorder

PROMPTS = (
    "import os\nimport sys\n\ndef main(argv):\n    for name in",
    "class Handler:\n    def __init__(self, parent):\n        self",
    "Return the value of the option as a string, or raise an error if",
    "This module implements an interface to the system calls which are",
)
SAMPLING = sample.Sampling(temperature=0.7)


def record_samples(spec: RunSpec, mesh: Mesh, state: step.TrainState, recorder: Recorder) -> None:
    """Samples `train.sample_tokens` tokens for each prompt and journals the texts; all processes must call it."""
    if spec.train.sample_tokens == 0:
        return
    with recorder.charged("sample"):
        samples = draw(spec, mesh, state, spec.train.sample_tokens)
    recorder.event("sampled", step=int(state.step), samples=samples)


def draw(spec: RunSpec, mesh: Mesh, state: step.TrainState, num_tokens: int) -> list[list[str]]:
    """Returns (prompt, continuation) of each prompt; all processes must call it.

    A prompt takes the form in which the run's last rows had it: plain text after next-token prediction, a question
    after conversations, else UL2's prefix form, which is mode prompt "[S2S] ", text, EOS, then the continuation.
    """
    model = tokenizer.load(spec.data.tokenizer)
    vocabulary = model.vocabulary(spec.data.num_sentinels)
    objective = spec.data.objective_at(int(state.step) * spec.train.batch_rows * spec.data.seq_len)
    asked = [chat.prompt(text) if objective == "chat" else text for text in PROMPTS]
    prompts = [ids.tolist() for ids in model.encode(asked)]
    if objective not in ("next_token", "chat"):
        prompts = [[*vocabulary.prompts["S2S"], *ids, vocabulary.eos_id] for ids in prompts]
    drawn = sample.stream(
        state.params,
        spec.model,
        prompts,
        num_tokens,
        sampling=SAMPLING,
        eos_id=vocabulary.eos_id,
        seed=spec.seed,
        mesh=mesh,
    )
    continuations = [model.decode(ids, spec.data.num_sentinels) for ids in sample.by_prompt(drawn)]
    return [list(pair) for pair in zip(PROMPTS, continuations, strict=True)]
