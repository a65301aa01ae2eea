"""Long curves in few points: the newest exact, the extremes of the rest kept."""

import numpy as np

from openmoe.platform.dashboard import curves


def line(n, incarnation=1):
    step = np.arange(1, n + 1, dtype=float)
    return {"incarnation": np.full(n, incarnation), "step": step, "time_s": 100 + step, "y": step % 10}


def test_a_short_curve_is_exact_and_has_no_range():
    assert curves.thin(line(3), values=("y",)) == {
        "incarnation": [1, 1, 1],
        "step": [1, 2, 3],
        "time_s": [101.0, 102.0, 103.0],
        "y": {"mean": [1.0, 2.0, 3.0]},
    }


def test_nothing_is_an_empty_curve():
    assert curves.thin(line(0), values=("y",)) == {"incarnation": [], "step": [], "time_s": [], "y": {"mean": []}}


def test_a_million_steps_become_two_thousand_points_and_the_newest_are_exact():
    many = line(1_000_000)
    thin = curves.thin(many, values=("y",))
    assert 1000 <= len(thin["step"]) <= curves.MAX_POINTS + curves.NEWEST_POINTS + 2
    assert thin["step"][-500:] == list(range(999_501, 1_000_001))
    assert thin["y"]["mean"][-500:] == many["y"][-500:].tolist()


def test_a_spike_of_one_step_stays_visible_at_its_height():
    many = line(100_000)
    many["y"] = np.full(100_000, 2.0)
    many["y"][31_415], many["y"][27_182] = 1000.0, -5.0
    thin = curves.thin(many, values=("y",))
    assert (max(thin["y"]["high"]), min(thin["y"]["low"])) == (1000.0, -5.0)
    at = thin["y"]["high"].index(1000.0)
    assert thin["step"][at] - 128 < 31_416 <= thin["step"][at]
    assert thin["y"]["mean"][0] == 2.0


def test_points_never_mix_two_worker_groups():
    two = {name: np.concatenate([a, b]) for (name, a), b in zip(line(40_001).items(), line(9, 2).values(), strict=True)}
    two["step"][40_001:] += 40_001
    thin = curves.thin(two, values=("y",))
    assert thin["step"][thin["incarnation"].index(2) - 1] == 40_001


def test_points_keep_their_place_while_a_run_grows():
    short, longer = (curves.thin(line(n), values=("y",))["step"] for n in (10_000, 10_100))
    assert set(short[:-501]) <= set(longer)  # the last of the wide points may be cut where the exact ones begin


def test_what_is_not_finite_is_a_gap():
    gaps = line(4)
    gaps["y"] = np.asarray([1.0, np.nan, np.inf, 0.1234567])
    assert curves.thin(gaps, values=("y",))["y"] == {"mean": [1.0, None, None, 0.123457]}
