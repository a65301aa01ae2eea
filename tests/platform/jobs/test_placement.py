"""First come, first served on each cluster; what blocks others, and what does not."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmoe.platform.jobs.job import ACTIVE, Job
from openmoe.platform.jobs.placement import place

NOW_S = 1000.0


def job(name, state="queued", *, slots=1, cluster="tpu", run_dir=None, at=0.0, **fields):
    return Job(
        id=name, name=name, run_dir=run_dir or f"/runs/{name}", run_file="", cluster=cluster, cluster_file="",
        slots=slots, budgets={}, submitted_s=at, changed_s=at, state=state, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("jobs", "capacity", "admitted", "waiting"),
    [
        ([], {"tpu": 2}, [], {}),
        ([job("a")], {"tpu": 1}, ["a"], {}),
        ([job("b", at=2), job("a", at=1)], {"tpu": 1}, ["a"], {"b": "needs 1 of tpu, 0 free"}),
        ([job("b", at=1), job("a", at=1)], {"tpu": 1}, ["a"], {"b": "needs 1 of tpu, 0 free"}),
        ([job("a"), job("b", cluster="gpu")], {"tpu": 1, "gpu": 1}, ["a", "b"], {}),
        # What runs, starts or stops holds its slots; what is done does not.
        ([job("r", "running"), job("a")], {"tpu": 1}, [], {"a": "needs 1 of tpu, 0 free"}),
        ([job("r", "starting"), job("a")], {"tpu": 2}, ["a"], {}),
        ([job("r", "stopping"), job("a")], {"tpu": 1}, [], {"a": "needs 1 of tpu, 0 free"}),
        ([job("r", "failed"), job("s", "succeeded"), job("t", "cancelled"), job("a")], {"tpu": 1}, ["a"], {}),
        # Slices were taken back below what is in use.
        ([job("r", "running", slots=2), job("a")], {"tpu": 1}, [], {"a": "needs 1 of tpu, 0 free"}),
        # A large job is not passed by a small one, on its own cluster.
        (
            [job("r", "running"), job("large", slots=2, at=1), job("small", at=2), job("other", cluster="gpu", at=3)],
            {"tpu": 2, "gpu": 1},
            ["other"],
            {"large": "needs 2 of tpu, 1 free", "small": "behind large"},
        ),
        # A pause blocks nobody, and is over in time.
        ([job("p", at=1, not_before_s=1005.0), job("a", at=2)], {"tpu": 1}, ["a"], {"p": "pauses for 5 s"}),
        (
            [job("p", at=1, not_before_s=1000.0), job("a", at=2)],
            {"tpu": 1},
            ["p"],
            {"a": "needs 1 of tpu, 0 free"},
        ),
        # The clock was ahead when the pause began, and has been set back.
        ([replace(job("p", at=1, not_before_s=5005.0), changed_s=5000.0)], {"tpu": 1}, ["p"], {}),
        # One job at a time in a run directory, on whatever cluster; the one that waits for it blocks nobody.
        (
            [
                job("r", "running", run_dir="gs://b/run"),
                job("same", run_dir="gs://b/run/", cluster="gpu", at=1),
                job("a", cluster="gpu", at=2),
            ],
            {"tpu": 1, "gpu": 1},
            ["a"],
            {"same": "r is at work in the same run directory"},
        ),
        (
            [job("a", run_dir="/runs/x", at=1), job("b", run_dir="/runs/x", at=2), job("c", at=3)],
            {"tpu": 2},
            ["a", "c"],
            {"b": "a is at work in the same run directory"},
        ),
        # A cluster that does not answer.
        ([job("a")], {}, [], {"a": "cluster tpu does not answer"}),
    ],
)
def test_who_starts_and_why_the_others_wait(jobs, capacity, admitted, waiting):
    placement = place(jobs, capacity, NOW_S)
    assert [event.job_id for event in placement.admitted] == admitted
    assert placement.waiting == waiting
    assert all(event.time_s == NOW_S for event in placement.admitted)


JOBS = st.lists(
    st.builds(
        lambda state, slots, cluster, place, at, pause: (state, slots, cluster, place, at, pause),
        st.sampled_from(["queued", "queued", "queued", "starting", "running", "stopping", "failed"]),
        st.integers(1, 4),
        st.sampled_from(["tpu", "gpu", "gone"]),
        st.integers(0, 8),
        st.integers(0, 20),
        st.sampled_from([0.0, 0.0, 0.0, 2000.0]),
    ),
    max_size=12,
).map(
    lambda rows: [
        job(f"j{n}", state, slots=slots, cluster=cluster, run_dir=f"/runs/{place}", at=at, not_before_s=pause)
        for n, (state, slots, cluster, place, at, pause) in enumerate(rows)
    ]
)


@given(JOBS, st.fixed_dictionaries({"tpu": st.integers(0, 6), "gpu": st.integers(0, 6)}))
def test_no_slot_is_given_twice_and_nobody_is_passed_for_ever(jobs, capacity):
    placement = place(jobs, capacity, NOW_S)
    chosen = {event.job_id for event in placement.admitted}
    by_id = {each.id: each for each in jobs}
    assert chosen | placement.waiting.keys() == {each.id for each in jobs if each.state == "queued"}
    assert chosen.isdisjoint(placement.waiting)
    before, after = Counter(), Counter()
    for each in jobs:
        before[each.cluster] += each.slots * (each.state in ACTIVE)
        after[each.cluster] += each.slots * (each.state in ACTIVE or each.id in chosen)
    for cluster in after:
        assert after[cluster] <= max(capacity.get(cluster, 0), before[cluster])
    places = Counter(each.run_dir for each in jobs if each.id in chosen)
    assert all(count == 1 for count in places.values())
    assert places.keys().isdisjoint({each.run_dir for each in jobs if each.state in ACTIVE})
    assert all(by_id[name].not_before_s <= NOW_S for name in chosen)
    for name, why in placement.waiting.items():
        if "needs" in why:  # whoever came later to this cluster waits too
            assert not {c for c in chosen if by_id[c].cluster == by_id[name].cluster and _later(by_id[c], by_id[name])}
    assert place(list(reversed(jobs)), capacity, NOW_S) == placement


def _later(one, other):
    return (one.submitted_s, one.id) > (other.submitted_s, other.id)


@given(JOBS, st.fixed_dictionaries({"tpu": st.integers(0, 6), "gpu": st.integers(0, 6)}))
def test_admitting_once_leaves_nothing_more_to_admit(jobs, capacity):
    chosen = {event.job_id for event in place(jobs, capacity, NOW_S).admitted}
    started = [replace(each, state="starting") if each.id in chosen else each for each in jobs]
    assert place(started, capacity, NOW_S).admitted == ()
