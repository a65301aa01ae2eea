"""`openmoe quickstart`: the shipped run, from Python's own text and code to a trained, resumable MoE."""

from __future__ import annotations

from collections.abc import Sequence

from openmoe.platform.run import attempt_log, driver
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec


def main(*, new: bool, run_dir: str | None, overrides: Sequence[str] = ()) -> int:
    """Runs, or goes on with, the quickstart; returns the exit code.

    Args:
      new: starts another run beside a finished one.
      run_dir: where it is kept; the run file's own if None.
      overrides: settings that win over the run file's, as key.path=value.
    """
    loaded = spec.load("quickstart", [*overrides, *([f"run_dir={run_dir}"] if run_dir else [])])
    if new:
        loaded = loaded.model_copy(update={"run_dir": _next_free(loaded.run_dir)})  # the data is the same
    code = driver.train(loaded, began_s=attempt_log.process_began_s())
    if code == 0 and not new:
        print(f"another one from scratch: openmoe quickstart --new{f' --run-dir {run_dir}' if run_dir else ''}")
    return code


def _next_free(run_dir: str) -> str:
    """Returns the first of run_dir, run_dir-2, run_dir-3, ... that is no run yet."""
    first = path = run_dir.rstrip("/")
    number = 1
    while RunDir(path).exists():
        number += 1
        path = f"{first}-{number}"
    return path
