"""Whoever starts a run a second time hears that somebody trains it, if that can be told."""

import socket
import subprocess
import sys
import time

import psutil
import pytest

from openmoe.platform.run import attempt_log, driver, ray_session
from openmoe.platform.run.journal import Journal
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec


@pytest.fixture
def process():
    """A process that lives for as long as the test wants."""
    with subprocess.Popen(["sleep", "600"]) as sleeping:
        yield sleeping
        sleeping.kill()


def marked(run, *marks):
    """Writes the attempt log of a driver: its start, and what it marked."""
    log = Journal(run.at("attempts"), incarnation=1, process=0)
    for mark in marks:
        log.append(mark)
        log.flush()
    return run


def start(pid, host, began_s):
    return {"phase": "start", "time_s": began_s, "name": "", "host": host, "pid": pid}


def test_a_driver_on_this_host_is_alive_as_long_as_its_process_is_that_one(process, tmp_path):
    now_s, here = time.time(), socket.gethostname()
    begun = start(process.pid, here, now_s)
    run = marked(RunDir(f"{tmp_path}/begun"), begun)
    assert attempt_log.seems_alive(run) == f"process {process.pid} on this host"
    idle = {"phase": "idle", "incarnation": 3, "time_s": now_s - 9000}
    at_work = marked(RunDir(f"{tmp_path}/at_work"), begun, idle)
    assert attempt_log.seems_alive(at_work) == f"incarnation 3 of process {process.pid} on this host"
    another = marked(
        RunDir(f"{tmp_path}/another"), start(process.pid, here, now_s - 3600)
    )  # the number was given again
    assert attempt_log.seems_alive(another) == ""
    over = marked(RunDir(f"{tmp_path}/over"), begun, {"phase": "over", "outcome": "stopped", "time_s": now_s})
    assert attempt_log.seems_alive(over) == ""
    process.kill()
    psutil.Process(process.pid).wait()  # a zombie still, until its parent asks
    assert attempt_log.seems_alive(run) == ""
    assert attempt_log.seems_alive(RunDir(f"{tmp_path}/none")) == ""


def test_a_driver_on_another_host_is_alive_if_the_run_has_a_record_of_late(tmp_path):
    for name, silent_s, alive in (("new", 0, True), ("old", 3600, False)):
        run = marked(RunDir(f"{tmp_path}/{name}"), start(4711, "host-b", time.time() - silent_s))
        assert attempt_log.seems_alive(run).startswith("process 4711 on host-b (newest record ") is alive


def test_a_second_driver_says_that_it_takes_over_before_it_begins(process, tmp_path, monkeypatch, capsys):
    loaded = spec.load("quickstart", [f"run_dir={tmp_path}/run"])
    marked(RunDir(loaded.run_dir), start(process.pid, socket.gethostname(), time.time()))
    monkeypatch.setattr(ray_session, "started", lambda cluster: sys.exit("no Ray here"))
    with pytest.raises(SystemExit):
        driver.train(loaded)
    assert (
        f"process {process.pid} on this host trains this run, and ends when this one takes over; "
        f"look: openmoe dashboard {tmp_path}/run\n"
    ) in capsys.readouterr().err
