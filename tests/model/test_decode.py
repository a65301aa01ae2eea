"""Decoding with a cache against computing whole rows anew."""

import functools
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import traverse_util

from openmoe.model import decode, step, transformer
from openmoe.model.optimizer_config import AdafactorConfig

NUM_STEPS = 4
PROMPT_LENS = np.asarray([4, 1, 8, 6], np.int32)  # BOS included
ROWS = np.pad(np.random.default_rng(0).integers(1, 512, (4, 8 + NUM_STEPS), dtype=np.int32), ((0, 0), (1, 0)))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def computed_anew(config, mesh, params, input_ids):
    """Logits [b, t, v] and how many choices each MoE layer kept."""
    ones = np.ones_like(input_ids)
    batch = {"input_ids": input_ids, "target_ids": ones, "segment_ids": ones}
    output = jax.jit(lambda params, batch: transformer.forward(config, mesh, params, batch, train=False))(params, batch)
    return np.asarray(output.logits), [float(layer.statistics.kept.mean()) for layer in output.moe]


@functools.cache
def extend_of(config, mesh):
    return jax.jit(functools.partial(decode.extend, config, mesh))


def decoded(config, mesh, params, rows=ROWS, prompt_lens=PROMPT_LENS):
    """Logits [b, 1 + NUM_STEPS, v]: after each prompt, then after each of the row's next tokens."""
    extend = extend_of(config, mesh)
    num_compiled = extend._cache_size()
    cache = decode.empty_cache(config, mesh, len(rows), rows.shape[1])
    prompts = np.where(np.arange(8) < prompt_lens[:, None], rows[:, :8], 0)
    logits, cache = extend(params, cache, prompts, np.zeros_like(prompt_lens), prompt_lens)
    found = [logits]
    for i in range(NUM_STEPS):
        position = prompt_lens + i
        token = rows[np.arange(len(rows)), position][:, None]
        logits, cache = extend(params, cache, token, position, np.ones_like(position))
        found.append(logits)
    assert extend._cache_size() <= num_compiled + 2  # one compilation for the prompts, one for all steps
    return np.stack(found, axis=1)


def at_the_same_positions(logits):
    read = PROMPT_LENS[:, None] - 1 + np.arange(1 + NUM_STEPS)
    return np.take_along_axis(logits, read[..., None], axis=1)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [1, 1]),  # every position a group of its own, as when decoding
        ({"group_size": 13, "capacity_factor_eval": 4.0}, [1, 1]),  # a group for each row, all experts hold all of it
        ({"group_size": 52, "capacity_factor_eval": 4.0}, [1, 1]),  # the same of the whole batch
    ],
)
def test_cached_logits_equal_recomputed_ones_where_nothing_is_dropped(changes, kept, moe_config, moe_params, mesh_of):
    mesh = mesh_of(1, 1)
    wanted, found_kept = computed_anew(replace(decode.ungrouped(moe_config), **changes), mesh, moe_params, ROWS)
    assert found_kept == kept
    found = decoded(moe_config, mesh, moe_params)
    np.testing.assert_allclose(found, at_the_same_positions(wanted), atol=2e-5)
    np.testing.assert_array_equal(found.argmax(axis=-1), at_the_same_positions(wanted).argmax(axis=-1))


def test_where_something_is_dropped_recomputation_changes_what_has_been_read(moe_config, moe_params, mesh_of):
    mesh = mesh_of(1, 1)
    dropping = replace(moe_config, group_size=13, min_capacity=1, capacity_factor_eval=1.0)
    whole, kept = computed_anew(dropping, mesh, moe_params, ROWS)
    assert max(kept) < 1
    other_end = np.concatenate([ROWS[:, :7], np.roll(ROWS[:, 7:], 1, axis=0)], axis=1)
    other, _ = computed_anew(dropping, mesh, moe_params, other_end)
    assert np.abs(whole[:, :7] - other[:, :7]).max() > 0.01  # the past, under another future
    ungrouped = decode.ungrouped(moe_config)
    whole, other = (computed_anew(ungrouped, mesh, moe_params, rows)[0] for rows in (ROWS, other_end))
    np.testing.assert_array_equal(whole[:, :7], other[:, :7])


def test_a_row_is_decoded_as_if_it_were_alone(moe_config, moe_params, mesh_of):
    together = decoded(moe_config, mesh_of(1, 1), moe_params)
    for row in range(4):
        alone = decoded(moe_config, mesh_of(1, 1), moe_params, ROWS[[row]], PROMPT_LENS[[row]])
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5)


def test_a_dense_model_too(dense_config, mesh_of):
    mesh = mesh_of(1, 1)
    params = step.init_state(dense_config, AdafactorConfig(), 0, mesh).params
    wanted, _ = computed_anew(replace(dense_config, group_size=1), mesh, params, ROWS)
    np.testing.assert_allclose(decoded(dense_config, mesh, params), at_the_same_positions(wanted), atol=2e-5)


def test_bfloat16_differs_by_its_rounding_only(moe_config, moe_params, mesh_of):
    config, mesh = replace(moe_config, dtype="bfloat16"), mesh_of(1, 1)
    wanted, _ = computed_anew(decode.ungrouped(config), mesh, moe_params, ROWS)
    error = np.abs(decoded(config, mesh, moe_params) - at_the_same_positions(wanted))
    assert np.median(error) < 0.02


def test_the_cache_lies_beside_the_parameters_under_their_names(moe_config, moe_params, mesh_of):
    cache = flat(decode.empty_cache(moe_config, mesh_of(1, 1), 2, 10))
    assert {leaf.shape for leaf in cache.values()} == {(2, 10, 4, 16)}
    assert cache.keys() == {
        f"decoder/layers_{i}/self_attention/{name}" for i in range(4) for name in ("keys", "values")
    }
    assert {name.rpartition("/")[0] for name in cache} == {
        name.removesuffix("/query/kernel") for name in flat(moe_params) if name.endswith("/query/kernel")
    }


@pytest.mark.parametrize(("shape", "exchanges"), [((4, 1), 0), ((2, 2), 4)])
def test_rows_are_decoded_where_they_lie_and_only_tokens_travel(shape, exchanges, moe_config, mesh_of):
    mesh = mesh_of(*shape)
    params = step.init_state(moe_config, AdafactorConfig(), 0, mesh).params
    cache = jax.jit(lambda: decode.empty_cache(moe_config, mesh, 4, 13))()
    ones = np.ones(4, np.int32)
    compiled = extend_of(moe_config, mesh).lower(params, cache, ones[:, None], ones, ones).compile().as_text()
    assert len(re.findall(r"= .* all-to-all\(", compiled)) == exchanges  # to the experts and back in two layers
    assert not re.search(r"(all-gather|all-reduce|collective-permute)\(", compiled)
