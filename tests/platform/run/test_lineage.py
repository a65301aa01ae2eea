"""Which checkpoints count, and which steps were undone, follows from the claims alone."""

from hypothesis import given
from hypothesis import strategies as st

from openmoe.platform.run.lineage import Acceptance, Claim, Retention, kept, removable, trace, valid_acceptances


def claim(incarnation, resumes):
    return Claim(incarnation=incarnation, resumes=resumes, time_s=0.0)


def accepted(number, incarnation, step, **metrics):
    return Acceptance(
        number=number,
        incarnation=incarnation,
        step=step,
        next_row=4 * step,
        checkpoint=f"checkpoints/{incarnation:06d}/{step}",
        digest="d",
        ledger_head="h",
        data_id="x",
        metrics=metrics,
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


def test_the_newest_those_of_round_steps_and_the_best_are_kept_each_with_its_reason():
    losses = [5.0, 4.0, 4.5, float("nan"), 4.0, 6.0]
    valid = [accepted(n, 1, 10 * n, loss=loss) for n, loss in enumerate(losses, 1)]
    keep = Retention(newest=2, every_steps=25, best=1)
    assert kept(valid, keep) == {
        2: ["best loss"],
        3: ["every 25 steps"],
        5: ["newest", "every 25 steps"],
        6: ["newest"],
    }
    assert kept(valid, Retention(newest=1, best=2, metric="eval/loss")) == {6: ["newest"]}
    assert kept([], keep) == {}


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.builds(Retention, newest=st.integers(1, 3), behind_steps=st.integers(1, 100)),
)
def test_a_run_that_may_have_to_go_back_has_a_checkpoint_as_far_behind_and_few_of_them(distances, keep):
    valid, stored, step = [], set(), 0
    for distance in distances:
        step += distance
        valid.append(accepted(len(valid) + 1, 1, step))
        stored = (stored | {len(valid)}) & kept(valid, keep).keys()
        behind = {a.number for a in valid if a.step <= step - keep.behind_steps}
        assert stored & behind or not behind
        assert len(stored) <= keep.newest + 4


def test_a_leftover_of_a_dead_incarnation_goes_and_a_save_that_is_under_way_stays():
    everything = [accepted(1, 1, 20), accepted(2, 1, 40), accepted(3, 2, 40), accepted(4, 2, 60)]
    valid = valid_acceptances([claim(1, 0), claim(2, 1)], everything)
    found = ["1/20", "1/40", "1/60.orbax-checkpoint-tmp", "2/40", "2/60", "2/80.orbax-checkpoint-tmp", "2/80", "3/60"]
    found = [f"checkpoints/00000{name}" for name in found]
    gone = removable(found, valid, everything, Retention(newest=1), writer=2)
    assert gone == [found[i] for i in (0, 1, 2, 3)]


@st.composite
def histories(draw):
    """Claims, acceptances and quarantined numbers as incarnations leave them, zombies included."""
    claims, everything, quarantined = [], [], set()
    for incarnation in range(1, draw(st.integers(1, 5)) + 1):
        valid = valid_acceptances(claims, everything, quarantined)
        claims.append(claim(incarnation, valid[-1].number if valid else 0))
        for _ in range(draw(st.integers(0, 4))):
            writer = draw(st.integers(1, incarnation)) if draw(st.booleans()) else incarnation
            step, loss = draw(st.integers(1, 12)), draw(st.sampled_from([1.0, 2.0, 3.0, float("inf")]))
            everything.append(accepted(len(everything) + 1, writer, step, loss=loss))
        quarantined |= draw(st.sets(st.integers(1, len(everything) + 1), max_size=1))
    return claims, everything, quarantined


@given(histories())
def test_what_counts_is_what_no_later_claim_went_back_behind(history):
    claims, everything, quarantined = history
    wanted = [
        a.number
        for a in everything
        if a.number not in quarantined and all(a.number <= c.resumes for c in claims if c.incarnation > a.incarnation)
    ]
    assert numbers(valid_acceptances(claims, everything, quarantined)) == wanted


@given(
    histories(),
    st.builds(
        Retention,
        newest=st.integers(1, 3),
        every_steps=st.none() | st.integers(1, 4),
        best=st.integers(0, 2),
        behind_steps=st.integers(0, 5),
    ),
)
def test_whatever_happened_what_is_removed_is_never_wanted(history, keep):
    claims, everything, quarantined = history
    valid, writer = valid_acceptances(claims, everything, quarantined), claims[-1].incarnation
    being_written = f"checkpoints/{writer:06d}/99"
    found = {a.checkpoint for a in everything} | {being_written}
    gone = set(removable(found, valid, everything, keep, writer=writer))
    stays, why = {a.checkpoint for a in valid if a.checkpoint not in gone}, kept(valid, keep)
    assert being_written not in gone
    assert {a.checkpoint for a in valid if a.number in why} <= stays
    assert {a.checkpoint for a in valid[-keep.newest :]} <= stays
    losses = sorted(a.metrics["loss"] for a in valid if a.metrics["loss"] < 9)
    assert sorted(a.metrics["loss"] for a in valid if "best loss" in why.get(a.number, ())) == losses[: keep.best]
    assert gone == found - {a.checkpoint for a in valid if a.number in why} - {being_written}


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 11), st.booleans()), min_size=1, max_size=8))
def test_of_any_history_every_step_that_asks_for_it_has_one_evaluation(history):
    """After every third step, recorded before that step is accepted; what was not accepted may be lost in a kill."""
    claims, acceptances, records = [], [], {}
    for incarnation, (num_steps, saved_after, loses_the_rest) in enumerate(history, start=1):
        valid = valid_acceptances(claims, acceptances)
        start = valid[-1].step if valid else 0
        claims.append(claim(incarnation, valid[-1].number if valid else 0))
        evaluated = [{"step": step} for step in range(start + 1, start + num_steps + 1) if step % 3 == 0]
        saves = 1 <= saved_after <= num_steps
        if saves:
            acceptances.append(accepted(len(acceptances) + 1, incarnation, start + saved_after))
        if loses_the_rest and incarnation < len(history):
            kept = start + saved_after if saves else start
            evaluated = [record for record in evaluated if record["step"] <= kept]
        records[incarnation] = evaluated
    last = start + num_steps
    assert [r["step"] for r in trace(claims, acceptances, records)] == list(range(3, last + 1, 3))
