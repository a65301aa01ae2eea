"""The story of a job and of a run, on literal events: what a person reads."""

import time

import pytest

from openmoe.platform.jobs import story
from openmoe.platform.jobs.job_events import (
    Admitted,
    AttemptEnded,
    CancelAsked,
    ClusterFound,
    ClusterLost,
    RaySaw,
    RetryAsked,
    SubmissionAccepted,
    SubmitRefused,
    Submitted,
    WindowClosed,
)
from openmoe.platform.jobs.story import RunRecords, Sentence
from openmoe.platform.run.lineage import Claim
from openmoe.platform.run.verdict import Verdict

JOB = {"job_id": "twin-x7f2"}
SUBMITTED = Submitted(
    **JOB,
    time_s=0.0,
    name="twin",
    run_dir="/runs/twin",
    run_file="",
    cluster="local",
    cluster_file="",
    slots=1,
    budgets={"host_fault": 10, "bad_code": 0, "cluster_lost": 9},
)


def first(time_s):
    return {**JOB, "submission_id": "twin-x7f2-1", "time_s": time_s}


STARTED = (
    SUBMITTED,
    Admitted(**JOB, time_s=1.0),
    SubmissionAccepted(**first(2.0)),
    RaySaw(**first(3.0), status="PENDING"),
    RaySaw(**first(4.0), status="RUNNING"),
)
TOLD_OF_START = ["submitted: run twin for cluster local", "attempt 1 starts", "attempt 1: its driver runs"]
KILLED = Verdict(cause="host_fault", reason="the driver was killed by SIGKILL", evidence=("exit code 137",))
BUG = Verdict(cause="bad_code", reason="rank 0 raised: KeyError: 'x'", trace="Traceback ...", evidence=("rank 0",))


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ((), []),
        (
            (AttemptEnded(**first(9.0), outcome="succeeded", step=60),),
            ["attempt 1 succeeded: the job is done"],
        ),
        (
            (AttemptEnded(**first(9.0), outcome="failed", verdict=KILLED, step=40), Admitted(**JOB, time_s=14.0)),
            [
                "attempt 1 ended at step 40: host_fault 1 of 10: the driver was killed by SIGKILL; another one in 5 s",
                "attempt 2 starts",
            ],
        ),
        (
            (AttemptEnded(**first(9.0), outcome="failed", verdict=BUG, decided=True),),
            ["attempt 1 ended: the job has failed: rank 0 raised: KeyError: 'x'"],
        ),
        (
            (CancelAsked(**JOB, time_s=5.0), RaySaw(**first(6.0), status="STOPPED"), RetryAsked(**JOB, time_s=7.0)),
            [
                "attempt 1 is being stopped: on request",
                "attempt 1 is over: the job is cancelled: on request",
                "asked to try again, with fresh budgets",
            ],
        ),
        (
            (ClusterLost(**JOB, time_s=5.0), ClusterFound(**JOB, time_s=60.0)),
            [
                "its cluster does not answer; whether the run goes on there is not known",
                "its cluster answers again",
            ],
        ),
        (
            (RaySaw(**first(6.0), status="MISSING"),),
            [
                "attempt 1 ended: cluster_lost 1 of 9: the cluster that answers now does not know the submission; "
                "another one follows"
            ],
        ),
    ],
)
def test_what_a_job_went_through(events, told):
    assert [s.text for s in story.of_job([*STARTED, *events])] == TOLD_OF_START + told


def test_a_job_that_never_started():
    refused = SubmitRefused(**first(2.0), error="head is starting", retryable=True)
    assert [s.text for s in story.of_job([SUBMITTED, Admitted(**JOB, time_s=1.0), refused])][2:] == [
        "attempt 1: could not be submitted (head is starting); again in 5 s"
    ]
    [_, cancelled] = story.of_job([SUBMITTED, WindowClosed(**JOB, time_s=9.0, why="its window closed")])
    assert cancelled == Sentence(time_s=9.0, kind="end", text="cancelled before it started: its window closed")


def test_an_end_shows_its_evidence():
    end = story.of_job([*STARTED, AttemptEnded(**first(9.0), outcome="failed", verdict=KILLED, step=40)])[-1]
    assert (end.kind, end.evidence) == ("end", ("exit code 137",))


def ended(incarnation, time_s, action, reason="slice-a was preempted (ranks 0, 1)", cause="preemption"):
    decision = f"{cause} 1 of 1000: {reason}" if action == "retry" else f"budgets.{cause} is spent (0 of 0): {reason}"
    return {
        "event": "ended",
        "incarnation": incarnation,
        "time_s": time_s,
        "cause": cause,
        "reason": reason,
        "trace": "",
        "evidence": ["slice-a-0 (ranks 0) is gone, the provider's record says PREEMPTED"],
        "decision": {"action": action, "reason": decision},
    }


def accepted(incarnation, step, time_s):
    return {"event": "accepted", "incarnation": incarnation, "step": step, "number": step // 10, "time_s": time_s}


CLAIMS = (Claim(incarnation=1, resumes=0, time_s=10.0), Claim(incarnation=2, resumes=4, time_s=30.0))
EVENTS = (
    {"event": "placed", "incarnation": 1, "time_s": 11.0, "hosts": ["slice-a-0", "slice-a-1"]},
    *(accepted(1, step, 12.0 + step / 10) for step in (10, 20, 30, 40)),
    ended(1, 20.0, "retry"),
    {"event": "placed", "incarnation": 2, "time_s": 31.0, "hosts": ["slice-b-0", "slice-b-1"]},
    {"event": "restored", "incarnation": 2, "time_s": 32.0, "step": 40, "accepted": 4, "seconds": 0.1},
    accepted(2, 50, 33.0),
)


def test_what_a_run_went_through_from_its_directory_alone():
    records = RunRecords(
        claims=CLAIMS,
        starts={1: 0, 2: 40},
        events=EVENTS,
        reached={1: 43, 2: 60},
        finished={"time_s": 50.0, "steps": 60, "loss": 5.4},
    )
    assert [(s.time_s, s.kind, s.text) for s in story.of_run(records)] == [
        (10.0, "incarnation", "incarnation 1 starts from scratch on slice-a-0, slice-a-1"),
        (16.0, "checkpoint", "checkpoints accepted: steps 10 to 40 (4)"),
        (
            20.0,
            "end",
            "incarnation 1 ended at step 43: preemption: slice-a was preempted (ranks 0, 1); "
            "goes on from step 40 (3 steps undone)",
        ),
        (30.0, "incarnation", "incarnation 2 goes on from step 40 on slice-b-0, slice-b-1"),
        (33.0, "checkpoint", "checkpoint accepted: step 50"),
        (50.0, "end", "finished: 60 steps, final loss 5.400 nats"),
    ]


@pytest.mark.parametrize(
    ("event", "reached", "text"),
    [
        (ended(1, 20.0, "retry"), {}, "preemption: slice-a was preempted (ranks 0, 1); goes on from step 40"),
        (ended(1, 20.0, "retry"), {1: 41}, "goes on from step 40 (1 step undone)"),
        (ended(1, 20.0, "retry"), {1: 40}, "goes on from step 40"),
        (
            ended(1, 20.0, "stop", "rank 0 raised: KeyError", "bad_code"),
            {1: 41},
            "bad_code: rank 0 raised: KeyError; its driver gives up: budgets.bad_code is spent (0 of 0)",
        ),
    ],
)
def test_the_end_of_the_newest_incarnation_goes_on_from_what_it_saved(event, reached, text):
    events = [accepted(1, 40, 15.0), event]
    told = story.of_run(RunRecords(claims=CLAIMS[:1], starts={1: 0}, events=events, reached=reached))
    assert told[-1].text.endswith(text)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            {"saves": True, "grace_s": 26.4, "save_s": 2.6},
            "notice at step 43: saves: 26 s are left, a save takes 3 s",
        ),
        (
            {"saves": False, "grace_s": 4.0, "save_s": 12.0},
            "notice at step 43: does not save: 4 s are left, a save takes 12 s",
        ),
        (
            {"saves": True, "grace_s": 9.0, "save_s": 0.0},
            "notice at step 43: saves: 9 s are left, no save was measured yet",
        ),
    ],
)
def test_a_notice_is_told_with_what_was_made_of_it(answer, text):
    events = [{"event": "notice", "incarnation": 1, "time_s": 19.0, "step": 43, **answer}]
    told = story.of_run(RunRecords(claims=CLAIMS[:1], starts={1: 0}, events=events))
    assert told[-1].text == text


@pytest.fixture
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_lines_have_local_times_and_a_line_for_each_day(utc):
    told = [
        Sentence(time_s=1_700_000_000.0, kind="job", text="submitted"),
        Sentence(time_s=1_700_000_001.0, kind="end", text="ended", evidence=("gone", "dead")),
        Sentence(time_s=1_700_010_000.0, kind="job", text="attempt 2 starts"),
    ]
    assert story.lines(told) == [
        "2023-11-14",
        "22:13:20  submitted",
        "22:13:21  ended",
        "          gone",
        "          dead",
        "2023-11-15",
        "01:00:00  attempt 2 starts",
    ]


def test_parts_are_merged_by_time():
    one, two, three = (Sentence(time_s=t, kind="job", text=str(t)) for t in (1.0, 2.0, 3.0))
    assert story.merged([one, three], [two]) == [one, two, three]
