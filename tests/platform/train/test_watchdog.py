"""A process that lives but gets nowhere is ended, and says where it stood."""

import threading
import time
from types import SimpleNamespace

import pytest

from openmoe.platform.train import watchdog
from openmoe.platform.train.prefetch import Prefetch
from openmoe.platform.train.watchdog import Watchdog


def stand_still(ended):
    ended.wait(20)


def test_a_process_without_a_beat_is_ended_and_tells_where_it_stood():
    told, ended = [], threading.Event()
    with Watchdog(0.2, told.append, ended.set):
        stand_still(ended)
    assert ended.is_set()
    [stack] = told
    assert "in stand_still" in stack
    assert stack.endswith("stuck here: no step for 0.2 s")


def test_of_a_read_that_never_returns_it_tells_where_the_reader_stands():
    told, ended = [], threading.Event()

    def read_what_never_comes(number):
        ended.wait(20)

    with Watchdog(0.2, told.append, ended.set), Prefetch(read_what_never_comes, range(1)) as coming:
        coming.take()
    [stack] = told
    assert "in take" in stack
    assert "in read_what_never_comes" in stack.partition("which waits for")[2]


def test_a_process_that_cannot_tell_is_ended_all_the_same():
    def tell(stack):
        raise ConnectionError("nobody listens")

    ended = threading.Event()
    with Watchdog(0.1, tell, ended.set):
        assert ended.wait(20)


def set_clock(now, monkeypatch):
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))


def test_whoever_beats_lives_and_a_block_that_is_left_is_watched_no_more(monkeypatch):
    monkeypatch.setattr(watchdog, "CHECK_EVERY_S", 0.01)
    ended, now = threading.Event(), [0.0]
    set_clock(now, monkeypatch)
    with Watchdog(10.0, lambda stack: None, ended.set) as watching:
        for _ in range(12):
            now[0] += 6.0
            time.sleep(0.03)  # in which it is looked at
            watching.beat()
    watching._thread.join(20)
    assert not watching._thread.is_alive()
    assert not ended.is_set()


def watchdog_after(steps_s, now, monkeypatch, **patience):
    """A watchdog that was told of such steps, by a clock that is set."""
    set_clock(now, monkeypatch)
    made = Watchdog(1000.0, lambda stack: None, lambda: None, **patience)
    for step_s in steps_s:
        made.beat(step=True)
        now[0] += step_s
    made.beat(step=True)
    return made


@pytest.mark.parametrize(
    ("steps_s", "limit_s"),
    [
        ([2.0] * 10, 100.0),
        ([2.0] * 9, 1000.0),  # too few
        ([60.0, *[2.0] * 20], 100.0),  # the first one compiles
        ([0.1] * 10, 30.0),  # never below least_s
        ([60.0] * 10, 1000.0),  # never above timeout_s
        ([2.0] * 11 + [4.0] * 101, 200.0),  # the newest count
    ],
)
def test_a_step_has_as_long_as_so_many_median_steps_within_bounds(steps_s, limit_s, monkeypatch):
    made = watchdog_after(steps_s, [0.0], monkeypatch, multiple=50.0, least_s=30.0)
    assert made._limit_s == limit_s
    made.beat()  # a save, an evaluation
    assert made._limit_s == 1000.0


def test_what_is_no_step_does_not_count_as_one(monkeypatch):
    now = [0.0]
    made = watchdog_after([2.0] * 10, now, monkeypatch, multiple=50.0)
    for _ in range(200):
        made.beat()
        now[0] += 90.0
        made.beat(step=True)
    assert made._limit_s == 100.0


def test_a_step_that_takes_far_longer_than_its_like_is_ended():
    told, ended = [], threading.Event()
    with Watchdog(60.0, told.append, ended.set, multiple=20.0, least_s=0.2) as watching:
        for _ in range(watchdog.KNOWN_STEPS):
            watching.beat(step=True)
            time.sleep(0.01)
        watching.beat(step=True)
        stand_still(ended)
    assert ended.is_set()
    assert "in stand_still" in told[0]
