"""What TPUs run, compiled for them by their own compiler, which needs no TPU for that; `make test-tpu`.

Nothing is computed here. What fails is what the compiler refuses, what would not fit into a chip's memory, and what
exchanges more between chips than it should.
"""

import importlib.util
import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from openmoe.model import attention, sharding, step
from openmoe.model.config import PRESETS, ExecutionConfig
from openmoe.model.optimizer_config import AdafactorConfig
from openmoe.platform.planner import plan_compile, plan_hardware, plan_work
from openmoe.platform.run_file import spec, validate_memory

MEGACORE = {"chip_config_name": "megacore"}  # a chip's two cores as one device, as JAX has them on a v4
V4 = {"topology_name": "v4:2x2x1", **MEGACORE}
V5E = {"topology_name": "v5e:2x2"}
V6E = {"topology_name": "v6e:2x2"}
NANO = replace(PRESETS["openmoe-nano"], num_layers=2)
NEXT_NANO = replace(PRESETS["openmoe-next-nano"], num_layers=2)
# The heads, groups and types of the 8B model, and less of all of which there is merely more.
LARGE = replace(
    PRESETS["openmoe-8b"],
    num_layers=2,
    moe_every=2,
    num_heads=4,
    d_model=512,
    d_ff=1024,
    num_experts=8,
    vocab_size=8576,
    text_vocab_size=8192,
)


@pytest.fixture(scope="module")
def mesh_of(needs):
    """Returns mesh_of(topology, tensor=2, ...), a mesh of TPU devices that are not there."""
    needs(importlib.util.find_spec("libtpu"), "libtpu: make test-tpu")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        for name, value in plan_compile.LIBTPU.items():
            patch.setenv(name, value)
        yield lambda topology, **axes: sharding.make_mesh(
            devices=topologies.get_topology_desc(platform="tpu", **topology).devices, **axes
        )


def test_slices_follow_each_other_along_the_data_axis(mesh_of):
    """However JAX lists their devices, and although the network between them is never an axis of its own."""
    two = {**V4, "num_slices": 2}
    devices = list(mesh_of(two, data=8).devices.flat)
    mixed = sharding.make_mesh(devices=devices[::2] + devices[1::2], data=2, fsdp=2, expert=2)
    for mesh in (mesh_of(two, data=2, expert=4), mixed):
        assert [[sharding.slice_of(device) for device in row.flat] for row in mesh.devices] == [[0] * 4, [1] * 4]


def compiled_attention(mesh, *, dtype="bfloat16", row_len=2048, num_heads=4, head_dim=128, implementation="splash"):
    """Attention of two rows on each device, forward and backward."""
    by_heads = NamedSharding(mesh, P(sharding.BATCH_AXES, None, "tensor"))
    shape = (2 * sharding.num_batch_shares(mesh), row_len, num_heads, head_dim)
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=by_heads)
    segments = jax.ShapeDtypeStruct(shape[:2], "int32", sharding=NamedSharding(mesh, P(sharding.BATCH_AXES)))

    def attend(query, key, value, segments, weights):
        forward = lambda *x: attention.attend(*x, segments, implementation=implementation, mesh=mesh)  # noqa: E731
        y, backward = jax.vjp(forward, query, key, value)
        return y, backward(weights)

    return jax.jit(attend).lower(array, array, array, segments, array).compile()


def kernels(compiled):
    return Counter(re.findall(r"%splash_mha_([a-z]+)_segmented\S* = ", compiled.as_text()))


def exchanges(compiled):
    names = r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\S*\("
    return set(re.findall(names, compiled.as_text()))


@pytest.mark.parametrize("topology", [V4, V5E, V6E], ids=["v4", "v5e", "v6e"])
@pytest.mark.parametrize(
    ("dtype", "row_len", "head_dim"), [("bfloat16", 2048, 128), ("bfloat16", 640, 64), ("float32", 512, 64)]
)
def test_attention_is_three_kernels_that_exchange_nothing(mesh_of, topology, dtype, row_len, head_dim):
    mesh = mesh_of(topology, fsdp=2, tensor=2)
    compiled = compiled_attention(mesh, dtype=dtype, row_len=row_len, head_dim=head_dim)
    assert kernels(compiled) == {"fwd": 1, "dkv": 1, "dq": 1}
    assert exchanges(compiled) == set()


def test_fused_attention_keeps_no_logits(mesh_of):
    fused, reference = (
        compiled_attention(mesh_of(V4, data=4), implementation=name).memory_analysis().temp_size_in_bytes
        for name in ("splash", "reference")
    )
    logits_bytes = 2 * 4 * 2048 * 2048 * 2
    assert reference > 2 * logits_bytes
    assert fused < logits_bytes / 4


def compiled_step(config, mesh, execution, row_len=None):
    """A step on one routing group for each device."""
    row_len = row_len or config.group_size
    rows = mesh.size * config.group_size // row_len
    optimizer = AdafactorConfig()
    state = step.state_shapes(config, optimizer, mesh, execution)
    types = dict.fromkeys(("input_ids", "target_ids", "segment_ids", "positions"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((1, rows, row_len), dtype, sharding=sharding.batch_sharding(mesh))
        for name, dtype in {**types, "loss_weights": jnp.float32}.items()
    }
    return (
        step.make_train_step(config, optimizer, mesh, execution).lower(state, batch).compile(plan_compile.LITTLE_EFFORT)
    )


SCANNED = {"scan_blocks": True, "remat": "full"}


@pytest.mark.parametrize(
    ("config", "topology", "axes", "execution", "forward", "backward", "exchange"),
    [
        (NANO, V4, {"data": 2, "expert": 2}, {}, 2, 2, "all-to-all"),
        (replace(NANO, num_layers=4), V6E, {"fsdp": 2, "tensor": 2}, {"scan_blocks": True}, 2, 2, "all-gather"),
        (NEXT_NANO, V4, {"expert": 2, "tensor": 2}, {}, 2, 2, "all-reduce"),
        (NEXT_NANO, V5E, {"fsdp": 2, "expert": 2}, SCANNED, 2, 1, "all-gather"),
        (LARGE, V4, {"expert": 2, "tensor": 2}, {"remat": "dots"}, 4, 2, "all-to-all"),
    ],
    ids=["nano", "nano-scanned", "next-nano", "next-nano-scanned", "large"],
)
def test_a_training_step_has_fused_attention_and_updates_its_state_in_place(
    mesh_of, config, topology, axes, execution, forward, backward, exchange
):
    compiled = compiled_step(config, mesh_of(topology, **axes), ExecutionConfig(**execution))
    # Of each layer, or of each layer of a scanned block; with remat the forward one is there twice.
    assert kernels(compiled) == {"fwd": forward, "dkv": backward, "dq": backward}
    assert exchange in exchanges(compiled)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes


@pytest.mark.timeout(900)  # a minute alone on two cores, seven with twenty others
def test_the_8b_run_trains_on_64_v4_chips_as_the_plan_says(mesh_of):
    """Its whole batch; in half of the chips' 32 GiB, with the estimated memory, arithmetic and exchanges."""
    run, machines = spec.load("openmoe_8b", ["mesh={fsdp: 8, expert: 8}"]), plan_hardware.parse("v4-128")
    compiled = plan_compile.lowered_step(run, plan_compile.mesh_of(run, machines)).compile(plan_compile.LITTLE_EFFORT)
    assert kernels(compiled) == {"fwd": 12, "dkv": 6, "dq": 6}  # of the six layers of a block

    found, work = plan_compile.measured(compiled, compile_s=0), plan_work.work(run)
    assert found.peak_bytes < 16 * 2**30
    assert validate_memory.estimate(run).total == pytest.approx(found.peak_bytes, rel=0.1)
    assert found.program.product_flops == pytest.approx(work.device_flops - plan_work.attention_flops(run), rel=0.02)

    assert found.program.moved_bytes == pytest.approx(work.hbm_bytes, rel=0.3)

    # Places of one group: two forward, two forward again, two backward, in each of 4 MoE layers and 8 microbatches.
    to_experts = [exchange for exchange in found.program.exchanges if exchange.kind == "all-to-all"]
    assert [(each.size_bytes, each.times) for each in to_experts] == [(32 * 160 * 2048 * 2, 4 * 8)] * 6
    gathered = found.program.exchanged_bytes()["all-gather"] * 7 / 8
    assert gathered == pytest.approx(work.exchanged_bytes["all-gather over fsdp"], rel=0.02)
    shown = {fact.key: fact.value for fact in plan_compile.section(run, machines, found).facts}
    assert shown["peak"] == found.peak_bytes
    assert shown["step_s_at_peak"][0] == pytest.approx(3.08, abs=0.05)  # of arithmetic
