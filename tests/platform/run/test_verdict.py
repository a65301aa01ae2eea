"""Every end of a worker group gets one cause, and each cause spends only its own budget."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmoe.platform.run.verdict import (
    CAUSE_OF_KIND,
    Evidence,
    Failure,
    Host,
    Restart,
    Verdict,
    counting,
    decide,
    diagnose,
    same_end,
    spent,
)

BUDGETS = {
    "preemption": 1000, "lost_slice": 9, "host_fault": 2, "hang": 3, "out_of_memory": 1, "bad_numbers": 0,
    "bad_code": 0, "unknown": 1,
}  # fmt: skip


def failure(kind, rank=0, text="boom"):
    return Failure(rank=rank, kind=kind, text=text)


def host(worker, *ranks, alive=False, state="RUNNING", slice_name="slice-a"):
    name = f"{slice_name}-{worker}"
    return Host(name=name, slice=slice_name, ranks=ranks, alive=alive, provider_state=state)


@pytest.mark.parametrize(
    ("evidence", "cause"),
    [
        (Evidence(failures=(failure("process_died", 1),)), "host_fault"),
        (Evidence(failures=(failure("lost_peer", 0),)), "host_fault"),
        (Evidence(failures=(failure("lost_peer", 0), failure("process_died", 1))), "host_fault"),
        (Evidence(failures=(failure("lost_peer", 0), failure("raised", 1))), "bad_code"),
        (Evidence(failures=(failure("process_died", 0), failure("raised", 1))), "bad_code"),
        (Evidence(failures=(failure("raised", 0), failure("out_of_memory", 1))), "out_of_memory"),
        (Evidence(failures=(failure("bad_numbers", 0), failure("bad_numbers", 1))), "bad_numbers"),
        (Evidence(failures=(failure("bad_input", 0), failure("process_died", 1))), "bad_input"),
        (Evidence(failures=(failure("damaged_checkpoint", 0),)), "damaged_checkpoint"),
        (Evidence(failures=(failure("superseded", 0),)), "superseded"),
        (Evidence(failures=(failure("start_timeout", -1),)), "host_fault"),
        (Evidence(failures=(failure("controller", -1),)), "unknown"),
        (Evidence(preempted_ranks=(0, 1)), "preemption"),
        (
            Evidence(preempted_ranks=(1,), failures=(failure("process_died", 1), failure("lost_peer", 0))),
            "preemption",
        ),
        (Evidence(failures=(failure("process_died", 1),), hosts=(host(1, 1, state="PREEMPTED"),)), "preemption"),
        (Evidence(failures=(failure("process_died", 1),), hosts=(host(1, 1),)), "lost_slice"),
        (Evidence(failures=(failure("process_died", 1),), hosts=(host(0, 1, slice_name=""),)), "host_fault"),
        (Evidence(failures=(failure("process_died", 1),), hosts=(host(1, 1, alive=True),)), "host_fault"),
        (Evidence(failures=(failure("process_died", 0), failure("lost_peer", 2)), hosts=(host(1, 3),)), "lost_slice"),
        (Evidence(failures=(failure("start_timeout", -1),), hosts=(host(0, 0, 1),)), "lost_slice"),
        (Evidence(failures=(failure("controller", -1),), hosts=(host(0, 0),)), "lost_slice"),
        (Evidence(failures=(failure("no_storage", 0),), hosts=(host(1, 1),)), "host_fault"),
        (Evidence(failures=(failure("raised", 0),), hosts=(host(1, 1),)), "bad_code"),
        (Evidence(failures=(failure("process_died", 1),), hosts=(host(1, 1),), cluster_lost=True), "cluster_lost"),
        (Evidence(failures=(failure("start_timeout", -1),), hosts=(host(0, 0, state="PREEMPTED"),)), "preemption"),
        (Evidence(failures=(failure("controller", -1),), hosts=(host(0, 0, state="PREEMPTED"),)), "preemption"),
        (Evidence(failures=(failure("frozen", 1), failure("process_died", 0))), "host_fault"),
        (Evidence(failures=(failure("frozen", 1), failure("raised", 0))), "bad_code"),
        (Evidence(failures=(failure("frozen", 0),), preempted_ranks=(0,)), "preemption"),
        (Evidence(failures=(failure("frozen", 0),), preempted_ranks=(1,)), "host_fault"),
        (Evidence(failures=(failure("hung", 3),)), "hang"),
        (Evidence(failures=(failure("hung", 3), failure("lost_peer", 0))), "hang"),
        (Evidence(cluster_lost=True), "cluster_lost"),
        (Evidence(cluster_lost=True, failures=(failure("process_died", 0),)), "cluster_lost"),
        (Evidence(cluster_lost=True, failures=(failure("raised", 0),)), "bad_code"),
        (Evidence(operator_stop=True, failures=(failure("process_died", 1),)), "operator"),
        (Evidence(), "unknown"),
    ],
)
def test_cause_of_an_end(evidence, cause):
    assert diagnose(evidence).cause == cause


def test_a_preempted_sibling_never_hides_a_crash():
    evidence = Evidence(preempted_ranks=(1,), failures=(failure("raised", 0, "ValueError: shapes"),))
    verdict = diagnose(evidence)
    assert (verdict.cause, verdict.reason) == ("bad_code", "rank 0 raised: ValueError: shapes")


def test_a_verdict_says_what_an_error_of_ours_says_and_not_what_it_is_called():
    text = "Traceback\nopenmoe.platform.train.restore.DamagedCheckpoint: acceptance 6: is gone"
    verdict = diagnose(Evidence(failures=(failure("damaged_checkpoint", 0, text),)))
    assert verdict.reason == "the checkpoint cannot be trusted: acceptance 6: is gone"
    assert verdict.evidence == ("rank 0: damaged checkpoint: acceptance 6: is gone",)


def test_a_run_that_was_started_twice_ends_the_first_with_a_sentence_and_no_trace():
    verdict = diagnose(
        Evidence(failures=(failure("superseded", 0, "Traceback ...\nSuperseded: incarnation 1 is old"),))
    )
    assert verdict.reason == "another driver has claimed this run directory: the run was started a second time"
    assert verdict.trace == ""


def test_a_process_that_died_beside_a_preemption_is_a_host_fault():
    evidence = Evidence(preempted_ranks=(1,), failures=(failure("process_died", 0),))
    assert diagnose(evidence).cause == "host_fault"


def test_the_coordinator_s_eviction_explains_the_deaths_of_all_other_ranks():
    hosts = (host(0, 0, state="PREEMPTED"), host(0, 1, alive=True, slice_name="slice-b"))
    assert diagnose(Evidence(failures=(failure("process_died", 1),), hosts=hosts)).cause == "preemption"


def test_a_verdict_of_preemption_names_the_slice_and_the_record_it_rests_on():
    hosts = (host(0, 0, state="PREEMPTED"), host(1, 1, alive=True, state="PREEMPTED"))
    verdict = diagnose(Evidence(failures=(failure("process_died", 0, "Killed"),), hosts=hosts))
    assert verdict.reason == "slice-a was preempted (ranks 0, 1)"
    assert verdict.evidence == (
        "slice-a-0 (ranks 0) is gone, the provider's record says PREEMPTED",
        "slice-a-1 (ranks 1) still answers, the provider's record says PREEMPTED",
        "rank 0: process died: Killed",
    )


def test_a_verdict_of_a_lost_slice_names_its_hosts_and_that_the_provider_kept_them_running():
    hosts = (host(0, 0, alive=True), host(1, 1))
    verdict = diagnose(Evidence(failures=(failure("process_died", 1, "Killed"),), hosts=hosts))
    assert verdict.reason == "slice-a was lost without notice: slice-a-1 is gone (ranks 1)"
    assert verdict.evidence == (
        "slice-a-1 (ranks 1) is gone, the provider's record says RUNNING",
        "rank 1: process died: Killed",
    )


def test_of_a_frozen_worker_and_the_peers_that_gave_it_up_the_frozen_one_is_named():
    gave_up, froze = failure("process_died", 0), failure("frozen", 1, "process 7 on slice-a-1 is stopped")
    verdict = diagnose(Evidence(failures=(gave_up, froze)))
    assert verdict.reason == "rank 1 froze: process 7 on slice-a-1 is stopped"


def test_of_several_slices_each_lost_one_is_named_and_none_whose_end_was_announced():
    taken, whole = host(0, 1, state="PREEMPTED"), host(0, 6, alive=True, slice_name="slice-d")
    lost = [host(n, 2 * slices + n, slice_name=f"slice-{'abc'[slices]}") for slices in (1, 2) for n in (0, 1)]
    hosts = (taken, lost[0], replace(lost[1], alive=True), lost[2], lost[3], whole)
    verdict = diagnose(Evidence(failures=(failure("process_died", 5),), hosts=hosts, preempted_ranks=(1,)))
    assert verdict.cause == "lost_slice"
    assert verdict.reason == (
        "slice-b was lost without notice: slice-b-0 is gone (ranks 2); "
        "slice-c was lost without notice: all of it is gone (ranks 4, 5)"
    )


def test_a_machine_that_is_in_no_slice_is_named_with_the_process_that_died():
    died = failure("process_died", 1, "Killed")
    [alone] = (Host(name="10.0.0.2", slice="", ranks=(1,), alive=False),)
    assert diagnose(Evidence(failures=(died,), hosts=(alone,))).reason == (
        "the process of rank 1 died with its host 10.0.0.2"
    )


@given(
    st.lists(st.tuples(st.sampled_from(list(CAUSE_OF_KIND)), st.integers(0, 3)), min_size=1, max_size=6),
    st.randoms(),
)
def test_the_order_of_reports_never_changes_the_cause(reports, random):
    failures = [failure(kind, rank) for kind, rank in reports]
    shuffled = failures.copy()
    random.shuffle(shuffled)
    assert diagnose(Evidence(failures=tuple(failures))).cause == diagnose(Evidence(failures=tuple(shuffled))).cause


@pytest.mark.parametrize(
    ("cause", "spent", "action"),
    [
        ("host_fault", {}, "retry"),
        ("host_fault", {"host_fault": 1}, "retry"),
        ("host_fault", {"host_fault": 2}, "stop"),
        ("host_fault", {"preemption": 500}, "retry"),
        ("preemption", {"host_fault": 2}, "retry"),
        ("lost_slice", {"host_fault": 2, "preemption": 1000}, "retry"),
        ("lost_slice", {"lost_slice": 9}, "stop"),
        ("bad_code", {}, "stop"),
        ("bad_numbers", {}, "stop"),
        ("out_of_memory", {}, "retry"),
        ("damaged_checkpoint", {"damaged_checkpoint": 50}, "retry"),
        ("bad_input", {}, "stop"),
        ("superseded", {}, "stop"),
        ("operator", {}, "stop"),
    ],
)
def test_each_cause_spends_its_own_budget(cause, spent, action):
    assert decide(Verdict(cause=cause, reason=""), BUDGETS, spent).action == action


DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("restart", "step", "time_s", "counts"),
    [
        (Restart("host_fault", 40, 100.0), 40, 100.0, True),
        (Restart("host_fault", 40, 100.0), 41, 99.0 + DAY_S, True),  # further, and of this day
        (Restart("host_fault", 40, 100.0), 40, 100.0 + 90 * DAY_S, True),  # long ago, and no further
        (Restart("bad_numbers", 40, 100.0), 20, 100.0 + DAY_S, True),  # it went back
        (Restart("host_fault", 40, 100.0), 41, 100.0 + DAY_S, False),
        (Restart("host_fault", 40, 100.0), 41, 0.0, True),  # the clock was set back
    ],
)
def test_a_restart_counts_for_a_day_and_until_the_run_has_come_further(restart, step, time_s, counts):
    assert counting([restart], step, time_s) == ((restart,) if counts else ())


def starts_again(ends):
    """Which of these ends, each (cause, hours since the one before, steps gained), are followed by a restart."""
    restarts, step, time_s, again = (), 0, 0.0, []
    for cause, hours, gained in ends:
        step, time_s = step + gained, time_s + 3600 * hours
        restarts = counting(restarts, step, time_s)
        if decide(Verdict(cause=cause, reason=""), BUDGETS, spent(restarts)).action == "stop":
            break
        restarts = (*restarts, Restart(cause, step, time_s))
        again.append((cause, time_s))
    return again


def test_ninety_days_with_a_fault_each_are_no_end_and_three_faults_in_one_day_are():
    assert len(starts_again([("host_fault", 24, 50)] * 90)) == 90
    assert len(starts_again([("host_fault", 8, 50)] * 90)) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from(["host_fault", "hang", "out_of_memory"]), st.integers(0, 40), st.integers(0, 2)),
        max_size=60,
    )
)
def test_no_cause_restarts_a_run_more_often_in_a_day_than_its_budget(ends):
    again = starts_again(ends)
    for cause, now_s in again:
        assert sum(other == cause and now_s - DAY_S < at_s <= now_s for other, at_s in again) <= BUDGETS[cause]


@given(st.lists(st.tuples(st.sampled_from(["host_fault", "hang", "out_of_memory"]), st.integers(0, 999), st.just(0))))
def test_a_run_that_gets_nowhere_ends_however_slowly_it_fails(ends):
    again = [cause for cause, _ in starts_again(ends)]
    assert all(again.count(cause) <= BUDGETS[cause] for cause in again)


@pytest.mark.parametrize(
    ("last", "trace", "step", "same"),
    [
        (None, "KeyError: 3", 20, False),
        (("KeyError: 3", 20), "KeyError: 3", 20, True),
        (("KeyError: 3", 40), "KeyError: 3", 20, True),  # it fell back a checkpoint
        (("KeyError: 3", 20), "KeyError: 3", 40, False),
        (("KeyError: 3", 20), "KeyError: 4", 20, False),
        (("at 0x7f3ff265a050, pid=123", 20), "at 0x7f0af3e5a267, pid=9", 20, True),
        (("no answer of 10.0.0.3:4711", 20), "no answer of 10.0.0.9:18", 20, True),
        (("actor 0a1b2c3d4e5f607182934455 died", 20), "actor ffffffffffffffff02000000 died", 20, True),
        (("", 20), "", 20, False),  # ends that left no trace prove nothing
    ],
)
def test_two_ends_are_the_same_when_all_but_incidentals_is_and_nothing_was_gained(last, trace, step, same):
    assert same_end(last, trace, step) is same


def test_the_same_trace_without_progress_ends_the_attempt():
    verdict = Verdict(cause="unknown", reason="it ended", trace="KeyError: 3")
    decision = decide(verdict, BUDGETS, {}, same_trace_without_progress=True)
    assert decision.action == "stop"
    assert "twice without progress" in decision.reason


def test_what_a_worker_says_of_its_end_outranks_what_was_seen_of_it():
    seen = Evidence(failures=(failure("process_died", 0), failure("process_died", 1)), preempted_ranks=(0,))
    told = {1: failure("raised", 1, "ValueError: shapes")}
    assert seen.with_told({}) == seen
    assert diagnose(seen.with_told(told)).reason == "rank 1 raised: ValueError: shapes"
    assert [(f.rank, f.kind) for f in seen.with_told(told).failures] == [(1, "raised"), (0, "process_died")]
