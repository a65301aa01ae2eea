"""The optimizer's section as it may be written: without a name, and with lengths in tokens.

Tokens become steps here, where a run file is read, because here alone it is known how many tokens a step has: so the
model and the hash of a run know steps only, and a length is the same however it was written.
"""

from __future__ import annotations

from typing import Any, get_args

from openmoe.model.optimizer_config import IN_TOKENS, AdafactorConfig, OptimizerConfig, ScheduleConfig
from openmoe.platform.run_file.spec_errors import Problem, join, show
from openmoe.platform.run_file.spec_source import Source

CHOICES = {choice.name: choice for choice in get_args(OptimizerConfig)}


def resolve(source: Source) -> list[Problem]:
    """Names the optimizer if the file does not, and replaces lengths in tokens by steps.

    Of a length in steps and the same in tokens an override wins. The batch must be in rows by now.
    """
    optimizer = source.values.get("optimizer")
    if not isinstance(optimizer, dict):
        return []
    optimizer.setdefault("name", "adafactor")
    step_tokens = _step_tokens(source.values)
    problems = _in_steps(source, optimizer, "optimizer", step_tokens)
    if isinstance(schedule := optimizer.get("schedule"), dict):
        problems += _in_steps(source, schedule, "optimizer.schedule", step_tokens)
    return problems


def _in_steps(source: Source, section: dict[str, Any], place: str, step_tokens: int | None) -> list[Problem]:
    problems = []
    for steps, tokens in IN_TOKENS.items():
        if tokens not in section:
            continue
        value = section.pop(tokens)
        overridden = [source.origins.get(join(place, name)) == "override" for name in (tokens, steps)]
        if section.get(steps) is not None and overridden == [False, True]:
            continue
        if section.get(steps) is not None and overridden != [True, False]:
            problems.append(Problem(join(place, tokens), f"{steps} is given too; remove one"))
        elif type(value) is not int or value < 1:
            problems.append(Problem(join(place, tokens), f"must be whole tokens, at least 1, got {show(value)}"))
        elif step_tokens:  # else what a step has is wrong, and said
            section[steps] = max(1, (value + step_tokens // 2) // step_tokens)
    return problems


def _step_tokens(values: dict[str, Any]) -> int | None:
    train, data = values.get("train"), values.get("data")
    rows = train.get("batch_rows") if isinstance(train, dict) else None
    seq_len = data.get("seq_len") if isinstance(data, dict) else None
    if type(rows) is int and type(seq_len) is int and rows > 0 and seq_len > 0:
        return rows * seq_len
    return None


def describe(definitions: dict[str, Any]) -> None:
    """Adds to the JSON Schema of the sections, in place, what may be written instead of what `resolve` makes of it."""
    for choice in CHOICES.values():
        if choice is not AdafactorConfig:
            definitions[choice.__name__]["required"] = ["name"]
    for section in (*CHOICES.values(), ScheduleConfig):
        properties = definitions[section.__name__]["properties"]
        for steps, tokens in IN_TOKENS.items():
            if steps in properties:
                description = f"Instead of {steps}: rounded to whole steps."
                properties[tokens] = {"type": "integer", "minimum": 1, "description": description}
