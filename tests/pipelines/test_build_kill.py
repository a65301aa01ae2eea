import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openmoe.pipelines import build as builder
from openmoe.pipelines import stdlib_corpus
from openmoe.pipelines.build import _pack_task as pack_task
from openmoe.pipelines.build import _tokenize_task as tokenize_task
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


def dying(row, work):
    """A task whose worker is killed in its first run, and for every fourth task in its second."""
    name = hashlib.sha256(row["task"].encode()).hexdigest()
    lives = Path(os.environ["LIVES"], name)
    deaths = lives.read_text() if lives.exists() else ""
    if len(deaths) < (2 if int(name, 16) % 4 == 0 else 1):
        work(row)  # what it has written by then, receipt and all, must do no harm
        lives.write_text(deaths + "x")
        os.kill(os.getpid(), signal.SIGKILL)
    return work(row)


@pytest.mark.faults
def test_a_build_whose_workers_die_under_every_task_loses_and_blames_none(ray_local, tmp_path, monkeypatch):
    corpus, lives = tmp_path / "corpus", tmp_path / "lives"
    stdlib_corpus.write_corpus(str(corpus), max_text_bytes=40_000, max_code_bytes=10_000)
    lives.mkdir()
    whole = builder.build(config(str(corpus)), str(tmp_path / "whole"), min_rows=60)
    ray_local.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = str(lives)

    def tokenize(row):
        os.environ["LIVES"] = folder
        return dying(row, tokenize_task)

    def pack(row):
        os.environ["LIVES"] = folder
        return dying(row, pack_task)

    monkeypatch.setattr(builder, "_tokenize_task", tokenize)
    monkeypatch.setattr(builder, "_pack_task", pack)
    said: list[str] = []
    killed = builder.build(
        config(str(corpus)), str(tmp_path / "data"), min_rows=60, place=builder.Workplace(say=said.append)
    )
    assert tree(tmp_path / "data") == tree(tmp_path / "whole")
    assert killed.data_id == whole.data_id
    assert len(said) == sum(len(life.read_text()) for life in lives.iterdir())
    assert {line.split(" times over ")[0] for line in said} == {f"a worker died, {n} of 3" for n in (1, 2)}
