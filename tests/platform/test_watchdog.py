"""A process that lives but gets nowhere is ended, and says where it stood."""

import threading
import time

from openmoe.platform.prefetch import Prefetch
from openmoe.platform.watchdog import Watchdog


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


def test_whoever_beats_lives_and_a_block_that_is_left_is_watched_no_more():
    ended = threading.Event()
    with Watchdog(0.5, lambda stack: None, ended.set) as watchdog:
        for _ in range(12):
            time.sleep(0.1)
            watchdog.beat()
    assert not ended.wait(0.7)
