"""Processes that outlive a command: told apart by their start, whatever the clock says, and ended by their mark."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from openmoe.clusters import processes

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")

# Starts a child in a session of its own, one of those an own child with an empty environment, and waits.
FAMILY = """
import subprocess, sys, time
wait = "import time; time.sleep(600)"
if sys.argv[1:] == ["inner"]:
    subprocess.Popen([sys.executable, "-c", wait], env={})
else:
    subprocess.Popen([sys.executable, __file__, "inner"], start_new_session=True)
time.sleep(600)
"""


def test_all_that_a_marked_process_started_is_killed_and_nothing_else(tmp_path):
    (tmp_path / "family.py").write_text(FAMILY)
    command = [sys.executable, str(tmp_path / "family.py")]
    mark = f"test-{os.getpid()}/a/1"
    with subprocess.Popen(command, env={**os.environ, processes.MARK: f"{mark}1"}, start_new_session=True) as other:
        leader = processes.start(command, mark=mark, environment=os.environ, log=tmp_path / "log", folder=tmp_path)
        deadline_s = time.monotonic() + 30
        while len(psutil.Process(leader.pid).children(recursive=True)) < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        below = psutil.Process(leader.pid).children(recursive=True)
        assert processes.kill(mark.__eq__) == 3
        assert not leader.alive
        assert not [each for each in below if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        assert other.poll() is None
        processes.kill(f"{mark}1".__eq__)


def test_a_process_without_a_mark_is_never_wanted():
    assert processes.marked("".__eq__) == []


@pytest.fixture
def later():
    """A process that started after this one."""
    time.sleep(0.05)  # the kernel counts hundredths of a second
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as started:
        yield started
        started.kill()


@pytest.fixture(params=[pytest.param("linux", marks=LINUX), "darwin"])
def system(request, monkeypatch):
    """Each way to tell processes apart, on any system."""
    monkeypatch.setattr(sys, "platform", request.param)


def test_another_process_of_the_same_id_does_not_count(system, later):
    this, other = processes.identify(os.getpid()), processes.identify(later.pid)
    assert (this.alive, other.alive) == (True, True)
    assert not replace(this, pid=other.pid).alive
    later.kill()
    deadline_s = time.monotonic() + 30
    while other.alive:  # it ended, and nobody has waited for it
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    later.wait()
    assert not other.alive
    with pytest.raises(psutil.NoSuchProcess):
        processes.identify(later.pid)


@LINUX
def test_a_process_of_an_earlier_boot_does_not_count():
    this = processes.identify(os.getpid())
    boot, ticks = this.started.split("/")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert not replace(this, started=f"00000000-0000-4000-8000-000000000000/{ticks}").alive


@LINUX
def test_a_process_may_have_any_name():
    this, name = processes.identify(os.getpid()), Path("/proc/self/comm").read_bytes()
    try:
        Path("/proc/self/comm").write_bytes(b"a) Z (b 1\xff")
        assert this.alive
        assert processes.identify(os.getpid()) == this
    finally:
        Path("/proc/self/comm").write_bytes(name)


@pytest.fixture
def clock_set_forward(tmp_path, monkeypatch):
    """What the kernel says after the clock was set an hour forward: only the time of the boot is another."""
    (tmp_path / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
    said = Path("/proc/stat").read_text()
    (tmp_path / "stat").write_text(re.sub(r"(?<=\nbtime )\d+", lambda btime: str(int(btime[0]) + 3600), said))
    return lambda: monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))


@LINUX
def test_a_process_lives_on_when_the_clock_is_set(clock_set_forward):
    this, created_s = processes.identify(os.getpid()), psutil.Process().create_time()
    clock_set_forward()
    assert psutil.Process().create_time() == pytest.approx(created_s + 3600, abs=2)
    assert this.alive
    assert processes.identify(os.getpid()) == this
