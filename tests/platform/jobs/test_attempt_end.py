"""Why an attempt ended, by tables: Ray's status and exit code, the driver's journal, the run directory."""

import pytest

from openmoe.platform.jobs.attempt_end import End, Judgement, driver_lines, judge
from openmoe.platform.run.verdict import Verdict

LOGS = """Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):
2026-11-24 03:14:24,099\tINFO job_manager.py:581 -- Runtime env is setting up.
Running entrypoint for job twin-x7f2-1: python -m openmoe.platform train run.yaml
{}
"""


def said(code, *lines):
    return LOGS.format(code, "\n".join(lines))


def journalled(cause, action, reason="r", trace="t"):
    decision = {"action": action, "reason": f"decided: {reason}"}
    return {
        "event": "ended",
        "cause": cause,
        "reason": reason,
        "trace": trace,
        "evidence": ["rank 0: raised: KeyError"],
        "decision": decision,
    }


def failed(code, *lines, **more):
    return End(status="FAILED", exit_code=code, message=said(code, *lines), **more)


def test_success_is_ray_s_word_or_the_run_directory_s():
    assert judge(End(status="SUCCEEDED", exit_code=0)) == Judgement(outcome="succeeded")
    assert judge(End(status="MISSING", finished=True)) == Judgement(outcome="succeeded")


@pytest.mark.parametrize(
    ("end", "cause", "reason"),
    [
        (failed(137), "host_fault", "the driver was killed by SIGKILL"),
        (failed(-9), "host_fault", "the driver was killed by SIGKILL"),
        (failed(139), "host_fault", "the driver was killed by SIGSEGV"),
        (failed(-6), "host_fault", "the driver was killed by SIGABRT"),
        (failed(128 + 99), "host_fault", "the driver was killed by signal 99"),
        (
            End(
                status="FAILED",
                message="Unexpected error: the actor died because its node has died.",
                error_type="JOB_SUPERVISOR_ACTOR_DIED",
            ),
            "host_fault",
            "the driver's host or supervisor died: Unexpected error: the actor died because its node has died.",
        ),
        (
            End(
                status="FAILED",
                message="Failed to install wheel\nNo space left",
                error_type="RUNTIME_ENV_SETUP_FAILURE",
            ),
            "unknown",
            "the driver did not start: No space left",
        ),
        (failed(1, "Traceback", "KeyError: 'x'"), "unknown", "the driver ended with exit code 1: KeyError: 'x'"),
        (failed(3), "unknown", "the driver ended with exit code 3: it printed nothing"),
        (End(status="MISSING"), "cluster_lost", "the cluster that answers now does not know the submission"),
    ],
)
def test_an_end_without_the_driver_s_own_verdict_is_judged_here_and_left_to_decide(end, cause, reason):
    judgement = judge(end)
    assert (judgement.outcome, judgement.decided) == ("failed", False)
    assert (judgement.verdict.cause, judgement.verdict.reason) == (cause, reason)


def test_bad_input_is_final_and_shows_the_driver_s_last_lines():
    judgement = judge(failed(2, "Ray: the Ray cluster", "run.yaml:3: train.stepz: unknown key; did you mean `steps`?"))
    assert (judgement.outcome, judgement.decided) == ("failed", True)
    assert judgement.verdict == Verdict(
        cause="bad_input",
        reason="run.yaml:3: train.stepz: unknown key; did you mean `steps`?",
        trace="Ray: the Ray cluster\nrun.yaml:3: train.stepz: unknown key; did you mean `steps`?",
        evidence=(
            "Ray says FAILED, exit code 2",
            "the driver's last line: run.yaml:3: train.stepz: unknown key; did you mean `steps`?",
            "no checkpoint was accepted yet",
        ),
    )


@pytest.mark.parametrize("cause", ["bad_code", "bad_numbers", "preemption", "superseded", "bad_input"])
def test_what_the_driver_decided_stands(cause):
    expected = Verdict(
        cause=cause, reason="decided: loss", trace="Traceback ...", evidence=("rank 0: raised: KeyError",)
    )
    ended = journalled(cause, "stop", "loss", "Traceback ...")
    for status in ("FAILED", "MISSING"):
        end = End(status=status, exit_code=1 if status == "FAILED" else None, ended=ended, step=40)
        assert judge(end) == Judgement(outcome="failed", verdict=expected, decided=True)


def test_a_driver_that_was_killed_after_it_decided_to_go_on_is_a_host_fault():
    judgement = judge(failed(137, ended=journalled("preemption", "retry"), step=40))
    assert (judgement.verdict.cause, judgement.decided) == ("host_fault", False)
    assert judgement.verdict.evidence == (
        "Ray says FAILED, exit code 137",
        "newest accepted checkpoint: step 40",
    )


def test_a_stop_by_somebody_else_is_the_operator_s():
    judgement = judge(End(status="STOPPED", exit_code=None, step=20))
    assert (judgement.outcome, judgement.verdict.cause) == ("stopped", "operator")
    assert judgement.verdict.reason == "stopped by somebody else, as with `ray job stop`"


def test_a_driver_that_its_machine_told_to_stop_was_lost_with_the_cluster():
    assert judge(failed(1, ended=journalled("operator", "stop"))).verdict.cause == "operator"
    lost = judge(End(status="MISSING", ended=journalled("operator", "stop")))
    assert (lost.verdict.cause, lost.decided) == ("cluster_lost", False)


def test_the_driver_s_lines_are_found_in_ray_s_message():
    message = said(1, "train: 1 of 60 steps", "", "incarnation 1 ended, stop: bad_code")
    assert driver_lines(message) == ["train: 1 of 60 steps", "incarnation 1 ended, stop: bad_code"]
    assert driver_lines("Job supervisor actor could not be scheduled") == []
