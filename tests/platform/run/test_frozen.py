"""A worker that is stopped, not dead, is found by its silence, and killed when its group has no more use for it."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from openmoe.clusters import processes
from openmoe.platform.run import frozen
from openmoe.platform.run.frozen import Pulse, Seen
from openmoe.platform.run.verdict import Failure

PROCESS = processes.Process(pid=7, started="boot/1")


@pytest.mark.parametrize(
    ("silent_s", "states", "ordered"),
    [
        ({0: 0.5, 1: 12.4}, {}, {}),
        ({0: 0.5, 1: 12.5}, {}, {1: "look"}),
        ({0: 0.5, 1: 19.9}, {1: "stopped"}, {1: "look"}),
        ({0: 0.5, 1: 20.0}, {1: "stopped"}, {1: "end if stopped"}),
        ({0: 0.5, 1: 99.0}, {1: "runs"}, {1: "end if stopped"}),  # it may be busy
        ({0: 13.0, 1: 25.0}, {0: "gone", 1: "runs"}, {1: "end"}),  # for nobody
        ({0: 13.0, 1: 24.9}, {0: "gone", 1: "runs"}, {1: "end if stopped"}),
        ({0: 13.0, 1: 25.0}, {0: "gone", 1: "gone"}, {}),
        ({1: 25.0}, {1: "gone"}, {}),
    ],
)
def test_what_is_silent_is_looked_at_and_ended_when_stopped_or_useless(silent_s, states, ordered):
    pulses = {rank: Pulse("node", PROCESS, each_s) for rank, each_s in silent_s.items()}
    assert frozen.orders(pulses, states, heartbeat_timeout_s=25) == ordered


@pytest.fixture
def sleeper():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as started:
        yield started
        started.kill()


def stop(process):
    process.send_signal(signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)


def test_only_the_very_process_that_is_stopped_is_killed(sleeper):
    process = processes.identify(sleeper.pid)
    assert frozen.look(process, "end if stopped") == Seen("runs", killed=False)
    stop(sleeper)
    assert frozen.look(process, "look") == Seen("stopped", killed=False)
    before = replace(process, started="boot/1")  # its id was another's
    assert frozen.look(before, "end") == Seen("gone", killed=False)
    assert sleeper.poll() is None
    assert frozen.look(process, "end if stopped") == Seen("stopped", killed=True)
    assert sleeper.wait(timeout=20) == -signal.SIGKILL
    assert frozen.look(process, "end") == Seen("gone", killed=False)


def test_one_that_runs_is_killed_when_it_is_to_end_whatever_it_does(sleeper):
    assert frozen.look(processes.identify(sleeper.pid), "end") == Seen("runs", killed=True)
    assert sleeper.wait(timeout=20) == -signal.SIGKILL


def test_a_process_says_that_it_gets_on_until_its_work_is_done():
    told, twice = [], threading.Event()

    def tell(process):
        told.append(process)
        if len(told) == 2:
            twice.set()

    with frozen.telling(tell):
        assert twice.wait(20)
    assert told == [processes.identify(os.getpid())] * (len(told) - 1) + [None]


def test_a_stopped_process_is_found_and_killed_on_its_node_and_named(ray_local, sleeper):
    said = []
    watch = frozen.Watch(25, lambda node_id: "slice-a-1", said.append)
    pulse = Pulse(ray_local.get_runtime_context().get_node_id(), processes.identify(sleeper.pid), 0.0)

    def go_on_until(what, silent_s):
        deadline_s = time.monotonic() + 60
        while (failure := watch.failures().get(1)) is None or what not in failure.text:
            assert time.monotonic() < deadline_s, failure
            watch.go_on({1: pulse._replace(silent_s=silent_s)})
            time.sleep(0.05)
        return failure

    stop(sleeper)
    who = f"process {sleeper.pid} on slice-a-1 is stopped, and has said nothing for"
    assert go_on_until("stopped", 13.0) == Failure(rank=1, kind="frozen", text=f"{who} 13 s")
    watch.go_on({1: pulse})
    assert watch.failures() == {}  # it was let go on
    assert go_on_until("killed", 20.0).text == f"{who} 20 s; killed, so that its group ends"
    assert sleeper.wait(timeout=20) == -signal.SIGKILL
    assert said == [f"rank 1: {who} 20 s; killed, so that its group ends"]
