"""The golden model and a small one of our own as Hugging Face checkpoints; none of these tests runs without PyTorch."""

import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]  # `make test-interop` installs it

from openmoe.model import hf_checkpoint, sharding
from openmoe.model.interop import InMemory

os.environ["HF_HUB_OFFLINE"] = "1"
with pytest.MonkeyPatch.context() as patch:  # as in ../model/conftest.py
    patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
    jax.devices()
jax.config.update("jax_compilation_cache_dir", f"{os.environ['JAX_COMPILATION_CACHE_DIR']}-unoptimized")

SMALL = Path(__file__).parents[1] / "model" / "goldens"
FULL = Path(__file__).resolve().parents[3] / "shared" / "goldens"


@pytest.fixture(scope="session")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def jax_params(golden):
    return traverse_util.unflatten_dict(golden("moe_params"), sep="/")


@pytest.fixture(scope="session")
def golden():
    """Returns golden(name), the arrays of a golden file; the test is skipped where the full ones are not."""

    def load(name):
        found = [path for folder in (FULL, SMALL) if (path := folder / f"{name}.npz").exists()]
        if not found:
            pytest.skip(f"the full golden data is not at {FULL}: the comparison with {name} did not run")
        return dict(np.load(found[0]))

    return load


@pytest.fixture(scope="session")
def parameters(golden):
    return {name: InMemory(array) for name, array in golden("moe_params").items()}


@pytest.fixture(scope="session")
def export(parameters, moe_config, tmp_path_factory):
    """The golden weights as openmoe writes them, in three files."""
    path = str(tmp_path_factory.mktemp("hf") / "golden")
    hf_checkpoint.write(path, moe_config, parameters, shard_bytes=800_000)
    assert len(list(Path(path).glob("*.safetensors"))) == 3, "several parts are wanted"
    return path


@pytest.fixture(scope="session")
def load(export, tmp_path_factory):
    """Returns load(), the export as transformers loads it; `settings` are set in its config.json before."""
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("hf-modules"))
    import transformers

    def load(path=export, **settings):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
        for name, value in settings.items():
            assert hasattr(config, name)
            setattr(config, name, value)
        return transformers.AutoModelForCausalLM.from_pretrained(path, config=config, trust_remote_code=True)

    return load
