"""Imported before openmoe: in a clone that was not installed, as where only JAX is, its folders are the package's."""

import importlib.util
import sys
import types
from pathlib import Path

try:
    is_installed = importlib.util.find_spec("openmoe.model") is not None
except ModuleNotFoundError:
    is_installed = False
if not is_installed:
    package = types.ModuleType("openmoe")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["openmoe"] = package
