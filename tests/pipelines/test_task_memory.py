"""The limit on a task's memory is the kernel's."""

import sys

import pytest

from openmoe.pipelines import task_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's limit on data is Linux's")


def test_a_task_gets_the_memory_that_it_may_take_and_no_more_and_the_next_one_is_as_free_as_before():
    limit = 256 * 2**20  # other threads of this process may end, and begin
    assert len(task_memory.within(limit, bytearray)(limit // 4)) == limit // 4
    with pytest.raises(MemoryError):
        task_memory.within(limit, bytearray)(4 * limit)
    assert len(task_memory.within(None, bytearray)(4 * limit)) == 4 * limit
