"""Whether what a run is to begin with is there and reads the same tokens: asked before anything is built or started.

That its arrays fit the model is seen where there are devices (`init_from.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from openmoe.pipelines import storage, tokenizer
from openmoe.pipelines.tokenizer import Tokenizer
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file.spec import RunSpec

TOKENIZER = "tokenizer_sha256"  # of a SentencePiece model; in run.json, and among the facts of each checkpoint


def check(spec: RunSpec, tokenizer: Tokenizer | None, say: Callable[[str], object]) -> str:
    """Refuses an `init_from` that cannot be begun with.

    Args:
      spec: the run.
      tokenizer: of its data; None where it has not been read, and is not compared.
      say: told where the source does not record what tokenizer it was trained with, as conversions do not.

    Returns:
      What the run begins with, in words; "" where it names nothing, or has checkpoints of its own to go on from.

    Raises:
      RunDirError: there is no checkpoint, or it was trained with another tokenizer.
    """
    if spec.init_from is None or RunDir(spec.run_dir).newest_accepted() is not None:
        return ""  # a run goes on from its own checkpoints, whatever has become of its source
    source = RunDir(spec.init_from)
    what, recorded = _recorded_by_run(source) if source.exists() else _recorded_by_checkpoint(spec.init_from)
    if recorded is None:
        say(f"init_from: {spec.init_from} does not say what tokenizer it was trained with; taken to be the same")
    elif tokenizer is not None and recorded != tokenizer.sha256:
        raise RunDirError(
            f"init_from: {spec.init_from} was trained with another tokenizer than data.tokenizer={spec.data.tokenizer} "
            f"(SHA-256 {recorded[:16]} there, {tokenizer.sha256[:16]} here): its tokens mean other text; "
            "give the tokenizer it was trained with"
        )
    return what


def _recorded_by_run(source: RunDir) -> tuple[str, str | None]:
    record, newest = source.record(), source.newest_accepted()
    if newest is None:
        raise RunDirError(f"init_from: {source.path}: the run has no accepted checkpoint yet; train it first")
    return f"step {newest.step:,} of run {record['name']}", record.get(TOKENIZER)


def _recorded_by_checkpoint(path: str) -> tuple[str, str | None]:
    """Returns what the facts of a checkpoint of Orbax say, without reading its arrays."""
    parts = storage.list_folders(path)
    if "state" not in parts:
        raise RunDirError(
            f"init_from: {path}: no run directory, and no checkpoint of Orbax; give the path of one step, such as "
            "DIR/1000; `openmoe convert --to orbax` makes one of T5X or Hugging Face"
        )
    return "a checkpoint of Orbax", facts_of(path).get(TOKENIZER)


def tokenizer_of(run: RunDir, remedy: str) -> Tokenizer:
    """Returns the tokenizer that a run was trained with.

    Args:
      run: the run.
      remedy: what to do where its file has become another.

    Raises:
      RunDirError: that has happened.
    """
    uri = run.spec().data.tokenizer
    found = tokenizer.load(uri)
    if run.record().get(TOKENIZER, found.sha256) != found.sha256:
        raise RunDirError(f"{run.path}: was trained with another tokenizer than {uri} is now; {remedy}")
    return found


def facts_of(path: str) -> dict[str, Any]:
    """Returns the facts inside a checkpoint of Orbax, whatever its folder is called; none of one that has none."""
    content = storage.read_if_present(storage.join(path, "loader", "metadata"))
    return json.loads(content) if content else {}
