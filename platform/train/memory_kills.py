"""How many processes of this host's control group the kernel has killed for their memory.

Whoever is killed so gets SIGKILL and leaves no word; the counter of its group is all that tells it from another kill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from openmoe.platform.run.verdict import Failure


def count(cgroups: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> int | None:
    """Returns the counter of this process's group, or None where there is none, as outside Linux.

    Args:
      cgroups: names the groups of a process.
      mount: of the groups; in a container it begins at the container's own, whatever name that has outside.
    """
    try:
        lines = Path(cgroups).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = [f"{mount}{path}/memory.events", f"{mount}/memory.events"]
        elif "memory" in controllers.split(","):
            files = [f"{mount}/memory{path}/memory.oom_control", f"{mount}/memory/memory.oom_control"]
        else:
            continue
        for file in files:
            if (found := _counter(file)) is not None:
                return found
    return None


def _counter(file: str) -> int | None:
    try:
        fields = dict(line.split() for line in Path(file).read_text().splitlines())
        return int(fields["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None


def named(
    dead: Iterable[int], nodes: Mapping[int, str], before: Mapping[int, int | None], after: Mapping[str, int | None]
) -> dict[int, Failure]:
    """Returns what ended those of the dead ranks on whose host the kernel has killed for memory since they started.

    Args:
      dead: ranks whose processes died without a word.
      nodes: of each rank.
      before: counters when the ranks started.
      after: counters of the nodes now; those that are gone have none.
    """
    found = {}
    for rank in dead:
        start, end = before.get(rank), after.get(nodes.get(rank, ""))
        if start is not None and end is not None and end > start:
            counted = f"oom_kill {start} before, {end} after"
            text = (
                f"the kernel killed a process of its host for memory ({counted}): raise the limit of its control group"
            )
            found[rank] = Failure(rank=rank, kind="out_of_memory", text=text)
    return found
