"""What a GPU computes, held against a CPU, which tests/model holds against the original; `make test-gpu`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe.model import attention, grouped, sharding, step
from openmoe.model.config import PLAIN, PRESETS, ExecutionConfig
from openmoe.model.optimizer_config import AdafactorConfig

OPTIMIZER = AdafactorConfig(learning_rate=0.5, warmup_steps=25)
NANO, NEXT = (replace(PRESETS[name], group_size=256) for name in ("openmoe-nano", "openmoe-next-nano"))
SCANNED = ExecutionConfig(scan_blocks=True, remat="full")
ROWS, ROW_LEN = 4, 256
# Three packed segments that end within a tile, and padding; rows full to their end.
SEGMENTS = np.ones((ROWS, ROW_LEN), np.int32)
SEGMENTS[0, 100:130], SEGMENTS[0, 130:200], SEGMENTS[0, 200:] = 2, 3, 0


def batch_of(config):
    ids = np.random.default_rng(0).integers(2, config.text_vocab_size, (1, ROWS, ROW_LEN)).astype(np.int32)
    ids[0, SEGMENTS == 0] = 0
    inputs = np.roll(ids, 1, axis=-1)
    inputs[..., 0] = 0
    positions = np.broadcast_to(np.arange(ROW_LEN, dtype=np.int32), ids.shape)
    return {
        "input_ids": inputs,
        "target_ids": ids,
        "loss_weights": (ids > 0).astype(np.float32),
        "segment_ids": SEGMENTS[None],
        "positions": positions,
    }


def trained_on(device, config, execution=PLAIN, num_steps=3, options=None):
    """Returns the metrics of each step and the parameters after the last one; options are the compiler's."""
    mesh = sharding.make_mesh(devices=[device])
    plan = (config, OPTIMIZER, mesh, execution)
    with jax.default_device(device):
        batch = jax.device_put(batch_of(config), sharding.batch_sharding(mesh))
        state = step.arranged(*plan, step.init_state(config, OPTIMIZER, 0, mesh))
        train_step, metrics = step.make_train_step(*plan).lower(state, batch).compile(compiler_options=options), []
        for _ in range(num_steps):
            state, found = train_step(state, batch)
            metrics.append(jax.device_get(found))
        return metrics, jax.device_get(step.plain(*plan, state).params)


@pytest.fixture(scope="module")
def cpu():
    return jax.devices("cpu")[0]


@pytest.mark.parametrize("config", [NANO, NEXT], ids=["original", "next: dropless, sigmoid, swiglu"])
@pytest.mark.parametrize("execution", [PLAIN, SCANNED], ids=["plain", "scan, remat"])
def test_three_steps_are_those_of_a_cpu(gpu, cpu, config, execution):
    (found, params), (wanted, wanted_params) = (trained_on(device, config, execution) for device in (gpu, cpu))
    for here, there in zip(found, wanted, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
        assert here["batch_checksum"].tolist() == there["batch_checksum"].tolist()
        np.testing.assert_allclose(here["expert_load"], there["expert_load"], atol=2 / (ROWS * ROW_LEN))
    for leaf, wanted_leaf in zip(jax.tree.leaves(params), jax.tree.leaves(wanted_params), strict=True):
        np.testing.assert_allclose(leaf, wanted_leaf, atol=2e-4 * max(np.abs(wanted_leaf).max(), 1e-3))


@pytest.mark.parametrize("config", [NANO, NEXT], ids=["original", "next"])
def test_with_deterministic_operations_the_same_steps_give_the_same_bits(gpu, config):
    # Without them the losses agree but not all parameters: many gradients add to one row of the embedding.
    options = {"xla_gpu_deterministic_ops": True}
    (first, params), (second, again) = (trained_on(gpu, config, options=options) for _ in range(2))
    assert [m["loss"].tobytes() for m in first] == [m["loss"].tobytes() for m in second]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


def test_cudnn_attention_is_nearer_to_float32_than_the_reference_in_bfloat16(gpu):
    shape = (ROWS, ROW_LEN, 4, 128)
    numbers = np.random.default_rng(0).standard_normal((4, *shape))
    numbers[0] /= np.sqrt(128)
    weights = numbers[3] * (SEGMENTS > 0)[..., None, None]
    mesh = sharding.make_mesh(devices=[gpu])

    def results(implementation, dtype):
        query, key, value = (jnp.asarray(x, dtype) for x in numbers[:3])

        def loss(query, key, value):
            y = attention.attend(query, key, value, SEGMENTS, implementation=implementation, mesh=mesh)
            return jnp.sum(weights * y.astype(jnp.float32)), y

        gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
        return [np.asarray(x, np.float32) for x in (y * (SEGMENTS > 0)[..., None, None], *gradients)]

    exact = results("reference", "float32")
    errors = {
        name: [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(results(name, "bfloat16"), exact, strict=True)]
        for name in ("cudnn", "reference")
    }
    assert max(errors["cudnn"]) < 0.02, errors
    assert sum(errors["cudnn"]) < sum(errors["reference"]), errors


def test_a_step_in_bfloat16_uses_cudnn_and_learns_what_a_cpu_learns(gpu, cpu):
    config = replace(NANO, dtype="bfloat16")
    fused = ExecutionConfig()
    mesh = sharding.make_mesh(devices=[gpu])
    shapes = step.state_shapes(config, OPTIMIZER, mesh)
    text = step.make_train_step(config, OPTIMIZER, mesh, fused).lower(shapes, batch_of(config)).as_text()
    assert "cudnn$fmha" in text
    (found, _), (wanted, _) = trained_on(gpu, config, fused), trained_on(cpu, config)
    assert [float(m["loss"]) for m in found] == pytest.approx([float(m["loss"]) for m in wanted], rel=2e-2)


@pytest.mark.parametrize(
    "loads", [(64, 64, 64, 64), (250, 0, 3, 1), (0, 0, 256, 0)], ids=["even", "uneven", "all on one"]
)
def test_experts_rows_are_multiplied_by_their_kernels_whatever_the_loads(gpu, loads):
    rng = np.random.default_rng(0)
    rows, kernels, cotangent = (rng.normal(size=shape) for shape in ((300, 32), (4, 32, 48), (300, 48)))
    ends = np.cumsum(loads)
    of_expert = [slice(end - load, end) for end, load in zip(ends, loads, strict=True)]

    @jax.jit
    def products(rows, kernels, cotangent, loads):
        product, pull = jax.vjp(lambda rows, kernels: grouped.grouped_product(rows, kernels, loads, 256), rows, kernels)
        return product, *pull(cotangent)

    with jax.default_device(gpu):
        found = products(*(x.astype(np.float32) for x in (rows, kernels, cotangent)), np.asarray(loads, np.int32))
    wanted = (
        np.concatenate([rows[of] @ kernel for of, kernel in zip(of_expert, kernels, strict=True)]),
        np.concatenate([cotangent[of] @ kernel.T for of, kernel in zip(of_expert, kernels, strict=True)]),
        np.stack([rows[of].T @ cotangent[of] for of in of_expert]),
    )
    for got, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(got)[: len(exact)], exact, rtol=0, atol=1e-4)
