"""`openmoe goodput`: where a run's time, and its money, went."""

import json
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmoe.platform.commands import tables

if TYPE_CHECKING:
    from openmoe.platform.run.goodput import Goodput, Resume

HOUR_MS = 3_600_000
BAR = 60  # characters


def goodput(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, local or gs://.")],
    price_per_hour: Annotated[
        str | None, typer.Option(metavar="X", help="What the machines of the run cost an hour, in any currency.")
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(metavar="FILE", help="Lines time,slices: how many slices there were from then on.")
    ] = None,
    slices: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Slices that the run needs; default as in its run file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Charge every second of a run to a named cause.

    Reads the run directory alone, so it works while the run goes on, and anywhere after it.
    """
    from openmoe.platform.run import goodput as account
    from openmoe.platform.run import goodput_records
    from openmoe.platform.run.run_dir import RunDir, RunDirError

    run, price = RunDir(run_dir), _price(price_per_hour)
    found = account.fold(goodput_records.read(run))
    if not found.attempts:
        raise RunDirError(f"{run.path}: no attempt has begun yet; wait for its first worker group")
    record = run.record()
    facts = _json(found, price)
    if capacity is not None:
        trace = goodput_records.capacity(capacity, found.attempts[0].begin_ms / 1000)
        needed = slices or run.spec().cluster.num_slices
        facts["of_wall"] = dict(zip(("run", "perfect"), found.of_wall(trace, needed), strict=True))
    if as_json:
        print(json.dumps({"run": record["name"], **facts}, indent=2))
        return
    _show(found, facts, record["name"], price)


def _price(text: str | None) -> Decimal | None:
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    try:
        price = None if text is None else Decimal(text)
    except InvalidOperation:
        price = Decimal(-1)
    if price is not None and not (price.is_finite() and price >= 0):
        raise SpecError([Problem("", f"--price-per-hour {text}: give a number, such as 12.88")])
    return price


def _json(found: "Goodput", price: Decimal | None) -> dict[str, Any]:
    held, perfect = found.of_held()
    facts: dict[str, Any] = {
        "wall_ms": found.wall_ms,
        "held_ms": found.held_ms,
        "causes_ms": dict(found.causes.most_common()),
        "of_held": {"run": held, "perfect": perfect},
        "attempts": [
            {
                "name": attempt.name,
                "begin_ms": attempt.begin_ms,
                "end_ms": attempt.end_ms,
                "incarnations": attempt.incarnations,
                "outcome": attempt.outcome,
                "causes_ms": dict(attempt.causes.most_common()),
            }
            for attempt in found.attempts
        ],
        "between": [span._asdict() for span in found.between],
        "resumes": [
            {"incarnation": r.incarnation, "attempt": r.attempt, "ms": r.causes.total(), "causes_ms": dict(r.causes)}
            for r in found.resumes
        ],
    }
    if price is not None:
        facts["price_per_hour"], facts["cost"] = str(price), str(_cost(found.held_ms, price))
    return facts


def _cost(ms: int, price: Decimal) -> Decimal:
    return price * ms / HOUR_MS


def _show(found: "Goodput", facts: dict[str, Any], name: str, price: Decimal | None) -> None:
    from openmoe.platform.run.goodput import CAUSES, GOOD, NOT_HELD

    rows = []
    for cause in [*(c for c in CAUSES if found.causes[c]), *sorted(c for c in found.causes if c not in CAUSES)]:
        ms = found.causes[cause]
        share = ms / max(found.wall_ms, 1)
        cost = "" if price is None or cause in NOT_HELD else f"{_cost(ms, price):,.2f}"
        rows.append((cause, f"{ms / 1000:,.3f}", f"{share:.1%}", cost, _bar(share), CAUSES.get(cause, "")))
    total = "" if price is None else f"{_cost(found.held_ms, price):,.2f}"
    rows.append(("all", f"{found.wall_ms / 1000:,.3f}", "100.0%", total, "", _counts(found)))
    tables.show(f"goodput of {name}", ("cause", "seconds", "share", "cost" if price is not None else "", "", ""), rows)
    if len(found.resumes) > 1:
        shown = [_resume(resume) for resume in found.resumes[-10:]]
        tables.show("until the first new step", ("incarnation", "seconds", "of which"), shown)
    for key, what in (("of_held", "of held capacity"), ("of_wall", "of wall clock")):
        if key in facts:
            shares = facts[key]
            print(f"{what:<16}  {shares['run']:.1%} went into {GOOD}s; a perfect controller: {shares['perfect']:.1%}")


def _bar(share: float) -> str:
    return "█" * round(share * BAR) or "▏"


def _counts(found: "Goodput") -> str:
    incarnations = sum(len(attempt.incarnations) for attempt in found.attempts)
    return f"{len(found.attempts)} attempt(s), {incarnations} incarnation(s)"


def _resume(resume: "Resume") -> tuple[str, str, str]:
    parts = ", ".join(f"{cause} {ms / 1000:.1f}" for cause, ms in resume.causes.items() if ms)
    what = "new attempt, from its begin" if resume.attempt else "new worker group, from the last step before"
    return f"{resume.incarnation}", f"{resume.causes.total() / 1000:.1f}", f"{parts}  ({what})"
