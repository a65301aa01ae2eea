import threading

import pytest

from openmoe.platform.train.prefetch import Prefetch


def test_results_come_in_order_and_are_read_before_they_are_asked_for():
    read = []

    def square(number):
        read.append(number)
        return number**2

    with Prefetch(square, range(3, 9)) as coming:
        taken = [coming.take()[0] for _ in range(6)]
        with pytest.raises(IndexError):
            coming.take()
    assert taken == [9, 16, 25, 36, 49, 64]
    assert read == [3, 4, 5, 6, 7, 8]


def test_no_more_than_two_are_read_ahead():
    read, third = [], threading.Event()

    def note(number):
        read.append(number)
        if len(read) == 3:
            third.set()

    with Prefetch(note, range(100)) as coming:
        assert not third.wait(0.2)
        assert read == [0, 1]
        coming.take()
        assert third.wait(10)


def test_what_a_read_raises_is_raised_by_the_step_that_needs_it():
    with Prefetch(lambda number: 1 // (2 - number), range(4)) as coming:
        assert [coming.take()[0] for _ in range(2)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            coming.take()


def test_the_wait_for_a_slow_read_is_measured_and_told(monkeypatch):
    monkeypatch.setattr("openmoe.platform.train.prefetch.TELL_EVERY_S", 0.02)
    told, release = [], threading.Event()

    def tell():
        told.append(1)
        if len(told) == 3:
            release.set()

    with Prefetch(lambda number: release.wait(10), range(1)) as coming:
        result, waited_s = coming.take(tell)
    assert result is True
    assert len(told) >= 3
    assert waited_s > 0.05
