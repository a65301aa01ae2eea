"""Reads accepted checkpoints back, and says of one that cannot be used what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openmoe.model import checkpoint, interop, step
from openmoe.pipelines import storage
from openmoe.platform.run.lineage import Acceptance
from openmoe.platform.run.run_dir import RunDir

SAME_IN_BOTH = ("step", "next_row", "incarnation", "data_id", "ledger_head")  # facts that the acceptance repeats

# TensorStore's words when storage does not answer, for which it has tried again for long, or refuses: no damage.
_UNAVAILABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
_DENIED = ("PERMISSION_DENIED", "UNAUTHENTICATED")

NOT_DAMAGE = (MemoryError, RuntimeError)  # of the devices or a peer, or it is named already


class DamagedCheckpoint(RuntimeError):
    """An accepted checkpoint cannot be restored to the bits that were saved."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason

    def __str__(self) -> str:
        return f"acceptance {self.number}: {self.reason}"


def restored(run: RunDir, accepted: Acceptance, template: step.TrainState) -> tuple[step.TrainState, dict[str, Any]]:
    """Returns the state that was accepted, every bit of it, and the facts saved with it.

    Args:
      run: the run.
      accepted: one of its acceptances.
      template: shapes, types and where the arrays shall lie (`step.state_shapes`).

    Raises:
      DamagedCheckpoint: it is gone, unreadable, another's, not finite, or of other bits than were accepted.
      StorageUnavailable, StorageDenied: nothing can be said about it.
    """
    folder, _, number = accepted.checkpoint.rpartition("/")
    where = f"{accepted.checkpoint}: "
    if not storage.exists(run.at(accepted.checkpoint)):
        raise DamagedCheckpoint(accepted.number, f"{where}is gone")
    checkpointer, record = checkpoint.Checkpointer(run.at(folder)), run.record()
    try:
        facts = checkpointer.facts(int(number))
        if reason := foreign(facts, accepted, record):
            raise DamagedCheckpoint(accepted.number, where + reason)
        state, _ = checkpointer.restore(int(number), template)
    except NOT_DAMAGE:
        raise
    except Exception as error:  # of many kinds: Orbax passes some on as a plain Exception
        raise DamagedCheckpoint(accepted.number, where + reason_of(error, run.at(accepted.checkpoint))) from error
    if reason := differing(checkpoint.examine(state), template, facts, accepted):
        raise DamagedCheckpoint(accepted.number, where + reason)
    return state, facts


def foreign(facts: Mapping[str, Any], accepted: Acceptance, record: Mapping[str, Any]) -> str:
    """Returns why a checkpoint's own facts are not those of this acceptance and run.json, or "".

    Earlier versions saved fewer facts; what is not there contradicts nothing.
    """
    if facts.get("spec_hash", record["spec_hash"]) != record["spec_hash"]:
        return f"is of another run, {facts.get('run')} (spec hash {str(facts['spec_hash'])[:16]})"
    for name in SAME_IN_BOTH:
        wanted = getattr(accepted, name)
        if (found := facts.get(name, wanted)) != wanted:
            return f"is not the one that was accepted: its {name} is {found}, accepted was {wanted}"
    return ""


def differing(found: checkpoint.Examined, like: Any, facts: Mapping[str, Any], accepted: Acceptance) -> str:
    """Returns in which array the bits are others than were accepted, or not finite; "" if all are right.

    Args:
      found: what the arrays add up to now.
      like: their shapes and types.
      facts: that were saved with them.
      accepted: what they must be.
    """
    sums = facts.get("sums", {})
    if wrong := [name for name, total in found.sums.items() if total != sums.get(name, total)]:
        return f"{interop.listed(wrong)}: the bits are others than were saved"
    if (digest := checkpoint.digest(like, found.sums)) != accepted.digest:
        return f"its bits have digest {digest}, accepted was {accepted.digest}"
    return f"{interop.listed(found.not_finite)}: holds numbers that are not finite" if found.not_finite else ""


def reason_of(error: Exception, path: str) -> str:
    """Returns in one line why the checkpoint at `path` cannot be read; TensorStore's words name the array.

    Raises:
      StorageUnavailable, StorageDenied: storage did not answer, so nothing is said about the checkpoint.
    """
    if refusal := refused(error, path, "be read"):
        raise refusal from error
    words = interop.origin(error)
    return words if isinstance(error, interop.CheckpointError) else f"cannot be read: {words}"


def refused(error: BaseException, path: str, verb: str) -> storage.StorageError | None:
    """Returns what is to be said of storage that did not answer or may not be used so; None if the error is another."""
    words, cause = interop.origin(error), error
    for kind, said in ((storage.StorageDenied, _DENIED), (storage.StorageUnavailable, _UNAVAILABLE)):
        if any(word in words for word in said):
            return kind(f"{path}: cannot {verb}: {words}")
    while cause is not None:  # Orbax wraps what our client of gs:// raises
        found = storage.explanation(cause, path, verb)
        if isinstance(found, storage.StorageDenied | storage.StorageUnavailable):
            return found
        cause = cause.__cause__
    return None
