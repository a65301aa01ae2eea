"""`openmoe generate`: what a run has learned to say. A prompt is written for the model as its training wrote it."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from openmoe.model.sample import Sampling
    from openmoe.pipelines.tokenizer import Tokenizer
    from openmoe.platform.run.lineage import Acceptance
    from openmoe.platform.run.run_dir import RunDir
    from openmoe.platform.run_file.spec import RunSpec

Format = Literal["text", "ul2-nlu", "ul2-nlg", "ul2-s2s", "chat"]

# The chat models were tuned on this form as plain text, so they often end an answer with the text `</s>` and not
# with EOS (OpenMoE's script/inference_on_multi_devices.py).
_CHAT_END = " ?</s>"
# At the end of an unfinished text: bytes of a character that is not complete, or the beginning of `</s>`.
_MAY_CHANGE = re.compile("(\N{REPLACEMENT CHARACTER}+| ?(<(/s?)?)?)\\Z")


def generate(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, local or gs://.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Continued together; from standard input, one a line, if not given."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens drawn for each prompt at most.")] = 64,
    temperature: Annotated[float, typer.Option(metavar="T", help="Divides the logits; 0 is --greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Draw from the K likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw from the fewest likeliest tokens of probability P together.")
    ] = 1.0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest token, whatever the others say.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="S", min=0, max=2**31 - 1, help="Of the draws.")] = 0,
    style: Annotated[
        Format,
        typer.Option(
            "--format",
            help="text: to be continued. ul2-...: mode, prompt, EOS, as UL2 trains; <extra_id_0> stands for what is "
            "missing, behind the prompt of nlu and nlg if nowhere in it. chat: a question.",
        ),
    ] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only, when all is done.")] = False,
) -> None:
    """Continue prompts with a run's newest checkpoint, here."""
    from openmoe.model import sample
    from openmoe.platform.run.run_dir import RunDir, RunDirError
    from openmoe.platform.train import init_source

    sampling = _sampling(0.0 if greedy else temperature, top_k, top_p)
    run = RunDir(run_dir)
    spec, accepted = run.spec(), run.newest_accepted()
    if accepted is None:
        raise RunDirError(f"{run.path}: the run has no accepted checkpoint yet; train it until its first one")
    model = init_source.tokenizer_of(run, "put that one back: its ids mean other text")
    num_sentinels = spec.data.num_sentinels
    answers = [_asked(text, style, model, num_sentinels) for text in prompts or _lines(sys.stdin)]
    _check(answers, spec, max_tokens)
    params, mesh = _restored(run, spec, accepted)
    steps = sample.stream(
        params,
        spec.model,
        [answer.prompt_ids for answer in answers],
        max_tokens,
        sampling=sampling,
        eos_id=model.vocabulary(num_sentinels).eos_id,
        seed=seed,
        mesh=mesh,
    )

    def decode(ids: list[int]) -> str:
        return model.decode(ids, num_sentinels)

    listen(steps, answers, decode, (lambda text: None) if as_json else _write)
    if as_json:
        print(json.dumps([{key: vars(answer)[key] for key in _JSON_KEYS} for answer in answers], indent=2))


_JSON_KEYS = ("prompt", "text", "ids", "ended")


@dataclass
class Answer:
    """What a prompt is answered with so far.

    Attributes:
      prompt: as the user wrote it.
      prompt_ids: as the model reads it.
      said_before: ids that the answer goes on from and that are shown before it; none if it is a text of its own.
      end: pattern of a text that ends it, besides EOS; none if None.
      ids: drawn so far.
      text: of them, without `end`.
      ended: what ended it: the model, or the number of tokens it may have; "" while it goes on.
    """

    prompt: str
    prompt_ids: list[int]
    said_before: list[int] = field(default_factory=list)
    end: str | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: Literal["", "model", "max-tokens"] = ""


def _asked(text: str, style: Format, model: "Tokenizer", num_sentinels: int) -> Answer:
    """Writes a prompt as the format wants it."""
    from openmoe.pipelines import chat

    if style in ("text", "chat"):
        ids = model.encode([text if style == "text" else chat.prompt(text)])[0].tolist()
        return Answer(text, ids, said_before=ids) if style == "text" else Answer(text, ids, end=_CHAT_END)
    vocabulary = model.vocabulary(num_sentinels)
    mode = style.removeprefix("ul2-").upper()
    body = _with_sentinels(text, model, num_sentinels)
    if mode != "S2S" and not any(token >= model.text_vocab_size for token in body):
        body.append(vocabulary.first_sentinel)
    prompt_ids = [*vocabulary.prompts[mode], *body, vocabulary.eos_id]
    return Answer(text, prompt_ids, said_before=body if mode == "S2S" else [])


def _with_sentinels(text: str, model: "Tokenizer", num_sentinels: int) -> list[int]:
    """Returns the ids of a text in which `<extra_id_k>` is sentinel k; a space beside one is that of the next word."""
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    first_sentinel = model.vocabulary(num_sentinels).first_sentinel
    ids: list[int] = []
    for i, part in enumerate(re.split(r" ?<extra_id_(\d+)> ?", text)):
        if i % 2 == 0:
            ids += model.encode([part])[0].tolist()
        elif int(part) < num_sentinels:
            ids.append(first_sentinel - int(part))
        else:
            raise SpecError(
                [Problem("", f"<extra_id_{part}>: this model has {num_sentinels} sentinels, from 0 on")], "PROMPT"
            )
    return ids


def listen(
    steps: "Iterable[np.ndarray]",
    answers: Sequence[Answer],
    decode: Callable[[list[int]], str],
    write: Callable[[str], Any],
) -> None:
    """Takes the answers down and writes them one after the other, the first that is not written yet as it comes.

    Args:
      steps: int32[answers], the next token of each, 0 from its end on (`sample.stream`).
      answers: filled by this.
      decode: from ids to text.
      write: prints a text as it is.
    """
    turn, written = 0, 0
    for tokens in steps:
        for answer, token in zip(answers, tokens, strict=True):
            if not answer.ended:
                _take(answer, int(token), decode)
        turn, written = _write_on(answers, turn, written, decode, write)
        if all(answer.ended for answer in answers):
            return
    for answer in answers:
        answer.ended = answer.ended or "max-tokens"
    _write_on(answers, turn, written, decode, write)


def _take(answer: Answer, token: int, decode: Callable[[list[int]], str]) -> None:
    if token == 0:
        answer.ended = "model"
        return
    answer.ids.append(token)
    # Together with what was said before: alone, a text would lose the space that it begins with.
    answer.text = decode([*answer.said_before, *answer.ids])[len(decode(answer.said_before)) :]
    if answer.end and (end := re.search(answer.end, answer.text)):
        answer.text, answer.ended = answer.text[: end.start()], "model"


def _write_on(
    answers: Sequence[Answer],
    turn: int,
    written: int,
    decode: Callable[[list[int]], str],
    write: Callable[[str], Any],
) -> tuple[int, int]:
    """Writes what is new of answer `turn`, of which `written` characters are out, and of those behind it."""
    while turn < len(answers):
        answer = answers[turn]
        text = decode(answer.said_before) + (answer.text if answer.ended else _MAY_CHANGE.sub("", answer.text))
        write(text[written:])
        written = max(written, len(text))
        if not answer.ended:
            break
        write("\n")
        turn, written = turn + 1, 0
    return turn, written


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _sampling(temperature: float, top_k: int, top_p: float) -> "Sampling":
    from openmoe.model.sample import Sampling
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    try:
        return Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    except ValueError as error:
        raise SpecError([Problem("", f"--{error}".replace("_", "-", 1))]) from error


def _lines(file: Iterable[str]) -> list[str]:
    """Returns the prompts of standard input, a line each; empty lines are none."""
    return [line.rstrip("\n") for line in file if line.strip()]


def _check(answers: Sequence[Answer], spec: "RunSpec", max_tokens: int) -> None:
    """Refuses what does not fit into a row: the model has learned nothing about positions behind its end."""
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    if not answers:
        raise SpecError(
            [Problem("", "none given; write one behind RUN_DIR, or one a line to standard input")], "PROMPT"
        )
    room = spec.data.seq_len - 1 - max_tokens  # the first position is BOS
    problems = [
        Problem(
            f"prompt {i}",
            f"{len(answer.prompt_ids)} tokens, and --max-tokens {max_tokens} leaves room for {max(room, 0)} in rows of "
            f"{spec.data.seq_len}, as the run was trained on; shorten it, or ask for fewer",
        )
        for i, answer in enumerate(answers, 1)
        if len(answer.prompt_ids) > room
    ]
    if problems:
        raise SpecError(problems)


def _restored(run: "RunDir", spec: "RunSpec", accepted: "Acceptance") -> "tuple[Any, Mesh]":
    """Returns the parameters of a checkpoint, on all devices of this machine, and their mesh."""
    import math

    import jax

    from openmoe.model import sharding, step
    from openmoe.platform.run.run_dir import RunDirError
    from openmoe.platform.train import restore

    # gcd, since an expert axis must divide both: the experts and the devices. A dense model has 0 of them.
    expert = math.gcd(spec.model.num_experts, jax.device_count())
    mesh = sharding.make_mesh(data=jax.device_count() // expert, expert=expert)
    try:
        state, _ = restore.restored(run, accepted, step.state_shapes(spec.model, spec.optimizer, mesh))
    except restore.DamagedCheckpoint as error:
        raise RunDirError(f"{run.path}: {error}; train on, and it is passed over") from error
    return state.params, mesh
