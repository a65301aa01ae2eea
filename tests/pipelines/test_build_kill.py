import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openmoe.pipelines import build as builder
from openmoe.pipelines import stdlib_corpus
from openmoe.pipelines.config import DataConfig, SourceConfig

PROGRAM = """
import sys
import ray
from openmoe.clusters import local_ray
from openmoe.pipelines import build
sys.path.insert(0, sys.argv[1])
from test_build_kill import config
ray.init(**local_ray.init_arguments(num_cpus=2, object_store_bytes=100_000_000))
print("begun", flush=True)
build.build(config(sys.argv[2]), sys.argv[3], min_rows=300, report=lambda *args: print(*args, flush=True))
"""


def config(corpus: str) -> DataConfig:
    source = SourceConfig(name="c4", format="redpajama", paths=(f"{corpus}/c4/*.jsonl",), weight=1.0)
    tiny = {"unit_bytes": 3_000, "group_tokens": 2_000, "seq_len": 128, "seed": 3}
    return DataConfig(tokenizer="builtin:small_8192", sources=(source,), **tiny)


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["tokenize", "pack"])
def test_a_build_killed_in_mid_stage_goes_on_and_ends_in_the_same_bytes(ray_local, tmp_path, stage):
    corpus, data = tmp_path / "corpus", tmp_path / "data"
    stdlib_corpus.write_corpus(str(corpus), max_text_bytes=300_000, max_code_bytes=10_000)
    whole = tmp_path / "whole"
    builder.build(config(str(corpus)), str(whole), min_rows=300)
    if stage == "pack":
        shutil.copytree(whole, data)
        shutil.rmtree(data / "passes")

    arguments = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(corpus), str(data)]
    driver = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert driver.stdout
    reported = [line for line, _ in zip(driver.stdout, range(4), strict=False)]
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert [line.split()[0] for line in reported] == ["begun", *[stage] * 3]

    killed = tree(data)
    assert set(killed) < set(tree(whole))
    builder.build(config(str(corpus)), str(data), min_rows=300, place=builder.Workplace(num_workers=1))
    assert tree(data) == tree(whole)
