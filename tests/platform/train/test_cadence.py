"""How often to save: the solution by a table and by playing it through, and what a run's journal shows for it."""

import numpy as np
import pytest

from openmoe.platform.run_file import spec
from openmoe.platform.train import cadence
from openmoe.platform.train.cadence import NOTHING_SEEN, Seen
from openmoe.platform.train.pace import Pace

HOUR_S = 3600.0


@pytest.mark.parametrize(
    ("cost_s", "interruption_every_s", "interval_s"),
    [
        (0.0, 3 * HOUR_S, 0.0),
        (1.0, 3 * HOUR_S, 146.3),  # Young: 147.0
        (30.0, 3 * HOUR_S, 785.1),  # Young: 805.0
        (30.0, HOUR_S, 445.0),  # Young: 464.8
        (600.0, HOUR_S, 1697.7),  # Young: 2078.5, which is too long
        (7200.0, HOUR_S, HOUR_S),  # hopeless
    ],
)
def test_the_interval_is_daly_s(cost_s, interruption_every_s, interval_s):
    assert cadence.daly_interval_s(cost_s, interruption_every_s) == pytest.approx(interval_s, abs=0.05)


@pytest.mark.parametrize(("cost_s", "interruption_every_s"), [(30.0, 3 * HOUR_S), (2.0, 600.0), (120.0, HOUR_S)])
def test_played_through_it_takes_less_time_than_its_neighbours(cost_s, interruption_every_s):
    solved_s = cadence.daly_interval_s(cost_s, interruption_every_s)

    def time_per_trained_s(interval_s, num_intervals=20_000):
        """An interval counts when it and its save end before the next interruption; else it begins again."""
        random = np.random.default_rng(7)
        left, spent_s = num_intervals, 0.0
        while left:
            until_s = random.exponential(interruption_every_s, left)
            lost = until_s < interval_s + cost_s
            spent_s += until_s[lost].sum() + (~lost).sum() * (interval_s + cost_s)
            left = lost.sum()
        return spent_s / (num_intervals * interval_s)

    best = time_per_trained_s(solved_s)
    assert best < min(time_per_trained_s(solved_s * factor) for factor in (0.25, 0.5, 2.0, 4.0))


@pytest.mark.parametrize(
    ("seen", "every_steps", "said"),
    [
        (Seen(), 20, "every 20 steps until a save is measured (one interruption per 3 h expected)"),
        (
            Seen(stalls_s=(9.0, 1.0, 1.0), saves_s=(20.0,), step_s=2.0),
            73,
            "every 73 steps, 2.45 min (one interruption per 3 h expected, a save stalls for 1 s)",
        ),
        # Nine interruptions in six hours: (3 h + 6 h) / (1 + 9).
        (
            Seen(9, 6 * HOUR_S, (1.0,), (20.0,), 2.0),
            40,
            "every 40 steps, 1.35 min (one interruption per 0.9 h expected, a save stalls for 1 s)",
        ),
        # Never one save before the other is committed.
        (
            Seen(0, 0.0, (1.0,), (500.0, 900.0, 90.0), 2.0),
            250,
            "every 250 steps, 8.35 min (one interruption per 3 h expected, a save stalls for 1 s)",
        ),
        # A step is longer than the best interval.
        (
            Seen(0, 0.0, (0.001,), (0.1,), 60.0),
            1,
            "every 1 steps, 1 min (one interruption per 3 h expected, a save stalls for 0.001 s)",
        ),
    ],
)
def test_the_prior_rules_until_the_run_has_shown_better(seen, every_steps, said):
    solved = cadence.solve(seen, 3 * HOUR_S)
    assert solved.every_steps == every_steps
    assert str(solved) == said


def event(incarnation, kind, time_s, process=0, **facts):
    return {"event": kind, "incarnation": incarnation, "process": process, "time_s": time_s, **facts}


def saved(incarnation, step, time_s, stall_s, seconds):
    yield event(incarnation, "save_started", time_s, step=step, stall_s=stall_s)
    yield event(incarnation, "save_started", time_s, process=1, step=step, stall_s=99.0)
    yield event(incarnation, "accepted", time_s + seconds, step=step, seconds=seconds)


def test_a_journal_shows_interruptions_time_trained_and_what_saves_and_steps_take():
    driver = 99_999
    events = [
        event(1, "started", 1000.0, steps=500),
        *saved(1, 20, 1100.0, 4.0, 10.0),
        event(1, "ended", 1400.0, process=driver, cause="preemption"),
        event(2, "started", 2000.0, steps=500),
        *saved(2, 40, 2100.0, 2.0, 11.0),
        *saved(2, 60, 2162.0, 2.0, 12.0),  # 60 s for 20 steps, and 2 s for the save
        event(2, "raised", 2300.0),  # and its driver died: an interruption that nobody has judged
        event(3, "started", 3000.0, steps=500),
        event(3, "ended", 3100.0, process=driver, cause="operator"),
        event(4, "started", 4000.0, steps=80),
        *saved(4, 80, 4090.0, 2.0, 10.0),  # done; then the run was made longer
        event(5, "started", 5000.0, steps=500),
    ]
    assert cadence.seen_in(events) == Seen(
        interruptions=2,
        trained_s=400.0 + 300.0 + 100.0 + 100.0,
        stalls_s=(4.0, 2.0, 2.0, 2.0),
        saves_s=(10.0, 11.0, 12.0, 10.0),
        step_s=3.0,
    )
    assert cadence.seen_in([]) == NOTHING_SEEN


class Told:
    """Keeps what a recorder is told."""

    def __init__(self):
        self.events = []

    def event(self, kind, **facts):
        self.events.append((kind, facts["step"], facts["every_steps"]))


def pace(every, seen=NOTHING_SEEN):
    told = Told()
    made = Pace(spec.load("quickstart", [f"train.checkpoint_every_steps={every}"]), seen, told)
    made.begin(30)
    return made, told


def test_a_fixed_cadence_is_kept_whatever_was_seen():
    fixed, told = pace(20, Seen(5, 100.0, (1.0,), (1.0,), 1.0))
    fixed.saved(40, stall_s=1.0)
    assert [step for step in range(31, 101) if fixed.is_due(step)] == [40, 60, 80, 100]
    assert told.events == []


def test_a_solved_cadence_is_counted_from_the_newest_save_and_told_when_it_changes():
    solved, told = pace("auto")
    assert [step for step in range(31, 101) if solved.is_due(step)] == [50, 100]
    solved.saved(50, stall_s=0.1)
    assert [step for step in range(51, 101) if solved.is_due(step)] == [70, 100]
    solved.saved(70, stall_s=1e-9)  # 20 steps in no time: the interval is far beyond the end
    assert [step for step in range(71, 101) if solved.is_due(step)] == [100]
    assert [kind for kind, _, _ in told.events] == ["cadence", "cadence"]
    assert [step for _, step, _ in told.events] == [30, 70]
