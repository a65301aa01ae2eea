"""Which checkpoints count, and which steps were undone, follows from the claims alone."""

from hypothesis import given
from hypothesis import strategies as st

from openmoe.platform.lineage import Acceptance, Claim, trace, valid_acceptances


def claim(incarnation, resumes):
    return Claim(incarnation=incarnation, resumes=resumes, time_s=0.0)


def accepted(number, incarnation, step):
    return Acceptance(
        number=number,
        incarnation=incarnation,
        step=step,
        next_row=4 * step,
        checkpoint=f"checkpoints/{incarnation:06d}/{step}",
        digest="d",
        ledger_head="h",
        data_id="x",
    )


def numbers(acceptances):
    return [a.number for a in acceptances]


def test_acceptances_of_one_incarnation_all_count():
    assert numbers(valid_acceptances([claim(1, 0)], [accepted(1, 1, 20), accepted(2, 1, 40)])) == [1, 2]


def test_what_a_zombie_accepts_after_the_next_claim_is_void():
    claims = [claim(1, 0), claim(2, 1)]
    late = accepted(2, 1, 40)
    assert numbers(valid_acceptances(claims, [accepted(1, 1, 20), late, accepted(3, 2, 40)])) == [1, 3]


def test_a_quarantined_checkpoint_is_passed_over_and_its_successor_takes_its_place():
    claims = [claim(1, 0), claim(2, 2), claim(3, 1)]
    acceptances = [accepted(1, 1, 20), accepted(2, 1, 40), accepted(3, 3, 40)]
    assert numbers(valid_acceptances(claims[:2], acceptances[:2], quarantined=[2])) == [1]
    assert numbers(valid_acceptances(claims, acceptances, quarantined=[2])) == [1, 3]


def test_steps_that_were_undone_drop_out_of_the_trace():
    claims = [claim(1, 0), claim(2, 1)]
    records = {1: [{"step": s, "by": 1} for s in range(1, 8)], 2: [{"step": s, "by": 2} for s in range(5, 9)]}
    line = trace(claims, [accepted(1, 1, 4)], records)
    assert [(r["step"], r["by"]) for r in line] == [(s, 1) for s in range(1, 5)] + [(s, 2) for s in range(5, 9)]


def test_a_restart_from_scratch_undoes_everything():
    records = {1: [{"step": 1, "by": 1}], 2: [{"step": 1, "by": 2}]}
    assert [r["by"] for r in trace([claim(1, 0), claim(2, 0)], [], records)] == [2]


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 11)), min_size=1, max_size=8))
def test_the_trace_of_any_history_is_every_step_once_in_order(history):
    """Each incarnation runs some steps and saves after some; the next goes on from the newest that counts."""
    claims, acceptances, records = [], [], {}
    for incarnation, (num_steps, saved_after) in enumerate(history, start=1):
        valid = valid_acceptances(claims, acceptances)
        start = valid[-1].step if valid else 0
        claims.append(claim(incarnation, valid[-1].number if valid else 0))
        records[incarnation] = [{"step": start + i} for i in range(1, num_steps + 1)]
        if 1 <= saved_after <= num_steps:
            acceptances.append(accepted(len(acceptances) + 1, incarnation, start + saved_after))
    steps = [r["step"] for r in trace(claims, acceptances, records)]
    assert steps == list(range(1, len(steps) + 1))
