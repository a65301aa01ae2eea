"""The quickstart as benchmarks start it: on a corpus and in a run directory of their own, itself a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

GLOBS = ("wikipedia/*.jsonl", "c4/*.jsonl", "common_crawl/*/*.zst", "the_stack/data/*/*.parquet")


def settings(folder: str) -> list[str]:
    """The settings that place corpus and run in a folder; no sample is drawn at the end."""
    paths = [f"data.sources.{i}.paths=[{folder}/corpus/{glob}]" for i, glob in enumerate(GLOBS)]
    return [*paths, f"run_dir={folder}/run", "train.sample_tokens=0"]


def start(
    folder: str, steps: int, *, checkpoint_every_steps: int, environment: Mapping[str, str] = os.environ
) -> subprocess.Popen[bytes]:
    """Starts `openmoe quickstart`, with its compile cache in the run directory, in a session of its own."""
    command = [sys.executable, "-m", "openmoe.platform", "quickstart", f"sample_corpus={folder}/corpus"]
    command += [*settings(folder), f"train.steps={steps}", f"train.checkpoint_every_steps={checkpoint_every_steps}"]
    clean = {name: value for name, value in environment.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with open(f"{folder}/log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=clean, start_new_session=True)
