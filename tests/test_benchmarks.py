"""The benchmarks run, and compare what is the same model; how fast, they say and no test does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_step_benchmark_runs_without_an_installed_package_and_one_hot_is_the_same_model():
    """It asserts the equality of the losses itself."""
    script = ROOT / "benchmarks" / "model_step.py"
    flags = ["--shape", "tiny", "--dtype", "float32", "--steps", "1", "--only", "ours", "one-hot", "head alone"]
    without_openmoe = "import sys, runpy; sys.meta_path = [f for f in sys.meta_path if 'openmoe' not in f.__module__]; "
    code = f"{without_openmoe}sys.argv = {[str(script), *flags]}; runpy.run_path({str(script)!r}, run_name='__main__')"
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment.pop("GLIBC_TUNABLES", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    table = [line.split("float32")[0].strip() for line in result.stdout.splitlines() if "float32  " in line]
    assert table[:3] == ["ours, groups of 64", "one-hot, groups of 64", "head alone"]
    if sys.platform == "linux":
        assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in result.stdout
    assert "of the bound" in result.stdout
