"""The controller, round by round: a real database and real run directories, clusters that are played, given times."""

import contextlib
import inspect
import sqlite3
from collections import Counter
from datetime import UTC, datetime

import pytest

from openmoe.platform.jobs import wheel
from openmoe.platform.jobs.controller import Controller
from openmoe.platform.jobs.cron import Schedule, ScheduleAdded
from openmoe.platform.jobs.job_events import CancelAsked, RetryAsked, Submitted
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.jobs.ray_jobs import ClusterUnreachable, RayJob, RayJobs, Refused
from openmoe.platform.run.journal import Journal
from openmoe.platform.run.run_dir import RunDir

HEAD, OTHER = "http://head:8265", "http://other:8265"
EVENING_S = datetime(2026, 11, 24, 19, 0, tzinfo=UTC).timestamp()  # 20:00 in Berlin
DAY_S = 86_400.0


class Cluster:
    """What RayJobs shows of a cluster; submissions end when a test says so."""

    def __init__(self):
        self.jobs, self.entrypoints, self.stops = {}, {}, []
        self.silent, self.trouble, self.connections = False, None, 0

    def _answer(self):
        if self.silent:
            raise ClusterUnreachable("http://head:8265: no answer from the cluster (ConnectionError)")
        if self.trouble:
            raise self.trouble()

    def connect(self):
        self.connections += 1
        self._answer()
        return self

    def submit(self, submission_id, entrypoint, *, working_dir, wheel, environment):
        self._answer()
        assert (working_dir / "run.yaml").read_text() == "name: night\n"
        assert wheel.is_file()
        self.entrypoints.setdefault(submission_id, entrypoint)
        self.jobs.setdefault(submission_id, ray_job("RUNNING"))

    def status(self, submission_id):
        self._answer()
        return self.jobs.get(submission_id)

    def alive(self):
        self._answer()
        return {name: job.status for name, job in self.jobs.items() if not job.has_ended}

    def stop(self, submission_id):
        self._answer()
        self.stops.append(submission_id)


def ray_job(status, exit_code=None, message=""):
    return RayJob(status=status, exit_code=exit_code, message=message, error_type="")


class Place:
    """A home with a database, a controller, and the clusters it talks to."""

    def __init__(self, home, store):
        self.home, self.store, self.now_s, self.said = home, store, EVENING_S - 60, []
        self.head, self.other = Cluster(), Cluster()
        self.start_controller()

    def start_controller(self):
        clusters = {HEAD: self.head, OTHER: self.other}
        say = self.said.append
        self.controller = Controller(self.store, self.home, say, lambda address, token: clusters[address].connect())

    def tick(self, after_s=0.5):
        self.now_s += after_s
        self.controller.tick(self.now_s)

    def submit(self, job_id="night-ab12", **fields):
        values = {
            "name": "night", "run_dir": str(self.home / job_id), "run_file": "name: night\n", "cluster": HEAD,
            "cluster_file": "", "slots": 1, "budgets": {"host_fault": 2, "bad_code": 2, "cluster_lost": 9},
        }  # fmt: skip
        self.store.apply(Submitted(job_id=job_id, time_s=self.now_s, **values | fields))

    def add_schedule(self, **fields):
        values = {
            "name": "nightly", "cron": "0 20 * * *", "timezone": "Europe/Berlin", "run_name": "night",
            "run_dir": str(self.home / "night"), "run_file": "name: night\n", "cluster": HEAD, "cluster_file": "",
            "slots": 1, "budgets": {"host_fault": 2},
        }  # fmt: skip
        definition = Schedule(**values | fields)
        self.store.apply_all([ScheduleAdded(schedule="nightly", time_s=self.now_s, definition=definition)])

    def cancel(self, job_id="night-ab12"):
        self.store.apply(CancelAsked(job_id=job_id, time_s=self.now_s))

    def job(self, job_id="night-ab12"):
        return self.store.job(job_id)

    @property
    def states(self):
        return [job.state for job in self.store.jobs().values()]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    wheel.built_wheel(folder)
    return folder


@pytest.fixture
def place(tmp_path, wheels):
    (tmp_path / "wheels").symlink_to(wheels)
    return Place(tmp_path, JobStore(tmp_path / "controller.db"))


@pytest.fixture
def running(place):
    """A place where the first attempt of night-ab12 runs."""
    place.submit()
    place.tick()
    assert (place.job().state, place.job().submission_id) == ("running", "night-ab12-1")
    return place


def test_the_cluster_that_is_played_has_the_methods_of_the_real_client():
    for name in ("submit", "status", "alive", "stop"):
        real, played = (inspect.signature(getattr(kind, name)).parameters for kind in (RayJobs, Cluster))
        assert [(p.name, p.kind) for p in real.values()] == [(p.name, p.kind) for p in played.values()]


def test_a_job_is_submitted_under_its_id_and_runs_until_ray_says_that_it_succeeded(running):
    assert running.head.entrypoints == {
        "night-ab12-1": "python -m openmoe.platform train run.yaml --attempt night-ab12-1"
    }
    assert running.controller.at_work() == ["night-ab12"]
    running.head.jobs["night-ab12-1"] = ray_job("SUCCEEDED", 0)
    running.tick()
    assert (running.job().state, running.controller.at_work()) == ("succeeded", [])
    assert running.said == [
        "night-ab12 queued",
        "night-ab12 starting, attempt 1",
        "night-ab12 running, attempt 1",
        "night-ab12 succeeded, attempt 1: finished",
    ]


def test_a_schedule_fires_when_it_is_due_and_not_before(place):
    place.add_schedule()
    place.tick(after_s=59)
    assert place.states == []
    place.tick(after_s=1)
    [job] = place.store.jobs().values()
    assert (job.state, job.schedule, job.submitted_s) == ("running", "nightly", EVENING_S)
    assert list(place.head.jobs) == [f"{job.id}-1"]
    assert f"schedule nightly: {job.id}" in place.said
    place.tick(after_s=DAY_S)
    assert place.states == ["running"]
    assert f"schedule nightly: skipped: {job.id} is still running" in place.said


def test_a_job_is_stopped_when_its_window_closes_and_is_then_cancelled(place):
    place.submit(stop_at_s=EVENING_S)
    place.tick()
    place.tick(after_s=59)
    assert (place.job().state, place.head.stops) == ("running", [])
    place.tick(after_s=1)
    assert (place.job().state, place.head.stops) == ("stopping", ["night-ab12-1"])
    place.head.jobs["night-ab12-1"] = ray_job("STOPPED")
    place.tick()
    assert (place.job().state, place.job().reason) == (
        "cancelled",
        "its window closed; the next firing goes on from the checkpoint",
    )


@pytest.mark.parametrize(
    ("policy", "states", "result"),
    [
        ({"catch_up": "none"}, [], "skipped: no controller ran at that time, and catch_up is none"),
        ({"catch_up": "latest"}, ["running"], "night-"),
        ({"catch_up": "latest", "window_s": 3600.0}, [], "skipped: its window was over before a controller ran"),
    ],
)
def test_after_days_off_a_schedule_is_caught_up_once_or_not_at_all_as_it_says(place, policy, states, result):
    place.add_schedule(**policy)
    place.start_controller()
    place.tick(after_s=3 * DAY_S + 2 * 3600)
    for _ in range(3):
        place.tick()
    assert place.states == states
    assert place.store.schedule("nightly").last_result.startswith(result)
    assert place.store.schedule("nightly").last_fired_s == EVENING_S + 3 * DAY_S


def test_a_firing_that_replaces_a_job_starts_only_when_the_old_one_has_ended(place):
    place.add_schedule(overlap="replace")
    place.tick(after_s=60)
    place.tick(after_s=DAY_S)
    old, new = place.store.jobs().values()
    assert (old.state, new.state) == ("stopping", "queued")
    assert old.reason == f"replaced by {new.id}, the next firing of schedule nightly"
    assert (place.head.stops, list(place.head.jobs)) == ([f"{old.id}-1"], [f"{old.id}-1"])
    assert f"{new.id} waits: {old.id} is at work in the same run directory" in place.said
    place.head.jobs[f"{old.id}-1"] = ray_job("STOPPED")
    place.tick()
    place.tick()
    assert place.states == ["cancelled", "running"]
    assert list(place.head.jobs) == [f"{old.id}-1", f"{new.id}-1"]


def test_a_cluster_is_lost_after_ten_seconds_of_silence_and_found_with_the_run_going_on(running):
    running.head.silent = True
    running.tick()
    running.tick(after_s=10)
    assert not running.job().cluster_lost
    running.tick()
    assert (running.job().state, running.job().cluster_lost) == ("running", True)
    running.head.silent = False
    running.tick(after_s=5)
    assert (running.job().state, running.job().cluster_lost, running.job().attempt) == ("running", False, 1)
    assert running.said[-2:] == [
        "night-ab12 running, attempt 1: its cluster does not answer",
        "night-ab12 running, attempt 1: its cluster answers again",
    ]


def test_a_cluster_that_is_silent_while_the_clock_is_set_back_is_asked_on_lost_and_found_as_ever(running):
    running.head.silent = True
    running.tick()
    running.tick(after_s=-3600)
    running.tick(after_s=10)
    assert not running.job().cluster_lost
    running.tick()
    assert running.job().cluster_lost
    running.head.silent = False
    running.tick(after_s=5)
    assert not running.job().cluster_lost


def test_two_short_silences_are_no_loss(running):
    for _ in range(2):
        running.head.silent = True
        running.tick()
        running.tick()
        running.head.silent = False
        running.tick(after_s=60)
    assert "night-ab12 running, attempt 1: its cluster does not answer" not in running.said


def test_a_head_that_takes_connections_and_tells_nothing_is_lost_like_one_that_is_gone(running):
    running.head.silent, running.head.connect = True, lambda: running.head
    for _ in range(30):
        running.tick()
    assert running.job().cluster_lost


def test_a_found_cluster_that_does_not_know_the_submission_gets_another_attempt_at_once(running):
    running.head.silent = True
    running.tick()
    running.tick(after_s=11)
    running.head.silent, running.head.jobs = False, {}
    running.tick(after_s=5)
    running.tick()
    assert (running.job().state, running.job().spent) == ("running", {"cluster_lost": 1})
    assert list(running.head.jobs) == ["night-ab12-2"]


def test_a_silent_cluster_is_asked_less_often_the_longer_it_is_silent_but_every_five_seconds(running):
    running.head.silent = True
    running.tick()
    running.head.connections = 0
    for _ in range(7200):
        running.tick()
    assert 720 <= running.head.connections < 760
    running.head.silent = False
    for _ in range(10):
        running.tick()
    assert not running.job().cluster_lost


def test_a_refusal_for_good_fails_the_job_with_ray_s_words(place):
    place.submit()
    place.head.submit = refuse(400)
    place.tick()
    assert (place.job().state, place.job().reason) == ("failed", "Ray refused it: http://head:8265: no")


def test_a_refusal_that_may_pass_is_tried_again_after_its_pause_under_the_same_id(place):
    place.submit()
    place.head.submit = refuse(503)
    place.tick()
    assert (place.job().state, place.job().reason) == (
        "starting",
        "could not be submitted (http://head:8265: no); again in 5 s",
    )
    del place.head.submit
    place.tick(after_s=4.5)
    assert place.head.jobs == {}
    place.tick()
    assert (place.job().state, list(place.head.jobs)) == ("running", ["night-ab12-1"])


def refuse(status_code):
    def submit(*arguments, **options):
        raise Refused("http://head:8265: no", status_code)

    return submit


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (lambda: Refused("http://head:8265: Internal Server Error", 500), "Internal Server Error; trying again"),
        (lambda: KeyError("status"), "KeyError: 'status'"),
    ],
)
def test_the_trouble_of_one_job_and_cluster_is_told_once_and_leaves_the_others_served(running, trouble, told):
    running.submit("day-cd34")
    running.submit("day-ef56", cluster=OTHER)
    running.head.trouble = trouble
    for _ in range(3):
        running.tick()
    assert running.states == ["running", "queued", "running"]
    assert Counter(told in line for line in running.said if line.startswith("night-ab12: "))[True] == 1
    running.head.trouble = None
    running.head.jobs["night-ab12-1"] = ray_job("SUCCEEDED", 0)
    running.tick()
    running.tick()
    assert running.states == ["succeeded", "running", "running"]


def test_a_cluster_that_cannot_even_be_connected_to_leaves_the_others_served(place):
    place.submit("day-cd34")
    place.submit("day-ef56", cluster=OTHER)
    place.head.trouble = lambda: Refused("http://head:8265: Bad Gateway", 502)
    place.tick()
    assert place.states == ["queued", "running"]
    assert "day-cd34 waits: http://head:8265: Bad Gateway" in place.said


def test_a_terminal_that_takes_no_more_lines_does_not_end_the_controller(place):
    def say(line):
        raise OSError(28, "No space left on device")

    place.controller = Controller(place.store, place.home, say, lambda address, token: place.head.connect())
    place.submit()
    place.tick()
    assert place.job().state == "running"


class FailingStore(JobStore):
    """A database that is locked at one access: that of number `fails_at` from now on."""

    fails_at = 0

    @contextlib.contextmanager
    def _explained(self):
        with super()._explained():
            self.fails_at -= 1
            if self.fails_at == 0:
                raise sqlite3.OperationalError("database is locked")
            yield


def much_to_do(home, wheels, fails_at):
    """Rounds in the first of which the database fails once.

    Returns: states by the run's name, what was stopped, accesses to the database in the first round, failures told.
    """
    home.mkdir()
    (home / "wheels").symlink_to(wheels)
    store = FailingStore(home / "controller.db")
    place = Place(home, store)
    place.submit("closing-ab12", stop_at_s=EVENING_S)
    place.submit("ending-ab12", cluster=OTHER)
    place.tick()
    place.submit("new-ab12", cluster=OTHER)
    place.add_schedule(cluster=OTHER, slots=2)
    place.other.jobs["ending-ab12-1"] = ray_job("FAILED", 137)
    place.head.jobs["closing-ab12-0"] = ray_job("RUNNING")
    place.start_controller()
    store.fails_at = fails_at
    place.tick(after_s=60)
    accesses = fails_at - store.fails_at
    for _ in range(3):
        place.tick()
    trouble = [line for line in place.said if line.endswith("database is locked; trying again")]
    assert all(f"{store.path}: the database of jobs cannot be used: " in line for line in trouble)
    store.close()
    states = {job.id.rpartition("-")[0]: job.state for job in JobStore(home / "controller.db").jobs().values()}
    return states, set(place.head.stops), accesses, len(trouble)


def test_a_database_that_fails_once_wherever_that_is_ends_nothing_and_the_rounds_after_make_up_for_it(tmp_path, wheels):
    wanted = {"closing": "stopping", "ending": "queued", "new": "running", "night": "queued"}
    wanted_stops = {"closing-ab12-0", "closing-ab12-1"}
    states, stops, accesses, told = much_to_do(tmp_path / "undisturbed", wheels, fails_at=1_000_000)
    assert (states, stops, told) == (wanted, wanted_stops, 0)
    assert accesses > 20
    for fails_at in range(1, accesses + 1):
        states, stops, _, told = much_to_do(tmp_path / f"{fails_at}", wheels, fails_at)
        assert (fails_at, states, stops, told) == (fails_at, wanted, wanted_stops, 1)


def test_a_database_that_fails_at_the_end_hides_the_jobs_at_work_and_nothing_else(tmp_path):
    store = FailingStore(tmp_path / "controller.db")
    place = Place(tmp_path, store)
    store.fails_at = 1
    assert place.controller.at_work() == []
    assert place.said == [f"jobs: {store.path}: the database of jobs cannot be used: database is locked; trying again"]


@pytest.fixture
def abandoned(running):
    """The job was cancelled twice while its cluster was lost, and its driver trains on there."""
    running.head.silent = True
    running.tick()
    running.tick(after_s=11)
    running.cancel()
    running.tick()
    running.cancel()
    running.tick()
    assert (running.states, running.controller.at_work()) == (["cancelled"], [])
    return running


@pytest.mark.parametrize("restarted", [False, True])
def test_a_driver_that_outlived_the_job_is_stopped_once_its_cluster_answers_again(abandoned, restarted):
    if restarted:
        abandoned.start_controller()
    abandoned.tick(after_s=5)
    assert (abandoned.job().abandoned, abandoned.head.stops) == (True, [])
    abandoned.head.silent = False
    abandoned.tick(after_s=5)
    assert (abandoned.job().abandoned, abandoned.head.stops) == (False, ["night-ab12-1"])
    assert "night-ab12-1 lives although no job waits for it; stopping it" in abandoned.said
    abandoned.head.connections = 0
    abandoned.tick()
    assert (abandoned.states, abandoned.head.connections) == (["cancelled"], 0)


def test_a_job_that_is_tried_again_starts_after_the_driver_that_it_left_behind_was_stopped(abandoned):
    abandoned.store.apply(RetryAsked(job_id="night-ab12", time_s=abandoned.now_s))
    abandoned.head.silent = False
    abandoned.head.stop = lambda name: abandoned.head.stops.append((name, list(abandoned.head.jobs)))
    abandoned.tick(after_s=5)
    assert abandoned.head.stops == [("night-ab12-1", ["night-ab12-1"])]
    assert (abandoned.job().state, abandoned.job().submission_id) == ("running", "night-ab12-2")
    abandoned.tick(after_s=5)
    assert [name for name, _ in abandoned.head.stops] == ["night-ab12-1", "night-ab12-1"]
    abandoned.head.jobs["night-ab12-1"] = ray_job("STOPPED")
    abandoned.tick(after_s=5)
    abandoned.head.jobs["night-ab12-1"] = ray_job("RUNNING")  # nobody looks any more
    abandoned.tick(after_s=5)
    assert len(abandoned.head.stops) == 2


def test_nothing_starts_on_a_cluster_that_has_not_said_what_lives_there(abandoned):
    abandoned.store.apply(RetryAsked(job_id="night-ab12", time_s=abandoned.now_s))
    abandoned.head.silent, abandoned.head.connect = False, lambda: abandoned.head
    abandoned.head.trouble = lambda: Refused("http://head:8265: Internal Server Error", 500)
    abandoned.tick(after_s=5)
    assert (abandoned.states, abandoned.head.stops) == (["queued"], [])
    abandoned.head.trouble = None
    abandoned.tick()
    assert (abandoned.states, abandoned.head.stops) == (["running"], ["night-ab12-1"])


def test_only_what_is_ours_and_over_is_stopped_when_a_controller_starts(running):
    running.head.jobs |= {
        "raysubmit_x7f2": ray_job("RUNNING"),
        "night-ab12-0": ray_job("PENDING"),
        "other-ab12-1": ray_job("RUNNING"),
    }
    running.start_controller()
    running.tick()
    assert (running.states, running.head.stops) == (["running"], ["night-ab12-0"])


def journal(run, attempt, time_s, *, action="stop"):
    decision = {"action": action, "reason": "the loss is not finite"}
    record = {"event": "ended", "time_s": time_s, "attempt": attempt, "cause": "bad_numbers", "reason": "nan"}
    written = Journal(run.at("journal"), incarnation=int(attempt[-1]), process=99_999)
    written.append(record | {"trace": "", "evidence": [], "decision": decision})
    written.flush()


@pytest.mark.parametrize("skew_s", [-DAY_S, 0.0, DAY_S])
def test_the_driver_s_verdict_counts_however_wrong_its_clock_is(running, skew_s):
    journal(RunDir(running.job().run_dir), "night-ab12-1", running.now_s + skew_s)
    running.head.jobs["night-ab12-1"] = ray_job("FAILED", 1)
    running.tick()
    assert (running.job().state, running.job().reason) == ("failed", "the loss is not finite")


@pytest.mark.parametrize("skew_s", [-DAY_S, 0.0, DAY_S])
def test_the_verdict_of_another_attempt_is_never_taken_for_this_one_s(running, skew_s):
    run = RunDir(running.job().run_dir)
    for other in ("night-ab12-0", "day-cd34-1"):
        journal(run, other, running.now_s + skew_s)
    run.finish({"steps": 60, "attempt": "night-ab12-0", "time_s": running.now_s + skew_s})
    running.head.jobs = {}
    running.tick()
    assert (running.job().state, running.job().spent) == ("queued", {"cluster_lost": 1})


def test_a_submission_that_its_cluster_forgot_has_succeeded_if_the_run_directory_names_it(running):
    run = RunDir(running.job().run_dir)
    run.finish({"steps": 60, "attempt": "night-ab12-1", "time_s": running.now_s - DAY_S})
    running.head.jobs = {}
    running.tick()
    assert running.job().state == "succeeded"
