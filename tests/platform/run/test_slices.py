"""A slice that has lost a host for good is told from one whose hosts are still joining."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmoe.platform.run import slices
from openmoe.platform.run.slices import PATIENCE_S, Seen, SliceHost


def node(node_id, slice, worker_id, alive=True, topology="2x2x2", chips=4.0):
    labels = {slices.SLICE: slice, slices.WORKER_ID: worker_id, slices.TOPOLOGY: topology} if slice else {}
    return {"NodeID": node_id, "Alive": alive, "Labels": labels, "Resources": {"TPU": chips} if alive else {}}


def host(name, alive=True):
    """The host "a0.1" is the second start of worker 0 of slice-a, a slice of two."""
    return SliceHost(name, f"slice-{name[0]}", name[1], alive, num_hosts=2 if alive else 0)


def told(*moments):
    """What is broken, and what undecided, at the last of some moments: (time, hosts alive, hosts dead, in use)."""
    seen = Seen()
    for now_s, alive, dead, *in_use in moments:
        hosts = [*map(host, alive.split()), *(host(name, alive=False) for name in dead.split())]
        seen = slices.observe(seen, hosts, set(in_use), now_s)
    found = slices.broken(seen, hosts, now_s), slices.undecided(seen, hosts, now_s)
    return tuple({name: [each.node_id for each in living] for name, living in each.items()} for each in found)


def test_hosts_are_read_from_rays_table():
    table = [node("h", "", ""), node("x", "slice-a", "1"), node("y", "slice-a", "0", alive=False)]
    assert slices.hosts_of(table) == [
        SliceHost("x", "slice-a", "1", alive=True, num_hosts=2),
        SliceHost("y", "slice-a", "0", alive=False, num_hosts=0),
    ]
    assert [h.num_hosts for h in slices.hosts_of([node("x", "s", "0", topology="4x4x4", chips=4)])] == [16]
    assert [h.num_hosts for h in slices.hosts_of([node("x", "s", "0", topology="", chips=4)])] == [0]


@pytest.mark.parametrize(
    ("moments", "broken", "undecided"),
    [
        ([(0, "a0 a1 b0 b1", "")], {}, {}),
        # One of a whole slice dies: at once.
        ([(0, "a0 a1 b0 b1", ""), (1, "a0 b0 b1", "a1")], {"slice-a": ["a0"]}, {}),
        ([(0, "a0 a1 b0 b1", ""), (1, "a1 b0 b1", "a0")], {"slice-a": ["a1"]}, {}),
        ([(0, "a0 a1", ""), (1, "", "a0 a1")], {}, {}),  # nothing of it lives
        # It comes back host by host, and is left alone whatever it takes; then it is whole, and breaks again.
        ([(0, "a0 a1", ""), (1, "", "a0 a1"), (2, "a0.1", "a0 a1")], {}, {"slice-a": ["a0.1"]}),
        ([(0, "a0 a1", ""), (1, "", "a0 a1"), (2, "a0.1 a1.1", "a0 a1")], {}, {}),
        ([(0, "a0.1 a1.1", "a0 a1"), (9, "a0.1", "a0 a1 a1.1")], {"slice-a": ["a0.1"]}, {}),
        # One host alone was restarted: whole again.
        ([(0, "a0 a1", ""), (1, "a0 a1.1", "a1")], {}, {}),
        ([(0, "a0 a1", ""), (1, "a0 a1.1", "a1"), (2, "a1.1", "a1 a0")], {"slice-a": ["a1.1"]}, {}),
        # It was in use: whoever used it judges first; a slice that was in use once is like any other.
        ([(0, "a0 a1", "", "a1"), (1, "a0", "a1")], {}, {"slice-a": ["a0"]}),
        ([(0, "a0 a1", "", "a1"), (1, "a0", "a1"), (PATIENCE_S + 1, "a0", "a1")], {"slice-a": ["a0"]}, {}),
        ([(0, "a0 a1", "", "a1"), (1, "a0 a1", ""), (2, "a0", "a1")], {"slice-a": ["a0"]}, {}),
        # Found in pieces: time tells, if one of its hosts died; one that never was whole may still become so.
        ([(0, "a0", "a1"), (PATIENCE_S - 1, "a0", "a1")], {}, {"slice-a": ["a0"]}),
        ([(0, "a0", "a1"), (PATIENCE_S, "a0", "a1")], {"slice-a": ["a0"]}, {}),
        ([(0, "a0", ""), (9 * PATIENCE_S, "a0", "")], {}, {}),
        ([(0, "a0", "a0.0"), (9 * PATIENCE_S, "a0", "a0.0")], {}, {}),  # who died has been replaced
    ],
)
def test_what_is_broken_and_what_only_time_tells(moments, broken, undecided):
    assert told(*moments) == (broken, undecided)


# Moments of a cluster of two slices of two hosts: which of them are killed, and which start anew.
MOMENTS = st.lists(
    st.tuples(st.sets(st.sampled_from(("a0", "a1", "b0", "b1"))), st.booleans(), st.floats(0, 100)), max_size=12
)


@given(MOMENTS)
def test_whatever_happens_only_hosts_of_slices_in_pieces_that_had_more_are_given_up(moments):
    starts = dict.fromkeys(("a0", "a1", "b0", "b1"), 0)
    alive, dead = {place: f"{place}.0" for place in starts}, []
    seen, now_s = Seen(), 0.0
    for places, kills, took_s in [(set(), False, 0.0), *moments]:
        now_s += took_s
        for place in places:
            if kills and place in alive:
                dead.append(alive.pop(place))
            elif not kills and place not in alive:
                starts[place] += 1
                alive[place] = f"{place}.{starts[place]}"
        hosts = [*map(host, alive.values()), *(host(name, alive=False) for name in dead)]
        seen = slices.observe(seen, hosts, set(), now_s)
        broken = slices.broken(seen, hosts, now_s)
        undecided = slices.undecided(seen, hosts, now_s)
        in_pieces = {f"slice-{letter}" for letter in "ab" if len([p for p in alive if p[0] == letter]) == 1}
        assert not broken.keys() & undecided.keys()
        assert broken.keys() | undecided.keys() == in_pieces  # here all of them had two hosts once
        for name, living in broken.items():
            assert [each.node_id for each in living] == [alive[p] for p in alive if f"slice-{p[0]}" == name]
