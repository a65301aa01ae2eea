"""The benchmarks run, and compare what is the same model; how fast, they say and no test does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *flags: str, **environment: str) -> str:
    """Runs a benchmark as a clone that was not installed does, and returns what it prints."""
    path = ROOT / "benchmarks" / script
    without_openmoe = "import sys, runpy; sys.meta_path = [f for f in sys.meta_path if 'openmoe' not in f.__module__]; "
    code = f"{without_openmoe}sys.argv = {[str(path), *flags]}; runpy.run_path({str(path)!r}, run_name='__main__')"
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_step_benchmark_runs_without_an_installed_package_and_one_hot_is_the_same_model(quickly):
    """It asserts the equality of the losses itself."""
    flags = ("--shape", "tiny", "--dtype", "float32", "--steps", "1", "--only", "ours", "one-hot", "head alone")
    out = run("model_step.py", *flags, **quickly)
    table = [line.split("float32")[0].strip() for line in out.splitlines() if "float32  " in line]
    assert table[:3] == ["ours, groups of 64", "one-hot, groups of 64", "head alone"]
    if sys.platform == "linux":
        assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0" in out
    assert "of the bound" in out


def test_the_data_benchmark_measures_every_objective_and_packing_and_says_which_peers_are_not_there():
    """Where t5 is installed it asserts first that its rows and ours are the same."""
    lines = run("data.py", "--text-bytes", "200000", "--repeats", "0").splitlines()
    parts = [line[:12].strip() for line in lines]
    names = [line[13:49].strip() for line, part in zip(lines, parts, strict=True) if part == "packing"]
    assert names[:4] == ["ul2, budgeted", "ul2, reference", "next_token, budgeted", "prefix_lm, budgeted"]
    assert (parts.count("tokenizing") >= 2, parts.count("reading")) == (True, 3)
    for peer in ("t5", "datatrove", "datasets"):
        is_there = importlib.util.find_spec(peer) is not None
        assert any(line.startswith(peer) and line.endswith("not installed") for line in lines) != is_there
