"""`openmoe quickstart`: the shipped run, from Python's own text and code to a trained, resumable MoE."""

from __future__ import annotations

from openmoe.platform import driver, spec
from openmoe.platform.run_dir import RunDir


def main(*, new: bool, run_dir: str | None) -> int:
    """Runs, or goes on with, the quickstart; returns the exit code.

    Args:
      new: starts another run beside a finished one.
      run_dir: where it is kept; the run file's own if None.
    """
    loaded = spec.load("quickstart", [f"run_dir={run_dir}"] if run_dir else [])
    if new:
        loaded = loaded.model_copy(update=_next_free(loaded.run_dir))
    code = driver.train(loaded)
    if code == 0 and not new:
        print(f"another one from scratch: openmoe quickstart --new{f' --run-dir {run_dir}' if run_dir else ''}")
    return code


def _next_free(run_dir: str) -> dict[str, str]:
    """Returns run_dir and data_dir of the first of run_dir, run_dir-2, run_dir-3, ... that is no run yet."""
    number, path = 1, run_dir
    while RunDir(path).exists():
        number += 1
        path = f"{run_dir}-{number}"
    return {"run_dir": path, "data_dir": f"{run_dir.rstrip('/')}/data"}
