"""Notice of a preemption, and peers that die or freeze: real processes in one JAX process group, without Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from openmoe.platform.run_file.spec import ClusterConfig
from openmoe.platform.train import notice

pytestmark = pytest.mark.timeout(180)

PRODUCTION = ClusterConfig(num_workers=2, devices_per_worker=1)


@pytest.mark.parametrize(
    ("grace_s", "save_s", "saves"),
    [
        *[(0.0, 0.0, False), (0.0, 0.5, False), (-1.0, 0.0, False)],  # too late
        *[(10.0, 0.0, True), (10.0, 4.0, True), (10.0, 10.0, True), (10.0, 10.1, False)],  # 0: never measured
        *[(30.0, 29.0, True), (30.0, 31.0, False), (3600.0, 31.0, True)],
    ],
)
def test_a_save_on_notice_begins_only_if_it_fits_the_grace(grace_s, save_s, saves):
    assert notice.fits(grace_s, save_s) is saves


@pytest.mark.parametrize(
    ("grace_s", "save_s", "waits_s"),
    [(10.0, 4.0, 0.0), (30.0, 4.0, 0.0), (60.0, 4.0, 0.0), (3600.0, 4.0, 3540.0), (3600.0, 100.0, 3300.0)],
)
def test_a_notice_of_long_ahead_is_answered_when_it_is_time(grace_s, save_s, waits_s):
    assert notice.waits_s(grace_s, save_s) == waits_s


def take_part(process, port, heartbeat_s, announces):
    """Runs in each process of a group: steps without a collective until all agree on one, then only waits."""
    import jax

    process, ear_opened_s = int(process), time.time()
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=process, heartbeat_timeout_seconds=int(heartbeat_s)
    )

    def announced():
        return ear_opened_s + 60.0 if announces == "ray" else None

    with notice.Notice(announced, save_s=0.0) as ear:
        for step in range(1, 1001):
            assert not ear.reached(step)
        print("ready", flush=True)
        while not ear.reached(step := step + 1):
            time.sleep(0.01 * (1 + process))  # one is slower
        answer = ear.answer(save_s=3.0 + process)
        print(json.dumps([step, answer.saves, round(answer.grace_s), answer.save_s]), flush=True)
        time.sleep(120)


class Group:
    """Two processes that form a group."""

    def __init__(self, heartbeat_s, announces):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        command = [sys.executable, __file__]
        arguments = [str(port), str(heartbeat_s), announces]
        pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        self.processes = [subprocess.Popen([*command, str(n), *arguments], **pipes) for n in range(2)]

    def lines(self):
        """The next line of each process, without those of JAX's collectives."""
        return [next(line.strip() for line in process.stdout if "Gloo" not in line) for process in self.processes]

    def signal_and_see_the_other_end(self, victim, number):
        """Sends a signal to one process; the other ends before it does so itself (120 s), or for JAX (100 s)."""
        self.processes[victim].send_signal(number)
        assert self.processes[1 - victim].wait(timeout=90) != 0

    def end(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def group():
    made = []

    def start(*arguments):
        made.append(Group(*arguments))
        return made[-1]

    yield start
    for each in made:
        each.end()


def test_sigterm_to_one_process_is_answered_by_both_at_one_step_and_a_frozen_peer_ends_the_group(group):
    pair = group(PRODUCTION.heartbeat_timeout_s, "nothing")
    assert pair.lines() == ["ready", "ready"]
    pair.processes[1].send_signal(signal.SIGTERM)
    first, second = map(json.loads, pair.lines())
    assert first == second
    assert first[1:] == [True, 30, 4.0]  # the grace that SIGTERM stands for; the slower of both saves
    pair.signal_and_see_the_other_end(1, signal.SIGSTOP)


def test_what_ray_announces_is_answered_by_both_at_one_step_and_a_dead_peer_ends_the_group(group):
    pair = group(5, "ray")
    assert pair.lines() == ["ready", "ready"]
    first, second = map(json.loads, pair.lines())
    assert first == second
    assert first[1] is True
    assert 4 <= first[2] < 60
    pair.signal_and_see_the_other_end(1, signal.SIGKILL)


if __name__ == "__main__":
    take_part(*sys.argv[1:])
