"""The check after a conversion: it passes equal models, and names the part in which others differ."""

import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from openmoe.model import acceptance, interop, step
from openmoe.model.config import PRESETS
from openmoe.model.interop import InMemory
from openmoe.model.optimizer_config import AdafactorConfig

EXPERT = "decoder/layers_3/mlp/expert/wi_0/kernel"
QUERY = "decoder/layers_2/self_attention/query/kernel"
KEY = "decoder/layers_2/self_attention/key/kernel"


@pytest.fixture(scope="module")
def parameters(golden):
    return {name: InMemory(array) for name, array in golden("moe_params").items()}


def by_name(params):
    return {name: InMemory(array) for name, array in traverse_util.flatten_dict(params, sep="/").items()}


def rounded(parameters):
    return {name: InMemory(parameter.array.astype(ml_dtypes.bfloat16)) for name, parameter in parameters.items()}


def changed(parameters, name, change):
    return parameters | {name: InMemory(change(parameters[name].array.copy()))}


def test_a_model_equals_itself(parameters, moe_config):
    told = []
    found = acceptance.compare(parameters, parameters, moe_config, lambda *progress: told.append(progress))
    assert (found.num_layers, found.difference) == (4, 0.0)
    assert str(found) == f"checked: 4 layers, largest difference 0.0 of {found.largest:.1f}"
    assert found.largest > 1
    assert told == [(done, 6) for done in range(1, 7)]  # embedding, layers, head


def test_dense_models_are_compared_too(dense_config, mesh_of):
    params = step.init_state(dense_config, AdafactorConfig(), 0, mesh_of(1, 1)).params
    names = by_name(params)
    assert acceptance.compare(names, names, dense_config).difference == 0.0


def test_what_was_rounded_equals_the_rounded_source(parameters, moe_config):
    assert acceptance.compare(parameters, rounded(parameters), moe_config).difference == 0.0
    widened = {name: InMemory(p.array.astype(np.float32)) for name, p in rounded(parameters).items()}
    assert acceptance.compare(rounded(parameters), widened, moe_config).difference == 0.0


def swap_experts(array):
    array[[0, 1]] = array[[1, 0]]
    return array


def swap_halves(array):
    return np.concatenate(np.split(array, 2, axis=-1)[::-1], axis=-1)


def swap_last_rows(array):
    array[[-2, -1]] = array[[-1, -2]]
    return array


def nudge(array):
    array.flat[-1] += np.float32(1e-3)
    return array


def spoil(array):
    array.flat[-1] = np.nan
    return array


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        (QUERY, np.transpose, "decoder/layers_2"),
        ("decoder/layers_0/mlp/wi_0/kernel", swap_halves, "decoder/layers_0"),
        (EXPERT, swap_experts, "decoder/layers_3"),
        (EXPERT, nudge, "decoder/layers_3"),
        ("decoder/layers_1/mlp/router/router_weights/w/kernel", swap_halves, "decoder/layers_1"),
        ("token_embedder/embedding", swap_last_rows, "token_embedder/embedding"),
        ("decoder/logits_dense/kernel", swap_halves, "decoder/logits_dense/kernel"),
        ("decoder/decoder_norm/scale", spoil, "decoder/logits_dense/kernel"),
    ],
)
def test_the_first_part_that_differs_is_named(parameters, moe_config, name, change, part):
    with pytest.raises(interop.CheckpointError) as raised:
        acceptance.compare(parameters, changed(parameters, name, change), moe_config)
    assert str(raised.value).startswith(f"{part}: source and destination differ by ")
    assert str(raised.value).endswith("; the destination is damaged: convert once more")


def test_swapped_matrices_of_one_layer_are_found(parameters, moe_config):
    swapped = parameters | {QUERY: parameters[KEY], KEY: parameters[QUERY]}
    with pytest.raises(interop.CheckpointError, match=r"^decoder/layers_2: source and destination differ"):
        acceptance.compare(parameters, swapped, moe_config)


def test_rounding_that_is_not_to_the_nearest_is_found(parameters, moe_config):
    cut = {
        name: InMemory((p.array.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(ml_dtypes.bfloat16))
        for name, p in parameters.items()
    }
    with pytest.raises(interop.CheckpointError, match=r"^token_embedder/embedding: source and destination differ"):
        acceptance.compare(parameters, cut, moe_config)


def test_one_layer_is_read_at_a_time_first_of_the_destination(parameters, moe_config):
    read = []

    class Recorded(InMemory):
        def read(self):
            read.append(self)
            return self.array

    source, destination = ({n: Recorded(p.array) for n, p in parameters.items()} for _ in range(2))
    acceptance.compare(source, destination, moe_config)
    assert len(read) == 2 * 49
    of_destination = {id(parameter) for parameter in destination.values()}
    sides = [id(parameter) in of_destination for parameter in read]
    assert sides[:2] == [True, False]  # the embedding
    assert sides[2:22] == [True] * 9 + [False] * 9 + [True] * 2  # layer 0, and the beginning of the next one


def test_the_improved_model_is_compared_too(mesh_of):
    config = PRESETS["openmoe-next-nano"]
    names = by_name(step.init_state(config, AdafactorConfig(), 0, mesh_of(1, 1)).params)
    assert acceptance.compare(names, names, config).difference == 0.0
