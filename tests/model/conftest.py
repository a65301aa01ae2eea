"""Eight virtual devices, the golden files, and the models that made them.

The number of devices is set before JAX starts and holds for all tests that run in the same process as these:
a test that wants fewer gives `make_mesh` the devices it wants.
"""

import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from openmoe.model import sharding

jax.config.update("jax_num_cpu_devices", 8)
# These tests compile much and compute little. LLVM's optimizations come after XLA's own; and the emitters of fusions go
# through MLIR: compiling a training step takes 2.4 s of CPU without both, 6.6 s without the first, 8.7 s with them.
# Only this process is told, which reads it when it makes its devices; so what it compiles is kept apart.
QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY}")
    jax.devices()
jax.config.update("jax_compilation_cache_dir", f"{os.environ['JAX_COMPILATION_CACHE_DIR']}-unoptimized")

SMALL = Path(__file__).parent / "goldens"
FULL = Path(__file__).resolve().parents[3] / "shared" / "goldens"


@pytest.fixture(scope="session")
def config(moe_config):
    """Two MoE layers, each a block, and eight experts, so that every mesh of eight devices can hold them."""
    return replace(moe_config, num_layers=2, moe_every=1, num_experts=8)


@pytest.fixture(scope="session")
def packed_batch():
    """Returns packed_batch(rows, seq, microbatches=1): two segments a row, the second one cut short by padding."""

    def make(rows, seq, microbatches=1):
        shape = (microbatches, rows, seq)
        target_ids = np.random.default_rng(0).integers(2, 512, shape, dtype=np.int32)
        segment_ids = np.where(np.arange(seq) < seq // 2, 1, 2) * np.ones(shape, np.int32)
        target_ids[..., -4:], segment_ids[..., -4:] = 0, 0
        input_ids = np.roll(target_ids, 1, axis=-1)
        input_ids[..., [0, seq // 2, -3, -2, -1]] = 0
        ids = {"input_ids": input_ids, "target_ids": target_ids, "segment_ids": segment_ids, "positions": segment_ids}
        return ids | {"loss_weights": (target_ids > 0).astype(np.float32)}

    return make


@pytest.fixture(scope="session")
def mesh_of():
    """Returns mesh_of(data, expert, fsdp=1, tensor=1), on the first of the virtual devices."""

    def make(data, expert, fsdp=1, tensor=1):
        devices = jax.devices()[: data * expert * fsdp * tensor]
        return sharding.make_mesh(data=data, fsdp=fsdp, expert=expert, tensor=tensor, devices=devices)

    return make


@pytest.fixture(scope="session")
def golden():
    """Returns golden(name), the arrays of a file that lies beside the tests: a part of the original one."""
    return lambda name: dict(np.load(SMALL / f"{name}.npz"))


@pytest.fixture(scope="session")
def full_golden_path():
    """Returns full_golden_path(name), a whole golden file; the test is skipped where there is none."""

    def path_of(name):
        if not (path := FULL / name).exists():
            pytest.skip(f"the full golden data is not at {FULL}: the comparison with {name} did not run")
        return path

    return path_of


@pytest.fixture(scope="session")
def full_golden(full_golden_path):
    """Returns full_golden(name), the arrays of a whole golden file."""
    return lambda name: dict(np.load(full_golden_path(name)))


@pytest.fixture(scope="session")
def moe_params(golden):
    return tree_of(golden("moe_params"))


def tree_of(arrays):
    """Turns {"a/b": array} into {"a": {"b": array}}."""
    return traverse_util.unflatten_dict(arrays, sep="/")
