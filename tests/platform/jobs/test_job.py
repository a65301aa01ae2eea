"""Jobs: every state with every event, literally; then random lives against a small simulated Ray."""

import itertools
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmoe.platform.jobs.job import (
    ACTIVE,
    DONE,
    InvalidTransition,
    JobError,
    needs_cluster,
    pause_s,
    pending,
    strays,
    transition,
)
from openmoe.platform.jobs.job_events import (
    Admitted,
    AttemptEnded,
    CancelAsked,
    ClusterFound,
    ClusterLost,
    Event,
    RaySaw,
    RetryAsked,
    Stop,
    SubmissionAccepted,
    Submit,
    SubmitRefused,
    Submitted,
    WindowClosed,
)
from openmoe.platform.run.verdict import Verdict

BUDGETS = {
    "preemption": 1000, "host_fault": 2, "hang": 3, "out_of_memory": 1, "bad_numbers": 0, "bad_code": 0,
    "cluster_lost": 1000, "unknown": 3,
}  # fmt: skip
SUBMITTED = Submitted(
    job_id="night-ab12",
    time_s=100.0,
    name="night",
    run_dir="/runs/night",
    run_file="name: night\n",
    cluster="local",
    cluster_file="name: local\n",
    slots=1,
    budgets=BUDGETS,
)
NOW = {"job_id": "night-ab12", "time_s": 200.0}
FIRST = {**NOW, "submission_id": "night-ab12-1"}


def fold(events):
    job = None
    for event in events:
        job, _ = transition(job, event)
    return job


def ended(cause=None, *, step=0, trace="", outcome="failed", **fields):
    verdict = Verdict(cause=cause, reason=f"it was {cause}", trace=trace) if cause else None
    return AttemptEnded(**FIRST | {"outcome": outcome, "verdict": verdict, "step": step} | fields)


ACCEPTED = SubmissionAccepted(**FIRST)
SEEN_RUNNING = RaySaw(**FIRST, status="RUNNING")
CANCEL = CancelAsked(**NOW, why="not wanted")
LOST = ClusterLost(**NOW)
STORIES = {
    "queued": [],
    "starting": [Admitted(**NOW)],
    "accepted": [Admitted(**NOW), ACCEPTED],
    "running": [Admitted(**NOW), SEEN_RUNNING],
    "lost": [Admitted(**NOW), SEEN_RUNNING, LOST],
    "stopping": [Admitted(**NOW), SEEN_RUNNING, CANCEL],
    "stopping lost": [Admitted(**NOW), SEEN_RUNNING, CANCEL, LOST],
    "succeeded": [Admitted(**NOW), RaySaw(**FIRST, status="SUCCEEDED")],
    "failed": [Admitted(**NOW), ended("bad_code")],
    "cancelled": [CANCEL],
    "abandoned": [Admitted(**NOW), SEEN_RUNNING, CANCEL, LOST, CANCEL],
}
JOBS = {name: fold([SUBMITTED, *story]) for name, story in STORIES.items()}
SECOND = {**NOW, "submission_id": "night-ab12-2"}
EVENTS = {
    "Submitted": SUBMITTED,
    "Admitted": Admitted(**NOW),
    "Accepted": ACCEPTED,
    "Refused, may retry": SubmitRefused(**FIRST, error="no answer", retryable=True),
    "Refused": SubmitRefused(**FIRST, error="no such environment", retryable=False),
    "PENDING": RaySaw(**FIRST, status="PENDING"),
    "RUNNING": SEEN_RUNNING,
    "STOPPED": RaySaw(**FIRST, status="STOPPED"),
    "SUCCEEDED": RaySaw(**FIRST, status="SUCCEEDED"),
    "FAILED": RaySaw(**FIRST, status="FAILED"),
    "MISSING": RaySaw(**FIRST, status="MISSING"),
    "Ended well": ended(outcome="succeeded"),
    "Ended preempted": ended("preemption"),
    "Ended host_fault": ended("host_fault"),
    "Ended bad_code": ended("bad_code"),
    "Ended by operator": ended("operator", outcome="stopped"),
    "Ended stopped": ended(outcome="stopped"),
    "Ended, no verdict": ended(),
    "Ended, decided": ended("host_fault", decided=True),
    "ClusterLost": LOST,
    "ClusterFound": ClusterFound(**NOW),
    "CancelAsked": CANCEL,
    "RetryAsked": RetryAsked(**NOW),
    "WindowClosed": WindowClosed(**NOW),
    "Other Accepted": SubmissionAccepted(**SECOND),
    "Other Refused": SubmitRefused(**SECOND, error="", retryable=False),
    "Other RUNNING": RaySaw(**SECOND, status="RUNNING"),
    "Other MISSING": RaySaw(**SECOND, status="MISSING"),
    "Other Ended": ended("host_fault", submission_id="night-ab12-2"),
}
# The state after; "." nothing changes, "!" impossible. A "+" before the state: it is the same, other fields change.
# After a "/" what is to be done: S Submit, X Stop.
TABLE = """
                  | queued     | starting   | accepted   | running    | lost       | stopping   | stopping lost | succeeded | failed | cancelled | abandoned
Submitted         | !          | !          | !          | !          | !          | !          | !             | !         | !      | !         | !
Admitted          | starting/S | !          | !          | !          | !          | !          | !             | !         | !      | !         | !
Accepted          | ./X        | +starting  | .          | .          | .          | ./X        | ./X           | ./X       | ./X    | ./X       | ./X
Refused, may retry| .          | +starting  | .          | .          | .          | .          | .             | .         | .      | .         | .
Refused           | .          | failed     | .          | .          | .          | cancelled  | cancelled     | .         | .      | .         | .
PENDING           | ./X        | +starting  | .          | .          | +running   | .          | +stopping     | ./X       | ./X    | ./X       | ./X
RUNNING           | ./X        | running    | running    | .          | +running   | .          | +stopping     | ./X       | ./X    | ./X       | ./X
STOPPED           | .          | .          | .          | .          | .          | cancelled  | cancelled     | .         | .      | .         | .
SUCCEEDED         | .          | succeeded  | succeeded  | succeeded  | succeeded  | succeeded  | succeeded     | .         | .      | .         | .
FAILED            | .          | .          | .          | .          | .          | cancelled  | cancelled     | .         | .      | .         | .
MISSING           | .          | .          | queued     | queued     | queued     | cancelled  | cancelled     | .         | .      | .         | .
Ended well        | .          | succeeded  | succeeded  | succeeded  | succeeded  | succeeded  | succeeded     | .         | .      | .         | .
Ended preempted   | .          | queued     | queued     | queued     | queued     | cancelled  | cancelled     | .         | .      | .         | .
Ended host_fault  | .          | queued     | queued     | queued     | queued     | cancelled  | cancelled     | .         | .      | .         | .
Ended bad_code    | .          | failed     | failed     | failed     | failed     | cancelled  | cancelled     | .         | .      | .         | .
Ended by operator | .          | cancelled  | cancelled  | cancelled  | cancelled  | cancelled  | cancelled     | .         | .      | .         | .
Ended stopped     | .          | cancelled  | cancelled  | cancelled  | cancelled  | cancelled  | cancelled     | .         | .      | .         | .
Ended, no verdict | .          | queued     | queued     | queued     | queued     | cancelled  | cancelled     | .         | .      | .         | .
Ended, decided    | .          | failed     | failed     | failed     | failed     | cancelled  | cancelled     | .         | .      | .         | .
ClusterLost       | .          | +starting  | +starting  | +running   | .          | +stopping  | .             | .         | .      | .         | .
ClusterFound      | .          | .          | .          | .          | +running   | .          | +stopping/X   | .         | .      | .         | +cancelled
CancelAsked       | cancelled  | stopping/X | stopping/X | stopping/X | stopping/X | .          | cancelled     | !         | !      | !         | !
RetryAsked        | !          | !          | !          | !          | !          | !          | !             | !         | queued | queued    | queued
WindowClosed      | cancelled  | stopping/X | stopping/X | stopping/X | stopping/X | .          | .             | .         | .      | .         | .
Other Accepted    | ./X        | ./X        | ./X        | ./X        | ./X        | ./X        | ./X           | ./X       | ./X    | ./X       | ./X
Other Refused     | .          | .          | .          | .          | .          | .          | .             | .         | .      | .         | .
Other RUNNING     | ./X        | ./X        | ./X        | ./X        | ./X        | ./X        | ./X           | ./X       | ./X    | ./X       | ./X
Other MISSING     | .          | .          | .          | .          | .          | .          | .             | .         | .      | .         | .
Other Ended       | .          | .          | .          | .          | .          | .          | .             | .         | .      | .         | .
"""  # noqa: E501


def cells():
    head, *rows = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip("\n").splitlines()]
    return {(name, state): cell for name, *row in rows for state, cell in zip(head[1:], row, strict=True)}


def outcome(job, event):
    """What happens, in the words of the table."""
    try:
        after, actions = transition(job, event)
    except InvalidTransition:
        return "!"
    state = "." if after is job else f"+{after.state}" if after.state == job.state else after.state
    wanted = getattr(event, "submission_id", after.submission_id)
    assert all((action.job_id, action.submission_id) == ("night-ab12", wanted) for action in actions)
    letters = "".join({Submit: "S", Stop: "X"}[type(action)] for action in actions)
    return f"{state}/{letters}" if letters else state


@pytest.mark.parametrize("state", JOBS)
def test_every_state_answers_every_event_as_the_table_says(state):
    wanted = {name: cell for (name, column), cell in cells().items() if column == state}
    assert {name: outcome(JOBS[state], event) for name, event in EVENTS.items()} == wanted


def test_the_table_names_every_kind_of_event():
    assert {type(event) for event in EVENTS.values()} == set(_leaves(Event))


def _leaves(kind):
    below = kind.__subclasses__()
    return itertools.chain.from_iterable(map(_leaves, below)) if below else [kind]


@pytest.mark.parametrize("name", [name for name in EVENTS if name != "Submitted"])
def test_nothing_happens_to_a_job_that_nobody_submitted(name):
    with pytest.raises(InvalidTransition, match="night-ab12: no such job; `openmoe jobs list` shows them"):
        transition(None, EVENTS[name])


def test_an_event_of_another_job_is_impossible():
    with pytest.raises(InvalidTransition):
        transition(JOBS["running"], CancelAsked(job_id="other-cd34", time_s=1.0))


def test_a_new_job_is_queued_without_an_attempt():
    job, actions = transition(None, SUBMITTED)
    assert (job.state, job.attempt, job.submitted_s, job.changed_s, actions) == ("queued", 0, 100.0, 100.0, [])


def test_every_attempt_has_a_submission_of_its_own():
    job = fold([SUBMITTED, Admitted(**NOW), ended("preemption"), Admitted(**NOW)])
    assert (job.attempt, job.submission_id, job.accepted) == (2, "night-ab12-2", False)
    assert pending(job) == [Submit(job_id="night-ab12", submission_id="night-ab12-2")]


@pytest.mark.parametrize(
    ("state", "actions"),
    [
        ("queued", []),
        ("starting", [Submit(job_id="night-ab12", submission_id="night-ab12-1")]),
        ("accepted", []),
        ("running", []),
        ("lost", []),
        ("stopping", [Stop(job_id="night-ab12", submission_id="night-ab12-1")]),
        ("stopping lost", [Stop(job_id="night-ab12", submission_id="night-ab12-1")]),
        ("succeeded", []),
        ("failed", []),
        ("cancelled", []),
        ("abandoned", []),
    ],
)
def test_what_a_crash_may_have_lost_is_done_again_under_the_same_id(state, actions):
    assert pending(JOBS[state]) == actions


def test_a_lost_cluster_flags_a_running_job_and_costs_nothing():
    job = JOBS["lost"]
    assert (job.state, job.cluster_lost, job.spent, job.reason) == ("running", True, {}, "its cluster does not answer")
    back = fold([SUBMITTED, *STORIES["lost"], ClusterFound(**NOW)])
    assert (back.state, back.cluster_lost, back.reason) == ("running", False, "its cluster answers again")
    assert fold([SUBMITTED, *STORIES["lost"], SEEN_RUNNING]) == back


def test_what_is_cancelled_twice_while_its_cluster_is_lost_is_abandoned_until_the_cluster_answers():
    job = JOBS["abandoned"]
    assert (job.state, job.abandoned) == ("cancelled", True)
    assert job.reason == "not wanted; asked again while its cluster was lost"
    assert fold([SUBMITTED, *STORIES["abandoned"], ClusterFound(**NOW)]).abandoned is False
    for later in ([RetryAsked(**NOW)], [RetryAsked(**NOW), Admitted(**NOW)]):
        again = [SUBMITTED, *STORIES["abandoned"], *later]
        assert fold(again).abandoned is True
        assert fold([*again, ClusterFound(**NOW)]).abandoned is False


@pytest.mark.parametrize(
    ("state", "alive", "found"),
    [
        ("running", {"night-ab12-1": "RUNNING"}, []),
        ("stopping", {"night-ab12-1": "RUNNING"}, []),
        ("running", {"night-ab12-0": "RUNNING", "night-ab12-1": "RUNNING"}, ["night-ab12-0"]),
        ("starting", {"night-ab12-2": "PENDING"}, ["night-ab12-2"]),
        ("cancelled", {"night-ab12-1": "PENDING"}, ["night-ab12-1"]),
        ("abandoned", {"night-ab12-1": "RUNNING"}, ["night-ab12-1"]),
        ("abandoned", {"raysubmit_x7f2": "RUNNING", "night-1": "RUNNING", "night-ab12-mine": "RUNNING"}, []),
        ("abandoned", {}, []),
    ],
)
def test_a_stray_is_a_living_submission_of_ours_that_no_job_waits_for(state, alive, found):
    seen = strays({"night-ab12": JOBS[state]}, "local", alive, 300.0)
    assert [event.submission_id for event in seen] == found
    assert all((event.status, event.time_s) == (alive[event.submission_id], 300.0) for event in seen)
    assert [transition(JOBS[state], event) for event in seen] == [
        (JOBS[state], [Stop(job_id="night-ab12", submission_id=name)]) for name in found
    ]
    assert strays({"night-ab12": JOBS[state]}, "another", alive, 300.0) == []


def test_a_submission_that_the_found_cluster_does_not_know_leads_to_a_new_attempt_at_once():
    job = fold([SUBMITTED, *STORIES["lost"], ClusterFound(**NOW), RaySaw(**FIRST, status="MISSING")])
    assert (job.state, job.spent, job.not_before_s, job.cluster_lost) == ("queued", {"cluster_lost": 1}, 0.0, False)
    assert job.reason == "cluster_lost 1 of 1000: the cluster that answers now does not know the submission"


def test_a_job_not_yet_accepted_is_sent_again_when_its_cluster_is_found():
    waiting = fold([SUBMITTED, Admitted(**NOW), EVENTS["Refused, may retry"], LOST])
    job, actions = transition(waiting, ClusterFound(**NOW))
    assert (job.not_before_s, actions) == (0.0, [Submit(job_id="night-ab12", submission_id="night-ab12-1")])


def test_a_refused_submission_waits_longer_each_time_and_keeps_its_id():
    job, waits = JOBS["starting"], []
    for _ in range(8):
        job, _ = transition(job, EVENTS["Refused, may retry"])
        waits.append(job.not_before_s - 200.0)
    assert waits == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    assert (job.submission_id, job.reason) == ("night-ab12-1", "could not be submitted (no answer); again in 300 s")


def test_what_ray_refuses_for_good_fails_with_its_words():
    job = fold([SUBMITTED, Admitted(**NOW), EVENTS["Refused"]])
    assert (job.state, job.reason, job.trace) == (
        "failed",
        "Ray refused it: no such environment",
        "no such environment",
    )


def lives(*ends):
    """A job after attempts that ended so, each of them having run."""
    events = [SUBMITTED]
    for number, end in enumerate(ends, start=1):
        this = {"submission_id": f"night-ab12-{number}"}
        events += [Admitted(**NOW), RaySaw(**NOW, **this, status="RUNNING"), replace(end, **this)]
    return fold(events)


@pytest.mark.parametrize(
    ("ends", "pause"),
    [
        ([ended("host_fault")], 5),
        ([ended("host_fault"), ended("host_fault")], 10),
        ([ended("host_fault", step=40), ended("unknown", step=40)], 10),
        ([ended("host_fault", step=40), ended("unknown", step=41)], 5),
        ([ended("host_fault"), ended("preemption"), ended("host_fault")], 10),
        ([ended("preemption")], 0),
        ([ended("host_fault"), ended("preemption")], 0),
        ([ended("cluster_lost")] * 9, 0),
        ([ended("damaged_checkpoint")] * 9, 300),
    ],
)
def test_the_pause_grows_with_faults_in_a_row_without_progress(ends, pause):
    job = lives(*ends)
    assert (job.state, max(job.not_before_s - 200.0, 0)) == ("queued", pause)


def test_pauses_double_to_five_minutes():
    assert [pause_s(n) for n in (0, 1, 2, 3, 7, 10_000)] == [0, 5, 10, 20, 300, 300]


def test_each_cause_spends_its_own_budget_and_the_spent_one_ends_the_job():
    job = lives(ended("host_fault", step=1), ended("preemption", step=2), ended("host_fault", step=3))
    assert (job.state, job.spent) == ("queued", {"host_fault": 2, "preemption": 1})
    job = lives(*[ended("host_fault", step=step) for step in (1, 2, 3)])
    assert (job.state, job.spent) == ("failed", {"host_fault": 2})
    assert job.reason == "budgets.host_fault is spent (2 of 2): it was host_fault"


def test_a_fault_is_forgotten_after_a_day_with_progress_and_no_sooner():
    a_day_apart = [ended("host_fault", step=n, time_s=200.0 + 86_400 * n, forgets=True) for n in range(9)]
    job = lives(*a_day_apart)
    assert (job.state, job.attempt, job.spent) == ("queued", 9, {"host_fault": 1})
    stuck = lives(*[replace(end, step=0) for end in a_day_apart[:3]])
    assert (stuck.state, stuck.reason) == ("failed", "budgets.host_fault is spent (2 of 2): it was host_fault")


def test_a_job_that_earlier_versions_ended_stays_ended_when_its_events_are_read_again():
    a_day_apart = [ended("host_fault", step=n, time_s=200.0 + 86_400 * n) for n in range(3)]
    assert lives(*a_day_apart).state == "failed"


def test_the_same_trace_twice_without_progress_ends_the_job_with_the_trace_shown():
    boom = ended("host_fault", step=40, trace="boom")
    job = lives(boom, boom)
    assert (job.state, job.trace) == ("failed", "boom")
    assert job.reason == "the same failure twice without progress: it was host_fault"
    assert lives(boom, replace(boom, step=41)).state == "queued"


@pytest.mark.parametrize("between", [ended("preemption", step=40), ended("unknown", step=40), ended("hang", step=41)])
def test_an_end_without_a_trace_in_between_does_not_hide_the_same_trace(between):
    boom = ended("host_fault", step=40, trace="boom")
    assert lives(boom, between, boom).state == "failed"


def test_a_trace_that_differs_in_its_addresses_only_is_the_same():
    first, second = (ended("host_fault", step=40, trace=f"boom at 0x7f{n}, pid={n}") for n in (13, 37))
    assert lives(first, second).reason == "the same failure twice without progress: it was host_fault"
    assert lives(first, replace(second, step=30)).state == "failed"
    assert lives(first, replace(second, step=41)).state == "queued"


def test_a_driver_that_decided_to_stop_is_not_started_again():
    job = lives(ended("host_fault", trace="Killed", decided=True))
    assert (job.state, job.reason, job.trace, job.spent) == ("failed", "it was host_fault", "Killed", {})


def test_a_cause_without_a_budget_is_not_retried():
    job = fold([replace(SUBMITTED, budgets={}), Admitted(**NOW), ended("host_fault")])
    assert (job.state, job.reason) == ("failed", "budgets.host_fault is spent (0 of 0): it was host_fault")


def test_a_closed_window_says_that_the_next_firing_goes_on():
    job = fold([SUBMITTED, *STORIES["running"], WindowClosed(**NOW), RaySaw(**FIRST, status="STOPPED")])
    assert (job.state, job.reason) == ("cancelled", "its window closed; the next firing goes on from the checkpoint")


def test_a_stop_asked_for_while_the_submission_was_under_way_is_repeated():
    stopping, first = transition(JOBS["starting"], CANCEL)
    after, second = transition(stopping, ACCEPTED)
    assert (after.state, after.accepted) == ("stopping", True)
    assert first == second == [Stop(job_id="night-ab12", submission_id="night-ab12-1")]


def test_a_retry_has_fresh_budgets_no_pause_and_no_window():
    job = fold([replace(SUBMITTED, stop_at_s=300.0), Admitted(**NOW), ended("bad_code", trace="boom")])
    job, actions = transition(job, RetryAsked(**NOW))
    assert (job.state, job.spent, job.last_end, job.setbacks, job.not_before_s) == ("queued", {}, None, 0, 0.0)
    assert (job.last_step, job.stop_at_s, job.trace, job.attempt, actions) == (None, None, "", 1, [])


@pytest.mark.parametrize(
    ("state", "event", "message"),
    [
        (
            "lost",
            "RetryAsked",
            "night-ab12: cannot be tried again while it is running (attempt 1): its cluster does not answer; "
            "`openmoe jobs cancel night-ab12` first",
        ),
        ("succeeded", "RetryAsked", "night-ab12: it has succeeded; to train on, submit the run with more steps"),
        ("cancelled", "CancelAsked", "night-ab12: nothing to cancel, it is cancelled: not wanted"),
        ("queued", "Submitted", "night-ab12: a job of this id was submitted before; it is queued"),
        (
            "running",
            "Admitted",
            "night-ab12: cannot happen to a job that is running (attempt 1): "
            "Admitted(job_id='night-ab12', time_s=200.0)",
        ),
    ],
)
def test_the_impossible_tells_the_story_in_one_line(state, event, message):
    with pytest.raises(InvalidTransition) as caught:
        transition(JOBS[state], EVENTS[event])
    assert str(caught.value) == message
    assert caught.value.job is JOBS[state]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("slots", 0, "slots: a job occupies at least 1, got 0"),
        ("cluster", "http://me:secret@head:8265", "cluster: http://head...: an address carries no user, password"),
        ("cluster", "https://head:8265/?token=secret", "cluster: https://head...: an address carries no user, pass"),
    ],
)
def test_a_job_carries_no_secrets_and_occupies_something(field, value, message):
    with pytest.raises(JobError) as caught:
        replace(SUBMITTED, **{field: value})
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*EVENTS.values()]), max_size=40))
def test_no_sequence_of_events_raises_anything_but_the_impossible(events):
    job = fold([SUBMITTED])
    for event in events:
        try:
            after, _ = transition(job, event)
        except InvalidTransition:
            continue
        assert after.state == "queued" or after.next == ("cancelled" if after.state == "stopping" else None)
        if job.state in DONE and not isinstance(event, RetryAsked):
            assert after.state == job.state
            assert after is job or (job.abandoned and isinstance(event, ClusterFound))
        if after.spent != job.spent and not isinstance(event, RetryAsked):
            assert isinstance(event, AttemptEnded | RaySaw)
        job = after


CAUSES = ("preemption", "host_fault", "bad_code", "hang", "cluster_lost", "unknown", "operator", None)
CRASHES = ("host_fault", "bad_code", "unknown")
ALIVE = ("PENDING", "RUNNING")


class Life:
    """One job, a controller that crashes, and a Ray whose submissions appear, end and get lost.

    The log is all that survives a crash of the controller. What it still had to do (`outbox`) and what Ray has done
    but nobody has recorded is lost. Ray is asked what controller.py asks it, and nothing else.
    """

    def __init__(self):
        self.clock_s = 100.0
        self.log, self.job = [SUBMITTED], fold([SUBMITTED])
        self.outbox = []
        self.ray, self.reachable = {}, True
        self.looked = False  # for strays, since the controller started and the cluster answers
        self.submitted = []

    def alive(self):
        return sorted(name for name, status in self.ray.items() if status in ALIVE)

    def record(self, kind, **fields):
        self.clock_s += 1.0
        event = kind(job_id=self.job.id, time_s=self.clock_s, **fields)
        before = self.job
        try:
            self.job, actions = transition(before, event)
        except InvalidTransition:
            assert kind in (Admitted, CancelAsked, RetryAsked)  # only what somebody decides can come too late
            return
        self.log.append(event)
        self.outbox += actions
        self.looked = self.looked and needs_cluster(self.job, self.clock_s)  # else the controller forgets it
        assert self.job.attempt == before.attempt + isinstance(event, Admitted)
        if before.state in DONE:
            assert self.job is before or isinstance(event, RetryAsked | ClusterFound)
        verdict = getattr(event, "verdict", None)
        if (verdict and verdict.cause in ("preemption", "cluster_lost")) or getattr(event, "status", "") == "MISSING":
            assert [self.job.spent.get(c) for c in CRASHES] == [before.spent.get(c) for c in CRASHES]
            assert self.job is before or self.job.not_before_s == 0.0

    def wait_out_the_pause(self, rng):
        self.clock_s = self.job.not_before_s + rng.choice([0.0, 86_400.0])

    def admit(self, rng):
        self.record(Admitted)

    def stop_in_ray(self, name):
        if self.reachable and self.ray.get(name) in ALIVE:
            self.ray[name] = "STOPPED"

    def perform(self, rng):
        action = self.outbox.pop(0)
        name = {"submission_id": action.submission_id}
        if isinstance(action, Stop):
            self.stop_in_ray(action.submission_id)
            return
        if action not in pending(self.job):  # cancelled since it was recorded
            return
        assert fold(self.log).submission_id == action.submission_id
        assert self.job.state == "starting"
        fate = rng.choice(["heard"] * 5 + ["refused", "cancelled meanwhile", "crash", "crash"])
        if not self.reachable:
            self.record(SubmitRefused, **name, error="no answer", retryable=True)
        elif fate == "refused" and action.submission_id not in self.ray:
            self.record(SubmitRefused, **name, error="never", retryable=False)
        else:
            self.ray.setdefault(action.submission_id, "PENDING")
            self.submitted.append(action.submission_id)
            if fate == "cancelled meanwhile":
                self.record(CancelAsked)
            if fate == "crash":
                self.crash(rng)
            else:
                self.record(SubmissionAccepted, **name)

    def crash(self, rng):
        assert fold(self.log) == self.job
        self.outbox, self.looked = pending(self.job), False

    def do_again_what_is_pending(self, rng):
        self.outbox += pending(self.job)

    def go_on(self, rng):
        self.ray[rng.choice(self.alive())] = rng.choice(["RUNNING"] * 4 + ["FAILED"] * 3 + ["SUCCEEDED", "STOPPED"])

    def look_for_strays(self, rng, crashes):
        """Returns whether the controller came to the end of it."""
        alive = {name: self.ray[name] for name in self.alive()}
        for seen in strays({self.job.id: self.job}, "local", alive, self.clock_s):
            before = len(self.outbox)
            self.record(RaySaw, submission_id=seen.submission_id, status=seen.status)
            if rng.random() < crashes / 2:
                self.crash(rng)
                return False
            for action in self.outbox[before:]:
                self.stop_in_ray(action.submission_id)
            del self.outbox[before:]
        if self.job.abandoned:
            self.record(ClusterFound)
        self.looked = needs_cluster(self.job, self.clock_s)
        return True

    def poll(self, rng, crashes=0.3):
        if (not self.looked or self.job.abandoned) and not self.look_for_strays(rng, crashes):
            return
        if self.job.state not in ACTIVE:
            return
        self.record(ClusterFound)
        name = {"submission_id": self.job.submission_id}
        status = self.ray.get(self.job.submission_id)
        if status in ALIVE:
            self.record(RaySaw, **name, status=status)
        elif (status or self.job.accepted or self.job.state == "stopping") and rng.random() >= crashes:
            self.record(AttemptEnded, **name, **self.judged(rng, status))

    def judged(self, rng, status):
        """What attempt_end.py may say of a submission that is over, or not known to Ray."""
        if status == "SUCCEEDED":
            return {"outcome": "succeeded"}
        outcome = "stopped" if status == "STOPPED" else "failed"
        cause = rng.choice(CAUSES) if status else "cluster_lost"
        trace = rng.choice(["", "boom"]) if cause not in ("preemption", "cluster_lost") else ""
        verdict = Verdict(cause=cause, reason="so", trace=trace) if cause else None
        said = {"outcome": outcome, "verdict": verdict, "step": rng.randrange(3), "forgets": True}
        return said | {"decided": rng.random() < 0.1}

    def lose_the_cluster(self, rng):
        self.reachable = self.looked = False
        self.ray = rng.choice([{}, self.ray, self.ray])
        if rng.random() < 0.7:
            self.record(ClusterLost)

    def find_the_cluster(self, rng):
        self.reachable = True

    def stop(self, rng):
        self.record(rng.choice([CancelAsked, WindowClosed]))

    def retry(self, rng):
        self.record(RetryAsked)

    def hear_late_what_was_true(self, rng):
        """What a second reader tells about an attempt that is over."""
        event = rng.choice(self.log)
        if getattr(event, "submission_id", self.job.submission_id) != self.job.submission_id:
            before = self.job
            self.record(type(event), **{k: v for k, v in vars(event).items() if k not in ("job_id", "time_s")})
            assert self.job is before

    def moves(self):
        """What can happen now, with weights."""
        return {
            self.admit: 3 * (self.job.state == "queued" and self.reachable and self.looked),
            self.wait_out_the_pause: 3 * (self.job.state == "queued" and self.job.not_before_s > self.clock_s),
            self.perform: 5 * bool(self.outbox),
            self.crash: 0.5,
            self.do_again_what_is_pending: 1 * bool(pending(self.job)),
            self.go_on: 3 * bool(self.alive()),
            self.poll: 3 * (self.reachable and needs_cluster(self.job, self.clock_s)),
            self.lose_the_cluster: (0.3 + bool(self.alive()) + 2 * (self.job.state == "stopping")) * self.reachable,
            self.find_the_cluster: 1 * (not self.reachable),
            self.stop: 0.3 * (self.job.state not in DONE) + 5 * (self.job.cluster_lost and not self.reachable),
            self.retry: 2 * (self.job.state in DONE) + 3 * self.job.abandoned + 0.1,
            self.hear_late_what_was_true: 0.5,
        }

    def check(self):
        assert all(number <= BUDGETS[cause] for cause, number in self.job.spent.items())
        if self.looked and not self.job.abandoned:
            assert self.alive() in ([], [self.job.submission_id])
            assert not self.alive() or self.job.state in ACTIVE
        assert len(self.alive()) <= 1
        numbers = [int(name.rpartition("-")[2]) for name in self.submitted]
        assert numbers == sorted(numbers)
        assert max(numbers, default=0) <= self.job.attempt

    def end(self, rng):
        """The cluster answers again, and all that is to be done is done."""
        self.crash(rng)
        self.reachable = True
        for _ in range(9 if needs_cluster(self.job, self.clock_s) else 0):
            self.poll(rng, crashes=0.0)
            self.outbox += pending(self.job)
            while self.outbox:
                self.perform(rng)
        assert not self.job.abandoned
        assert self.job.state != "stopping"
        assert self.alive() == ([self.job.submission_id] if self.job.state in ACTIVE else [])


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 2**32), min_size=30, max_size=90))
def test_lives_of_jobs_keep_their_promises(numbers):
    """Each number chooses one move, so that a life that fails shrinks to the moves that matter."""
    life = Life()
    for number in numbers:
        rng = Random(number)
        moves = life.moves()
        rng.choices(list(moves), list(moves.values()))[0](rng)
        life.check()
    life.end(Random(numbers[0]))
