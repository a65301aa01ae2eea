import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.model import decode, sample, step, transformer
from openmoe.model.optimizer_config import AdafactorConfig
from openmoe.model.sample import Sampling

PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8]]
EOS_ID = 1


@pytest.fixture(scope="module")
def continue_on(moe_config, mesh_of):
    """Returns continue_on(mesh shape): the ids drawn for each prompt by a model that was just initialised."""

    def run(shape, prompts=PROMPTS, num_tokens=4, **settings):
        mesh = mesh_of(*shape)
        params = step.init_state(moe_config, AdafactorConfig(), 0, mesh).params
        settings = {"sampling": Sampling(), "eos_id": EOS_ID, "seed": 1} | settings
        return sample.by_prompt(sample.stream(params, moe_config, prompts, num_tokens, mesh=mesh, **settings))

    return run


def test_tokens_are_drawn_for_each_prompt(continue_on):
    continuations = continue_on((1, 1))
    assert [len(ids) for ids in continuations] == [4, 4, 4]
    assert all(0 < token < 512 for ids in continuations for token in ids)
    assert continuations[0] != continuations[2]  # equal prompts, other draws


def test_the_same_tokens_on_another_mesh(continue_on):
    assert continue_on((1, 1)) == continue_on((2, 2))


def test_a_prompt_is_continued_the_same_whatever_its_neighbours(continue_on):
    first, second, _ = continue_on((1, 1))
    assert continue_on((1, 1), [[5, 6, 7, 8]]) == [first]
    assert continue_on((1, 1), [list(range(2, 40)), [9, 10], []])[1] == second


def test_temperature_zero_continues_as_recomputing_the_whole_row_for_each_token_does(continue_on, moe_config, mesh_of):
    found = continue_on((1, 1), num_tokens=6, sampling=Sampling(temperature=0.0))
    assert found[0] == found[2]
    mesh, config = mesh_of(1, 1), decode.ungrouped(moe_config)
    params = step.init_state(moe_config, AdafactorConfig(), 0, mesh).params
    forward = jax.jit(lambda params, batch: transformer.forward(config, mesh, params, batch, train=False).logits)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        row = [0, *prompt]
        for _ in range(6):
            input_ids = np.asarray([row + [0] * (12 - len(row))], np.int32)
            is_real = (np.arange(12) < len(row)).astype(np.int32)[None]
            logits = forward(params, {"input_ids": input_ids, "target_ids": is_real, "segment_ids": is_real})
            row.append(1 + int(np.argmax(logits[0, len(row) - 1, 1:])))
        assert continuation == row[1 + len(prompt) :]


def test_a_continuation_stops_at_eos_and_the_others_go_on(continue_on):
    drawn = continue_on((1, 1))
    end = drawn[1][2]
    assert all(end not in ids for ids in (drawn[0], drawn[2]))
    assert continue_on((1, 1), eos_id=end) == [drawn[0], drawn[1][:2], drawn[2]]


def test_nothing_more_is_computed_once_all_have_ended(moe_config, mesh_of):
    mesh, prompts = mesh_of(1, 1), [[5, 6, 7, 8]] * 3
    params = step.init_state(moe_config, AdafactorConfig(), 0, mesh).params
    settings = {"sampling": Sampling(temperature=0.0), "seed": 0, "mesh": mesh}
    [end, *_], *_ = sample.by_prompt(sample.stream(params, moe_config, prompts, 6, eos_id=EOS_ID, **settings))
    steps = list(sample.stream(params, moe_config, prompts, 6, eos_id=end, **settings))
    assert [tokens.tolist() for tokens in steps] == [[0, 0, 0]]


def test_prompts_of_any_length_in_a_bucket_share_two_compilations(continue_on):
    continue_on((1, 1), [[5] * 16, [6], []])
    before = sample._begin._cache_size(), sample._next._cache_size()
    continue_on((1, 1), [[7], [8] * 31, [9] * 5])
    assert (sample._begin._cache_size(), sample._next._cache_size()) == before


# Probabilities of ids 1 to 5; id 0, the likeliest, is never drawn.
PROBS = [0.1, 0.4, 0.2, 0.25, 0.05]


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({}, {1, 2, 3, 4, 5}),
        ({"temperature": 0.0}, {2}),
        ({"temperature": 1e-30}, {2}),
        ({"temperature": 1e-38}, {2}),  # by which float32 cannot divide
        ({"temperature": 1e-320, "top_p": 0.5}, {2}),
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {2, 3, 4}),
        ({"top_k": 99}, {1, 2, 3, 4, 5}),
        ({"top_p": 0.01}, {2}),
        ({"top_p": 0.39}, {2}),
        ({"top_p": 0.41}, {2, 4}),
        ({"top_p": 0.84}, {2, 3, 4}),
        ({"top_p": 0.86}, {1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.6}, {2}),  # of the two that are left the first has 0.4 / 0.65
        ({"temperature": 0.25, "top_p": 0.8}, {2}),  # which makes it 0.82
    ],
)
def test_filters_leave_the_likeliest_tokens(settings, drawn):
    logits = jnp.tile(jnp.log(jnp.asarray([9.0, *PROBS])), (2000, 1))
    tokens = sample.draw(logits, jax.random.split(jax.random.key(0), 2000), Sampling(**settings))
    assert set(np.asarray(tokens).tolist()) == drawn


def test_tokens_are_drawn_with_their_probabilities():
    logits = jnp.tile(jnp.log(jnp.asarray([9.0, *PROBS])), (20_000, 1))
    tokens = sample.draw(logits, jax.random.split(jax.random.key(0), 20_000), Sampling(temperature=2.0))
    wanted = np.sqrt(PROBS) / np.sqrt(PROBS).sum()
    np.testing.assert_allclose(np.bincount(tokens, minlength=6)[1:] / 20_000, wanted, atol=0.015)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be finite and not negative, got -1.0"),
        ({"temperature": float("nan")}, "temperature: must be finite and not negative, got nan"),
        ({"top_k": -1}, "top_k: must be at least 1, or 0 for all tokens; got -1"),
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: must be above 0 and at most 1, got 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("token", [0, 512])
def test_a_prompt_of_other_ids_than_tokens_is_refused(token, continue_on):
    with pytest.raises(ValueError, match=rf"prompts\[1\]: ids must be in \[1, vocab_size=512\), got {token}"):
        continue_on((1, 1), [[5], [6, token]])
