"""What a plan assumes and cannot know: prices, preemptions, the share of the peak that is reached."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from openmoe.platform.planner.plan_hardware import CHIPS
from openmoe.platform.run_file import spec_source
from openmoe.platform.run_file.spec_errors import Problem, SpecError, did_you_mean, problems_of
from openmoe.platform.run_file.spec_sections import Section

SHIPPED = Path(__file__).with_name("plan_assumptions.yaml")
_FILE = spec_source.Kind(
    noun="assumptions file",
    package="openmoe.platform",
    example=str(SHIPPED),
    override="preemptions.hours_between=2",
    if_missing=f"copy {SHIPPED} and put in your own figures",
)


class Price(Section):
    """Of one chip for one hour."""

    on_demand: float = Field(ge=0, description="Kept as long as wanted.")
    spot: float = Field(ge=0, description="May be taken back.")


class Preemptions(Section):
    """How often machines are taken back, and what each time costs."""

    hours_between: float = Field(gt=0, description="Mean; each interval is independent of those before.")
    restart_s: float = Field(ge=0, description="Machines held: from their arrival to the first new step.")
    wait_s: float = Field(ge=0, description="Mean until machines are back; not paid.")
    save_s: float = Field(ge=0, description="That a checkpoint stops training.")


class Assumptions(Section):
    """All that a plan takes from elsewhere than the run file."""

    as_of: str = Field(description="When the prices were written down.")
    currency: str = Field(description="Of the prices.")
    mfu: float = Field(gt=0, le=1, description="Model FLOP/s as a share of the chips' bfloat16 peak.")
    prices: dict[str, Price] = Field(description="By kind of chip.")
    preemptions: Preemptions


def load(path: str | None = None, overrides: Sequence[str] = ()) -> Assumptions:
    """Reads a file of assumptions, or the shipped one.

    Raises:
      SpecError: with every problem of the file and the overrides.
    """
    file = SHIPPED if path is None else Path(path).absolute()
    source = spec_source.read(str(file), _FILE)
    for override in overrides:
        source.override(override)
    problems = list(source.problems)
    prices = source.values.get("prices")
    for kind in prices if isinstance(prices, dict) else ():
        if kind not in CHIPS:
            problems.append(Problem(f"prices.{kind}", f"no such chip; {did_you_mean(kind, CHIPS)}"))
    try:
        assumptions = Assumptions.model_validate_json(json.dumps(source.values))
    except ValidationError as error:
        problems += problems_of(error, Assumptions.model_json_schema())
    if problems:
        raise SpecError(problems, source.where, source.origins)
    return assumptions
