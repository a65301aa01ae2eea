"""The package without being installed, for images that bring their own JAX, and the GPU that all tests here need."""

import importlib.util
import sys
import types
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("openmoe") is None:
    package = types.ModuleType("openmoe")
    package.__path__ = [str(ROOT)]
    sys.modules["openmoe"] = package

# Products in float32 itself, not in the matrix units' shorter TF32: the original's numbers are float32's.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX finds no GPU but {jax.devices()}: no test of the GPU ran")
    return jax.devices()[0]
