"""How long a run is: in steps as the run file says, or in epochs, which its data turns into steps."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from openmoe.pipelines.config import DataError
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_sections import TrainConfig


def steps_of(train: TrainConfig, epoch_rows: int) -> int:
    """Returns the steps of a run: as given, or the whole steps in its epochs.

    Args:
      train: as in the run file.
      epoch_rows: rows of pass 0 of all sources together.

    Raises:
      DataError: the epochs are not even one step.
    """
    if train.epochs is None:
        return train.total_steps
    rows = rows_of(train.epochs, epoch_rows)
    if rows < train.batch_rows:
        raise DataError(
            f"train.epochs: {train.epochs:g} epochs of {epoch_rows} rows are {rows} rows, less than one step of "
            f"batch_rows={train.batch_rows}; give more epochs, more data or a smaller batch"
        )
    return rows // train.batch_rows


def rows_of(epochs: float, epoch_rows: int) -> int:
    """Returns the rows of epochs, in the decimals in which they were written: 0.29 epochs of 100 rows are 29."""
    return int(Decimal(str(epochs)) * epoch_rows)


def resolved(spec: RunSpec, epoch_rows: int | None) -> RunSpec:
    """Returns the run with its length in steps, as everything that trains it wants it.

    Args:
      spec: of the run.
      epoch_rows: rows of pass 0 of all sources together; None where they are not built.
    """
    if spec.train.epochs is None or epoch_rows is None:
        return spec
    steps = steps_of(spec.train, epoch_rows)
    return spec.model_copy(update={"train": spec.train.model_copy(update={"steps": steps, "epochs": None})})


def is_reached(train: TrainConfig, finished: dict[str, Any]) -> bool:
    """Returns whether a run whose finished.json is `finished` is as long as wanted now; False if that is not known."""
    if train.stop_when is not None and finished.get("stop_when") == train.stop_when.model_dump():
        return True  # that rule ended it
    epoch_rows = finished.get("epoch_rows")
    if train.steps is None and epoch_rows is None:
        return False
    return finished["steps"] >= steps_of(train, epoch_rows or 0)


def longer(train: TrainConfig, steps: int = 0, epochs: float | None = None) -> str:
    """Returns the setting with which the run goes on after its end.

    Args:
      train: as in the run file.
      steps: that it has done, which may be more than are wanted now.
      epochs: those in epochs, where that is known.
    """
    if train.epochs is None:
        return f"train.steps={2 * max(train.total_steps, steps)}"
    return f"train.epochs={2 * max(train.epochs, epochs or 0):g}"
