"""What the provider says about its machines, kept apart from what really runs: a file for each instance.

A cloud answers "is this machine there, or did you take it away" from records of its own. A machine whose record says
PREEMPTED was taken away on purpose; one that died while its record says RUNNING had a fault.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

InstanceState = Literal["RUNNING", "PREEMPTED", "STOPPED"]


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One TPU host, as its provider knows it."""

    name: str
    """Such as "slice-a-0"."""
    slice: str
    worker_id: int
    """Of the host in its slice, from 0."""
    ip: str
    state: InstanceState
    since_s: float
    """Unix time at which it came into this state."""
    preempted_s: float = 0.0
    """Unix time at which it was last taken away, remembered when it runs again; 0 if never."""


def read_all(state_dir: Path) -> list[Instance]:
    """Returns the records of all instances, by name; none if there is no such cluster."""
    found = []
    for path in (state_dir / "instances").glob("*.json"):
        try:
            found.append(Instance(**json.loads(path.read_text())))
        except FileNotFoundError:  # taken down while we read
            continue
    return sorted(found, key=lambda instance: (len(instance.slice), instance.slice, instance.worker_id))


def write(state_dir: Path, instances: Iterable[Instance]) -> None:
    """Writes the records, each at once, so that no reader sees half of one."""
    folder = state_dir / "instances"
    folder.mkdir(exist_ok=True)
    for instance in instances:
        replace_file(folder / f"{instance.name}.json", json.dumps(asdict(instance)))


def set_state(state_dir: Path, instances: Iterable[Instance], state: InstanceState, now_s: float) -> list[Instance]:
    """Records that these instances are in `state` since `now_s`; those that are already keep their time."""
    changed = [replace(each, state=state, since_s=now_s) for each in instances if each.state != state]
    if state == "PREEMPTED":
        changed = [replace(each, preempted_s=now_s) for each in changed]
    write(state_dir, changed)
    return changed


def replace_file(path: Path, text: str) -> None:
    """Writes a file that others read meanwhile."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a power cut leaves an empty file under the new name
    unfinished.replace(path)
