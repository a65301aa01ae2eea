"""The checksum of what a step consumed: one value on the host, on a device and on any mesh, and any change shows."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.model import checksum, sharding


def batch_of(seed, *, rows=8, seq=32):
    rng = np.random.default_rng(seed)
    ids = {key: rng.integers(0, 256_384, (rows, seq), dtype=np.int32) for key in checksum.KEYS}
    return ids | {"loss_weights": rng.integers(0, 2, (rows, seq)).astype(np.float32)}


def sums(batch):
    return np.asarray(checksum.batch_checksum(batch)).tolist()


def test_it_is_the_same_for_ever():
    batch = {key: np.arange(6, dtype=np.int32).reshape(2, 3) + at for at, key in enumerate(checksum.KEYS)}
    batch["loss_weights"] = np.asarray([[0, 1, 1], [0, 0, 0.5]], np.float32)
    assert sums(batch) == [544282860, 1739664976]


on_device = jax.jit(checksum.batch_checksum)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_devices_and_host_agree(seed):
    batch = batch_of(seed)
    assert np.asarray(on_device(batch)).tolist() == sums(batch)


@pytest.mark.parametrize("shape", [(1, 8), (2, 2)])
def test_every_mesh_gives_the_same(mesh_of, shape):
    mesh, batch = mesh_of(*shape), {key: x[None] for key, x in batch_of(0).items()}
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    summed = jax.jit(checksum.batch_checksum, out_shardings=sharding.replicated(mesh))(placed)
    assert np.asarray(summed).tolist() == sums(batch)


def test_it_is_the_sum_of_the_rows():
    batch = batch_of(1)
    hashes = checksum.row_hashes(batch)
    assert (hashes.shape, hashes.dtype) == ((8, 2), np.uint32)
    assert (hashes.sum(axis=0, dtype=np.uint32) == checksum.batch_checksum(batch)).all()


def test_it_ignores_the_order_of_rows_and_how_microbatches_cut_them():
    batch = batch_of(2)
    shuffled = {key: x[[3, 1, 0, 2, 7, 6, 5, 4]].reshape(2, 4, -1) for key, x in batch.items()}
    assert sums(shuffled) == sums(batch)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(checksum.KEYS), st.integers(0, 7), st.integers(0, 31), st.integers(1, 300_000))
def test_any_changed_number_changes_both_sums(key, row, slot, change):
    batch = batch_of(3)
    before = sums(batch)
    batch[key][row, slot] += change
    after = sums(batch)
    assert after[0] != before[0]
    assert after[1] != before[1]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(checksum.KEYS[:2]), st.integers(0, 7), st.integers(0, 7), st.integers(0, 31), st.integers(0, 31))
def test_numbers_that_change_places_change_it(key, row, other_row, slot, other_slot):
    batch = batch_of(4)
    before = sums(batch)
    array = batch[key]
    here, there = array[row, slot], array[other_row, other_slot]
    array[row, slot], array[other_row, other_slot] = there, here
    assert (sums(batch) != before) == bool(here != there)
