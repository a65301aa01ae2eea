from dataclasses import replace

import jax
import numpy as np
import pytest

from openmoe.model import sample, step
from openmoe.model.config import OptimizerConfig
from openmoe.model.transformer import Transformer

PROMPTS = np.asarray([[5, 6, 7, 8], [9, 10, 11, 12], [5, 6, 7, 8]], np.int32)


@pytest.fixture(scope="module")
def continue_on(moe_config, mesh_of):
    def run(shape, **settings):
        mesh = mesh_of(*shape)
        params = step.init_state(moe_config, OptimizerConfig(), 0, mesh).params
        settings = {"num_tokens": 4, "temperature": 1.0, "seed": 1} | settings
        return sample.sample(params, moe_config, PROMPTS, mesh=mesh, **settings)

    return run


def test_prompts_are_kept_and_tokens_drawn(continue_on):
    tokens = continue_on((1, 1))
    assert tokens.shape == (3, 8)
    np.testing.assert_array_equal(tokens[:, :4], PROMPTS)
    assert ((tokens >= 0) & (tokens < 512)).all()
    assert (tokens[0] != tokens[2]).any()  # equal prompts, other draws


def test_the_same_tokens_on_another_mesh(continue_on):
    np.testing.assert_array_equal(continue_on((1, 1)), continue_on((2, 2)))


def test_temperature_zero_takes_the_likeliest_token(continue_on, moe_config, mesh_of):
    tokens = continue_on((1, 1), num_tokens=1, temperature=0.0)
    np.testing.assert_array_equal(tokens[0], tokens[2])
    mesh = mesh_of(1, 1)
    params = step.init_state(moe_config, OptimizerConfig(), 0, mesh).params
    model = Transformer(replace(moe_config, group_size=5), mesh, train=False)
    input_ids = np.pad(PROMPTS, ((0, 0), (1, 0)))
    ones = np.ones_like(input_ids)
    logits = jax.jit(model.apply)({"params": params}, input_ids, ones, ones).logits
    np.testing.assert_array_equal(tokens[:, -1], np.argmax(logits[:, -1], axis=-1))
