"""A process that the kernel killed for memory is told from one that ended otherwise, by the counter of its group."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openmoe.platform.run import board, hosts
from openmoe.platform.run.verdict import Evidence, Failure, diagnose
from openmoe.platform.train import memory_kills

EVENTS = "low 0\nhigh 12\nmax 7\noom 2\noom_kill 3\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"


@pytest.mark.parametrize(
    ("cgroups", "files", "counted"),
    [
        ("0::/kubepods/pod1\n", {"kubepods/pod1/memory.events": EVENTS}, 3),
        ("0::/kubepods/pod1\n", {"memory.events": EVENTS}, 3),  # in a container
        ("9:cpu:/\n4:memory:/ray\n0::/\n", {"memory/ray/memory.oom_control": CONTROL}, 5),
        ("4:memory:/ray\n", {"memory/memory.oom_control": CONTROL}, 5),
        ("4:memory:/ray\n", {}, None),
        ("0::/\n", {"memory.events": "low 0\n"}, None),
    ],
)
def test_the_counter_is_read_in_both_versions_of_control_groups(cgroups, files, counted, tmp_path):
    (tmp_path / "cgroup").write_text(cgroups)
    for name, text in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text)
    assert memory_kills.count(str(tmp_path / "cgroup"), str(tmp_path / "sys")) == counted


def test_without_control_groups_there_is_no_counter(tmp_path):
    assert memory_kills.count(str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("before", "after", "cause"),
    [
        ({0: 3, 1: 3}, {"node": 4}, "out_of_memory"),
        ({0: 3, 1: 3}, {"node": 3}, "host_fault"),
        ({0: 3, 1: None}, {"node": 4}, "host_fault"),
        ({0: 3, 1: 3}, {}, "host_fault"),  # the host is gone
    ],
)
def test_a_death_without_a_word_is_out_of_memory_only_where_the_counter_grew(before, after, cause):
    seen = Evidence(failures=(Failure(rank=1, kind="process_died", text="Killed"),))
    told = memory_kills.named([1], {0: "node", 1: "node"}, before, after)
    assert diagnose(seen.with_told(told)).cause == cause


GREEDY = """
import subprocess, sys
from openmoe.platform.train import memory_kills
print(memory_kills.count())
print(subprocess.run([sys.executable, "-c", "x = b'1' * 500_000_000"]).returncode)
print(memory_kills.count())
"""


@pytest.fixture
def limited():
    """A control group of 100 MB, made for the test; only root of a machine, or of a privileged container, can."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    old = (first / "memory.limit_in_bytes").exists()
    group = (first if old else second) / f"openmoe-test-{os.getpid()}"
    settings = {"memory.limit_in_bytes": "100M", "memory.swappiness": "0"} if old else {"memory.max": "100M"}
    made = False
    try:
        group.mkdir()
        made = True
        for name, value in settings.items():
            (group / name).write_text(value)
        if (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
        yield group
    except OSError as error:
        pytest.skip(f"THE KERNEL'S KILLS FOR MEMORY ARE NOT TESTED HERE: no control group can be made ({error})")
    finally:
        if made:
            group.rmdir()


def test_a_real_kill_by_a_control_group_is_counted(limited):
    enter = f'echo $$ > {limited}/cgroup.procs && exec "$0" -c "$1"'
    command = ["sh", "-c", enter, sys.executable, GREEDY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["0", "-9", "1"], result.stderr


def test_a_node_is_asked_for_its_counter(ray_local):
    [node] = [node["NodeID"] for node in ray_local.nodes() if node["Alive"]]
    assert hosts.memory_kills([node, node]) == {node: memory_kills.count()}
    assert hosts.memory_kills([]) == {}
    assert board.ask(board.start().memory_kills_here.remote(), None) == {node: memory_kills.count()}
