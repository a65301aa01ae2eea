"""Bad numbers are found at the step where they are, and rows that are to blame are left out once and for all."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmoe.platform.run import lineage
from openmoe.platform.run.lineage import Acceptance, Incident, Rows
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError
from openmoe.platform.run_file.spec_sections import HealthConfig
from openmoe.platform.train import health
from openmoe.platform.train.health import Alarms, LossSpike, NonFiniteLoss, Numbers, robust_score

losses = st.lists(st.floats(0.5, 12), min_size=8, max_size=40)


@given(losses, st.floats(0.5, 12), st.randoms())
def test_a_score_does_not_depend_on_the_order_and_grows_with_the_loss(window, value, order):
    shuffled = window.copy()
    order.shuffle(shuffled)
    assert robust_score(shuffled, value) == robust_score(window, value)
    assert robust_score(window, value + 1) > robust_score(window, value)


@given(losses, st.floats(0.1, 10))
def test_a_score_is_free_of_the_unit(window, unit):
    scaled = robust_score([unit * loss for loss in window], unit * 13)
    assert scaled == pytest.approx(robust_score(window, 13), rel=1e-6)


@given(st.integers(0, 31), st.floats(10, 1e30))
def test_one_wild_loss_in_the_window_hides_no_spike(at, wild):
    window = [4 + 0.01 * (n % 7) for n in range(64)]
    window[at] = wild
    assert 60 < robust_score(window, 6.0) < 70


@pytest.mark.parametrize(
    ("window", "value", "score"),
    [
        ([3.0, 3.1, 3.2, 3.3, 3.4], 3.2, 0.0),
        ([3.0, 3.1, 3.2, 3.3, 3.4], 5.2, 2.0 / 0.14826),
        ([3.0, 3.1, 3.2, 3.3, 3.4], 1.2, -2.0 / 0.14826),
        ([4.0] * 8, 4.04, 10.0),  # equal losses: a deviation of a thousandth
    ],
)
def test_the_score_is_the_distance_from_the_median_in_robust_deviations(window, value, score):
    assert robust_score(window, value) == pytest.approx(score)


def record(step, loss, **more):
    return {"step": step, "rows": [4 * step - 4, 4 * step], "loss": loss, "total_loss": loss, **more}


def found_at(config, *losses):
    """What a run of these losses finds: (step, first row, row after the last, whether it is a spike) each."""
    numbers = Numbers(config)
    found = [numbers.add(record(step, loss)) for step, loss in enumerate(losses, 1)]
    return [(f.step, *f.rows, f.is_spike) for f in found if f]


CALM = [4.0 + 0.01 * (n % 5) for n in range(16)]
WATCHED = HealthConfig(spike_score=20.0, spike_window_steps=16)


@pytest.mark.parametrize(
    ("config", "losses", "found"),
    [
        (WATCHED, [*CALM, 4.1], []),
        (WATCHED, [*CALM, 7.0], [(17, 60, 68, True)]),
        (WATCHED, [*CALM[:15], 7.0], []),  # too few to compare with
        (WATCHED, [*CALM, 1.0], []),  # a fall is no spike
        (HealthConfig(), [*CALM, 7.0], []),
        (HealthConfig(), [*CALM, math.nan], [(17, 60, 68, False)]),
        (HealthConfig(guilty_steps_before=0), [math.inf], [(1, 0, 4, False)]),
        (HealthConfig(guilty_steps_before=3), [4.0, math.nan], [(2, 0, 8, False)]),
        (WATCHED.model_copy(update={"spike_steps": 3}), [*CALM, 7.0, 7.0, 4.0, 4.0], []),
        (WATCHED.model_copy(update={"spike_steps": 3}), [*CALM, 7.0, 7.0, 7.0], [(19, 60, 76, True)]),
        (WATCHED.model_copy(update={"guilty_steps_before": 0}), [*CALM, 7.0], [(17, 64, 68, True)]),
    ],
)
def test_bad_numbers_are_found_with_the_rows_that_are_to_blame(config, losses, found):
    assert found_at(config, *losses) == found


@given(st.lists(st.floats(3.9, 4.1), min_size=30, max_size=60), st.integers(17, 29), st.integers(0, 2**32))
def test_a_run_that_was_interrupted_finds_the_same(losses, at, seed):
    losses[random.Random(seed).randrange(17, len(losses))] = 9.0
    records = [record(step, loss) for step, loss in enumerate(losses, 1)]
    whole, parts = Numbers(WATCHED), Numbers(WATCHED)
    expected = [whole.add(each) for each in records]
    if any(expected[:at]):
        return  # that ended it
    found = [parts.add(each) for each in records[:at]]
    resumed = Numbers(WATCHED, records[:at][-health.history_steps(WATCHED) :])
    assert [*found, *(resumed.add(each) for each in records[at:])] == expected


def test_updates_in_a_row_are_skipped_up_to_the_limit_and_any_good_one_counts_anew():
    numbers = Numbers(HealthConfig(max_skips=2, guilty_steps_before=0))
    bad = [1, 1, 0, 1, 1, 1]
    found = [
        numbers.add(record(step, math.nan if is_bad else 4.0, update_skipped=float(is_bad)))
        for step, is_bad in enumerate(bad, 1)
    ]
    assert found[:5] == [None] * 5
    assert (found[5].step, found[5].rows) == (6, Rows(12, 24))
    assert str(found[5].error()) == "step 6, rows 12..23: 3 steps in a row were skipped, health.max_skips=2"


def test_updates_in_a_row_are_counted_over_restarts():
    config = HealthConfig(on_bad_numbers="skip", max_skips=2, guilty_steps_before=0)
    records = [record(step, math.nan, update_skipped=1.0) for step in range(1, 5)]
    resumed = Numbers(config, records[:3][-health.history_steps(config) :])
    assert resumed.add(records[3]).rows == Rows(4, 16)
    assert health.history_steps(HealthConfig(max_skips=2)) == 0  # nothing is read that nobody needs


def test_the_losses_of_an_earlier_stage_make_no_spike_after_a_restart():
    records = [record(step, loss) for step, loss in enumerate([*CALM, 7.0, 7.0], 1)]
    assert Numbers(WATCHED, records[1:17], stage_ends={64}).add(records[17]) is None
    assert Numbers(WATCHED, records[1:17]).add(records[17]) is not None


def test_a_finding_ends_the_incarnation_with_its_step_rows_and_score():
    [finding] = [f for f in map(Numbers(WATCHED).add, (record(n, x) for n, x in enumerate([*CALM, 7.0], 1))) if f]
    assert isinstance(finding.error(), LossSpike)
    assert str(finding.error()).startswith("step 17, rows 60..67: loss 7.000 is 201.")
    assert isinstance(Numbers(HealthConfig()).add(record(1, math.nan)).error(), NonFiniteLoss)


def test_an_alarm_is_raised_once_and_taken_back_when_it_is_over():
    alarms = Alarms(HealthConfig(alarm_steps=3, collapsed_share=0.1, least_load_entropy=0.0))
    sound, starved = [[0.25, 0.25, 0.25, 0.25]], [[0.33, 0.33, 0.33, 0.01]]
    told = []
    for step, load in enumerate([sound, starved, starved, sound, *[starved] * 5, sound, sound], 1):
        told += [(a["step"], a["alarm"], a["layer"], a["expert"], a["begins"])
                 for a in alarms.add({"step": step, "expert_load": load})]  # fmt: skip
    assert told == [(7, "expert_collapse", 0, 3, True), (10, "expert_collapse", 0, 3, False)]
    assert list(alarms.add({"step": 12})) == []  # a dense model


def test_a_layer_that_asks_for_few_experts_raises_an_alarm():
    alarms = Alarms(HealthConfig(alarm_steps=2, collapsed_share=0.0, least_load_entropy=0.3))
    load = [[0.97, 0.01, 0.01, 0.01]]
    told = [list(alarms.add({"step": step, "expert_load": load})) for step in (1, 2, 3)]
    [alarm] = told[1]
    assert told[0] == told[2] == []
    assert health.words(alarm) == ("MoE layer 0: few experts take nearly all at step 2 (entropy of the load 0.12 of 1)")


def test_a_router_that_leaves_no_token_a_choice_raises_an_alarm_though_all_experts_are_asked_alike():
    alarms = Alarms(HealthConfig(alarm_steps=2))
    even, told = [[0.25] * 4] * 2, []
    for step, entropy in enumerate([0.5, 0.01, 0.01, 0.01, 0.5], 1):
        told += alarms.add({"step": step, "expert_load": even, "router_entropy": [0.9, entropy]})
    begins, ends = map(health.words, told)
    assert begins == ("MoE layer 1: the router leaves no token a choice at step 3 (mean entropy of a token 0.01 of 1)")
    assert ends == "MoE layer 1: the router weighs experts again at step 5 (mean entropy of a token 0.50 of 1)"


def incident(incarnation, lo, hi):
    return Incident(incarnation=incarnation, step=0, rows=Rows(lo, hi), reason=f"incident {incarnation}", time_s=0.0)


@pytest.mark.parametrize(
    ("row", "spans", "hi"),
    [
        (0, [], 0),
        (8, [(1, 8, 16)], 16),
        (0, [(1, 8, 16)], 0),
        (16, [(1, 8, 16)], 16),
        (12, [(1, 8, 16)], 16),
        (8, [(1, 8, 16), (2, 16, 20)], 20),
        (8, [(2, 16, 20), (1, 8, 16)], 20),
        (8, [(1, 8, 24), (2, 12, 16)], 24),
    ],
)
def test_rows_of_incidents_are_left_out_wherever_a_run_comes_to_them(row, spans, hi):
    rows, why = lineage.rows_left_out(row, [incident(*span) for span in spans])
    assert rows == Rows(row, hi)
    assert bool(why) == (hi > row)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=4), st.integers(0, 10))
def test_the_steps_read_all_rows_but_those_once(spans, start):
    incidents = [incident(n, 4 * lo, 4 * (lo + size)) for n, (lo, size) in enumerate(spans, 1)]
    firsts = list(lineage.first_rows(4 * start, 30, 4, incidents))
    left_out = {row for i in incidents for row in range(*i.rows)}
    read = [row for first in firsts for row in range(first, first + 4)]
    assert read == [row for row in range(4 * start, 400) if row not in left_out][:120]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=4))
def test_how_far_a_run_is_counts_the_rows_that_it_left_out(spans):
    incidents = [incident(n, 4 * lo, 4 * (lo + size)) for n, (lo, size) in enumerate(spans, 1)]
    ends = [first + 4 for first in lineage.first_rows(0, 30, 4, incidents)]
    assert [lineage.row_after(step, 4, incidents) for step in range(31)] == [0, *ends]


def accepted(number, incarnation, next_row):
    return Acceptance(
        number=number, incarnation=incarnation, step=number, next_row=next_row, checkpoint="", digest="",
        ledger_head="", data_id="",
    )  # fmt: skip


def test_checkpoints_that_were_trained_on_the_rows_of_an_incident_are_barred_and_no_others():
    acceptances = [accepted(1, 1, 8), accepted(2, 1, 16), accepted(3, 2, 24), accepted(4, 3, 24)]
    assert lineage.tainted(acceptances, []) == {}
    why = "trained on rows [8, 12): incident 2"
    assert lineage.tainted(acceptances, [incident(2, 8, 12)]) == {2: why, 3: why}  # 4 has left the rows out
    assert lineage.tainted(acceptances, [incident(1, 16, 20)]) == {}
    assert list(lineage.tainted(acceptances, [incident(3, 20, 24)])) == [3, 4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["health.on_bad_numbers=rewind"], r"budgets\.bad_numbers: must be >= 1 where health\.on_bad_num"),
        (["health.on_bad_numbers=skip", "health.spike_score=9.0", "health.spike_steps=2"], None),
        (["health.on_bad_numbers=rewind", "budgets.bad_numbers=2"], None),
    ],
)
def test_settings_of_health_that_cannot_work_are_refused(overrides, message):
    if message is None:
        loaded = spec.load("quickstart", overrides)
        assert spec.spec_hash(loaded) == spec.spec_hash(spec.load("quickstart"))
        return
    with pytest.raises(SpecError, match=message):
        spec.load("quickstart", overrides)
