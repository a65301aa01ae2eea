"""The database of jobs: real files, real processes, and what is left when they are killed."""

import itertools
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import pytest

from openmoe.platform.jobs import cron, job_events
from openmoe.platform.jobs.cron import Schedule, ScheduleAdded, ScheduleError, ScheduleFired, ScheduleRemoved
from openmoe.platform.jobs.job import InvalidTransition
from openmoe.platform.jobs.job_events import (
    Admitted,
    AttemptEnded,
    CancelAsked,
    ClusterLost,
    JobError,
    RaySaw,
    RetryAsked,
    Submit,
    Submitted,
)
from openmoe.platform.jobs.job_store import KINDS, MIGRATIONS, JobStore
from openmoe.platform.run.verdict import Verdict


def submitted(name="night-ab12", **fields):
    values = {
        "job_id": name, "time_s": 1.0, "name": name[:-5], "run_dir": f"/runs/{name}", "run_file": "name: night\n",
        "cluster": "local", "cluster_file": "", "slots": 1, "budgets": {"host_fault": 2, "preemption": 9},
    }  # fmt: skip
    return Submitted(**values | fields)


def schedule(name="night", **fields):
    values = {
        "name": name, "cron": "0 20 * * *", "timezone": "Europe/Berlin", "run_name": "night", "run_dir": "/runs/night",
        "run_file": "name: night\n", "cluster": "local", "cluster_file": "", "slots": 1, "budgets": {"host_fault": 2},
    }  # fmt: skip
    return Schedule(**values | fields)


NOW = {"job_id": "night-ab12", "time_s": 2.0}
FIRST = {**NOW, "submission_id": "night-ab12-1"}
PREEMPTED = Verdict(cause="preemption", reason="slice-a was preempted", evidence=("slice-a-0 is gone",))


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "controller.db")


def test_what_was_applied_is_there_when_the_database_is_opened_again(store):
    store.apply(submitted())
    job, actions = store.apply(Admitted(**NOW))
    assert actions == [Submit(job_id="night-ab12", submission_id="night-ab12-1")]
    job, actions = store.apply(AttemptEnded(**FIRST, outcome="failed", verdict=PREEMPTED, step=40))
    assert (job.state, job.attempt, job.spent, actions) == ("queued", 1, {"preemption": 1}, [])
    again = JobStore(store.path)
    assert again.jobs() == {"night-ab12": job}
    assert again.version() == 3
    assert again.events("night-ab12") == [
        (1, submitted()),
        (2, Admitted(**NOW)),
        (3, AttemptEnded(**FIRST, outcome="failed", verdict=PREEMPTED, step=40)),
    ]


def test_two_open_stores_see_what_the_other_writes(store):
    other = JobStore(store.path)
    store.apply(submitted())
    assert other.jobs()["night-ab12"].state == "queued"
    other.apply(CancelAsked(**NOW))
    assert store.jobs()["night-ab12"].state == "cancelled"
    with pytest.raises(InvalidTransition):
        store.apply(Admitted(**NOW))


def test_an_event_that_changes_nothing_is_not_recorded(store):
    store.apply(submitted())
    store.apply(Admitted(**NOW))
    job, _ = store.apply(RaySaw(**FIRST, status="RUNNING"))
    for _ in range(3):
        assert store.apply(RaySaw(**FIRST | {"time_s": 9.0}, status="RUNNING")) == (job, [])
    assert store.version() == 3


def test_an_impossible_event_leaves_no_trace_and_takes_those_beside_it_along(store):
    store.apply(submitted())
    fired = ScheduleFired(schedule="night", time_s=2.0, fire_s=2.0, job_id="night-cd34")
    with pytest.raises(InvalidTransition):
        store.apply_all([submitted("night-cd34"), CancelAsked(**NOW), CancelAsked(**NOW)])
    with pytest.raises(ScheduleError, match="schedule night: there is none of this name"):
        store.apply_all([submitted("night-cd34"), fired])
    assert store.version() == 1
    assert list(store.jobs()) == list(JobStore(store.path).jobs()) == ["night-ab12"]
    assert store.jobs()["night-ab12"].state == "queued"


def test_schedules_are_events_of_the_same_log(store):
    store.apply_all([ScheduleAdded(schedule="night", time_s=5.0, definition=schedule())])
    assert store.schedules() == {"night": replace(schedule(), last_fired_s=5.0)}
    fired = ScheduleFired(schedule="night", time_s=7.0, fire_s=6.5, job_id="night-ab12")
    assert store.apply_all([fired, submitted(schedule="night")]) == []
    there = JobStore(store.path).schedule("night")
    assert (there.last_fired_s, there.last_result) == (6.5, "night-ab12")
    store.apply_all([ScheduleRemoved(schedule="night", time_s=8.0)])
    assert store.schedules() == JobStore(store.path).schedules() == {}
    with pytest.raises(ScheduleError, match="'night': there is none of this name; there are none yet"):
        store.schedule("night")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("night-ab12", "night-ab12"),
        ("night-c", "night-cd34"),
        ("day", "day-ef56"),
        ("night-ab12-x", "night-ab12-xy78"),
    ],
)
def test_a_job_is_found_by_its_id_or_the_beginning_of_it(store, wanted, found):
    for name in ("night-ab12", "night-cd34", "day-ef56", "night-ab12-xy78"):
        store.apply(submitted(name))
    assert store.job(wanted).id == found


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("night", "job 'night': 2 jobs begin like this (night-cd34, night-ab12); write more of the id"),
        ("nigth-ab12", "job 'nigth-ab12': there is none of this id; did you mean `night-ab12`?"),
        ("x", "job 'x': there is none of this id; the newest: `day-ef56`, `night-cd34`, `night-ab12`"),
        ("", "job '': there is none of this id; the newest: `day-ef56`, `night-cd34`, `night-ab12`"),
    ],
)
def test_an_id_that_is_not_there_is_answered_with_those_that_are_near(store, wanted, message):
    for name in ("night-ab12", "night-cd34", "day-ef56"):
        store.apply(submitted(name))
    with pytest.raises(JobError) as caught:
        store.job(wanted)
    assert str(caught.value) == message


def test_without_jobs_the_remedy_is_to_submit_one(store):
    with pytest.raises(JobError, match="there are none yet, `openmoe submit` makes one"):
        store.job("night")


def test_new_ids_are_free_and_short(store):
    ids = {store.new_id("night") for _ in range(50)}
    assert len(ids) > 45
    assert all(name.startswith("night-") and len(name) == 10 for name in ids)


def test_only_the_owner_can_read_it_and_every_commit_reaches_the_disk(store):
    store.apply(submitted())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.path.parent.iterdir()}
    assert modes == dict.fromkeys(["controller.db", "controller.db-shm", "controller.db-wal"], 0o600)
    assert store._sql.execute("pragma journal_mode").fetchone() == ("wal",)
    assert store._sql.execute("pragma synchronous").fetchone() == (2,)  # FULL


EXAMPLES = [
    submitted(schedule="night", stop_at_s=36_000.5),
    Admitted(**NOW),
    CancelAsked(**NOW, why="nicht gewünscht"),
    RetryAsked(**NOW),
    job_events.WindowClosed(**NOW),
    ClusterLost(**NOW),
    job_events.ClusterFound(**NOW),
    job_events.SubmissionAccepted(**FIRST),
    job_events.SubmitRefused(**FIRST, error="no answer", retryable=True),
    RaySaw(**FIRST, status="MISSING"),
    AttemptEnded(**FIRST, outcome="failed", verdict=PREEMPTED, step=40, decided=True),
    ScheduleAdded(schedule="night", time_s=1.0, definition=schedule(window_s=36_000.0, overlap="replace")),
    ScheduleRemoved(schedule="night", time_s=1.0),
    cron.SchedulePaused(schedule="night", time_s=1.0),
    cron.ScheduleResumed(schedule="night", time_s=1.0),
    ScheduleFired(schedule="night", time_s=2.0, fire_s=1.0, missed=3, skipped="night-ab12 is still running"),
]


def test_every_kind_of_event_comes_back_as_it_was(store):
    assert [type(event) for event in EXAMPLES] == list(KINDS.values())
    assert set(KINDS.values()) == {*_leaves(job_events.Event), *_leaves(cron.ScheduleEvent)}
    bodies = [(KINDS_OF[type(event)], store._encode(event)) for event in EXAMPLES]
    assert [store._decode(1, kind, body) for kind, body in bodies] == EXAMPLES
    assert json.loads(bodies[1][1]) == {"job_id": "night-ab12", "time_s": 2.0}


KINDS_OF = {event_type: kind for kind, event_type in KINDS.items()}


def _leaves(kind):
    below = kind.__subclasses__()
    return itertools.chain.from_iterable(map(_leaves, below)) if below else [kind]


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("renamed", "{}", "event 2 is of a kind unknown here, 'renamed'; its version is 1, this OpenMoE knows 1: upgr"),
        ("admitted", '{"job_id": "night-ab12"}', "event 2 (admitted) cannot be read (time_s: Field required); its ver"),
        ("admitted", '{"job_id": "night-ab12", "time_s": "2"}', "(time_s: Input should be a valid number)"),
        ("admitted", '{"job_id": "night-ab12", "time_s": 2, "x": 1}', "(x: Unexpected keyword argument)"),
        ("ray_saw", json.dumps({**FIRST, "status": "LOST"}), "(status: Input should be 'PENDING', 'RUNNING'"),
        ("retry_asked", json.dumps(NOW), "event 2 cannot follow those before it (night-ab12: cannot be tried again"),
        ("admitted", "{", "event 2 (admitted) cannot be read"),
    ],
)
def test_a_log_that_cannot_be_understood_is_refused_by_name(store, kind, body, message):
    store.apply(submitted())
    row = (2.0, "night-ab12", kind, body)
    store._sql.execute("insert into event (time_s, subject, kind, body) values (?, ?, ?, ?)", row)
    for opened in (store, JobStore(store.path)):
        for _ in range(2):
            with pytest.raises(JobError) as caught:
                opened.jobs()
            assert str(store.path) in str(caught.value)
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_database_of_a_newer_version_is_refused_in_one_line(store):
    store._sql.execute("pragma user_version = 7")
    store.close()
    with pytest.raises(JobError) as caught:
        JobStore(store.path)
    assert str(caught.value) == (
        f"{store.path}: written by a newer OpenMoE; its version is 7, this OpenMoE knows {len(MIGRATIONS)}: "
        "upgrade OpenMoE, or set OPENMOE_HOME to another folder"
    )


def test_what_is_no_database_of_ours_is_refused_and_left_alone(tmp_path):
    (tmp_path / "text.db").write_text("not a database, but long enough to have a header " * 10)
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("create table song (title text)")
    other.close()
    with pytest.raises(JobError, match=r"text\.db: the database of jobs cannot be used: file is not a database"):
        JobStore(tmp_path / "text.db")
    with pytest.raises(JobError, match=r"other\.db: a database of something else; set OPENMOE_HOME"):
        JobStore(tmp_path / "other.db")
    with pytest.raises(JobError, match=r"cannot be used: .*No such file or directory"):
        JobStore(tmp_path / "missing" / "controller.db")
    assert sqlite3.connect(tmp_path / "other.db").execute("select name from sqlite_schema").fetchall() == [("song",)]


def test_ten_thousand_events_are_read_once_however_often_they_are_asked_for(store, monkeypatch):
    new = store._encode(submitted("night-0000", run_file="key: value\n" * 200))
    gone = store._encode(CancelAsked(job_id="night-0000", time_s=2.0))
    with store._transaction():
        for name in (f"night-{number:04d}" for number in range(5_000)):
            for kind, body in (("submitted", new), ("cancel_asked", gone)):
                row = (2.0, name, kind, body.replace("night-0000", name))
                store._sql.execute("insert into event (time_s, subject, kind, body) values (?, ?, ?, ?)", row)
    opened, decoded, decode = JobStore(store.path), [], JobStore._decode
    monkeypatch.setattr(opened, "_decode", lambda number, *row: decoded.append(number) or decode(opened, number, *row))
    for _ in range(100):
        assert len(opened.jobs()) == 5_000
        assert opened.version() == 10_000
    assert decoded == list(range(1, 10_001))


def test_threads_share_one_store(store):
    def submit(thread):
        for number in range(20):
            store.apply(submitted(f"t{thread}-{number:04d}"))
            store.jobs()

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.jobs()) == len(JobStore(store.path).jobs()) == 80


PRELUDE = """
import sys, time
from openmoe.platform.jobs.job import InvalidTransition
from openmoe.platform.jobs.job_events import *
from openmoe.platform.jobs.job_store import JobStore
def submitted(name):
    return Submitted(job_id=name, time_s=1.0, name="night", run_dir=f"/runs/{name}", run_file="x: 1\\n" * 500,
                     cluster="local", cluster_file="", slots=1, budgets={"preemption": 1000000})
def say(*words):
    print(*words, flush=True)
"""
WRITE_FOR_EVER = """
store, me = JobStore(sys.argv[1]), sys.argv[2]
say("ready")
sys.stdin.readline()
for number in range(10**9):
    name = f"{me}-{number:06d}"
    for event in (submitted(name), Admitted(job_id=name, time_s=2.0), CancelAsked(job_id=name, time_s=3.0)):
        job, _ = store.apply(event)
        say(name, job.state)
"""
RETRY_AT_ONCE = """
store = JobStore(sys.argv[1])
say("ready")
for line in sys.stdin:
    time.sleep(max(0.0, float(line) - time.time()))
    try:
        store.apply(RetryAsked(job_id="night-ab12", time_s=2.0))
        say("won")
    except InvalidTransition as error:
        say(error)
"""


def process(script, *arguments):
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return started


def test_a_killed_writer_loses_nothing_it_was_told_is_safe_and_leaves_no_half_event(store):
    """Two writers at a time are killed in the midst of it, while this process reads."""
    random = Random(1)
    acknowledged, stop = {}, threading.Event()

    def read_on():
        reader, before = JobStore(store.path), 0
        while not stop.is_set():
            reader.jobs()
            version = reader.version()
            assert version >= before
            before = version

    reader = ThreadPoolExecutor(max_workers=1)
    reading = reader.submit(read_on)
    writers = [process(WRITE_FOR_EVER, store.path, f"w{number}") for number in range(3)]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
    for pair in (writers[:2], writers[2:]):
        for writer in pair:
            print(file=writer.stdin, flush=True)
        for writer in pair:
            time.sleep(random.uniform(0.1, 0.4))
            os.kill(writer.pid, signal.SIGKILL)
        for writer in pair:
            said = [line.split() for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
            acknowledged |= dict(said)
            writer.wait()
    stop.set()
    reading.result()

    after = JobStore(store.path)
    jobs = after.jobs()
    order = ["queued", "starting", "stopping"]
    assert len(acknowledged) > 4
    for name, state in acknowledged.items():
        assert order.index(jobs[name].state) >= order.index(state)
    numbers = [number for name in jobs for number, _ in after.events(name)]
    assert sorted(numbers) == list(range(1, after.version() + 1))
    assert after._sql.execute("pragma integrity_check").fetchone() == ("ok",)
    after.apply(submitted())


def test_of_two_processes_that_want_what_excludes_each_other_one_wins(tmp_path):
    """They make the database too, at the same time."""
    both = [process(RETRY_AT_ONCE, tmp_path / "new.db") for _ in range(2)]
    assert [each.stdout.readline() for each in both] == ["ready\n"] * 2
    store = JobStore(tmp_path / "new.db")
    store.apply(submitted())
    for _ in range(10):
        store.apply(CancelAsked(**NOW))
        at_s = time.time() + 0.02
        for each in both:
            print(at_s, file=each.stdin, flush=True)
        answers = sorted(each.stdout.readline() for each in both)
        assert answers == [
            "night-ab12: cannot be tried again while it is queued: asked to try again; "
            "`openmoe jobs cancel night-ab12` first\n",
            "won\n",
        ]
    for each in both:
        each.stdin.close()
        assert each.wait(timeout=60) == 0
    assert store.version() == 21
