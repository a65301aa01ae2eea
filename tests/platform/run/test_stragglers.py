"""The host that holds the others up is named, and none where all wait for their devices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmoe.platform.run import stragglers
from openmoe.platform.run.stragglers import Pace, find
from openmoe.platform.train.health_watch import Stopwatch


def pace(own_s, step_s=1.0, data_wait_s=0.0):
    return Pace(101, 160, own_s, data_wait_s, step_s)


@pytest.mark.parametrize(
    ("own", "rank"),
    [
        ([0.1, 0.1, 0.8, 0.1], 2),
        ([0.1, 0.7, 0.8, 0.1], 2),  # the slowest
        ([0.1, 0.1, 0.15, 0.1], None),  # a twentieth of a step
        ([0.9, 0.9, 0.9, 0.9], None),  # all alike
        ([0.8], None),
        ([], None),
    ],
)
def test_who_takes_far_longer_over_its_own_part_is_a_straggler(own, rank):
    found = find({r: pace(own_s) for r, own_s in enumerate(own)})
    assert (found and found.rank) == rank


parts = st.integers(0, 64).map(lambda n: n / 64)


@given(st.lists(parts, min_size=2, max_size=9), parts)
def test_what_all_of_them_take_makes_no_straggler(own, common):
    found = find({r: pace(own_s) for r, own_s in enumerate(own)})
    slower = find({r: pace(own_s + common) for r, own_s in enumerate(own)})
    assert (found and found.rank) == (slower and slower.rank)


def test_a_stopwatch_gives_the_means_of_so_many_seconds_of_steps_after_the_first_which_compiles():
    now, told, beats = [0.0], [], []
    watch = Stopwatch(told.append, lambda **what: beats.append(what), every_s=10.0, clock=lambda: now[0])
    for step in range(1, 8):
        watch.begin()
        now[0] += 0.25 * step
        watch.handed_over()
        now[0] += 4.0 - 0.25 * step
        watch.end(step, data_wait_s=0.125)
    assert told == [Pace(2, 4, 0.75, 0.125, 4.0), Pace(5, 7, 1.5, 0.125, 4.0)]
    assert beats == [{"step": True}] * 7


def test_it_is_told_with_its_host():
    found = find({0: pace(0.1), 1: pace(0.8, data_wait_s=0.75)})
    assert stragglers.words(found, "slice-a-1") == (
        "rank 1 on slice-a-1 holds the others up: steps 101 to 160 took 1.00 s each, 0.80 s its own part, 0.75 s of it "
        "for rows; the others' is 0.10 s"
    )
