"""Passes that are built while a run trains: a real Ray, a run in epochs on virtual devices of this process."""

import json
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from openmoe.pipelines import build, passes, ray_tasks, stdlib_corpus
from openmoe.pipelines.config import DataError
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.passes import Passes
from openmoe.pipelines.storage import StorageUnavailable
from openmoe.platform.data import build_ahead
from openmoe.platform.data.build_ahead import BuildAhead
from openmoe.platform.run import report, run_dir
from openmoe.platform.run.lineage import Incident, Rows
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import run_length, spec

pytestmark = pytest.mark.timeout(180)

# As in test_train_loop.py, so that what is compiled there is found here.
SMALL = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.batch_rows=8", "train.checkpoint_every_steps=50", "train.sample_tokens=0"),
    *("mesh.expert=8", "cluster.num_workers=1", "cluster.devices_per_worker=8"),
    *("train.steps=null", "data.unit_bytes=3000", "data.group_tokens=2000"),
)


@pytest.fixture(scope="module")
def tokenized(ray_local, few_pieces, tmp_path_factory):
    """(run file settings of one small source, a folder with pass 0 of it)."""
    folder = tmp_path_factory.mktemp("data")
    stdlib_corpus.write_corpus(f"{folder}/corpus", max_text_bytes=55_000, max_code_bytes=1_000)
    source = {"name": "c4", "format": "redpajama", "paths": [f"{folder}/corpus/c4/*.jsonl"], "weight": 1}
    settings = (*SMALL, *few_pieces, f"data.sources={json.dumps([source])}")
    first = spec.load("quickstart", [*settings, "train.epochs=1", f"run_dir={folder}/run", f"data_dir={folder}/data"])
    build_ahead.build_first(first, 0, silent, silent)
    return settings, folder / "data"


@pytest.fixture
def first(tokenized, tmp_path):
    """(spec, manifest, resolved spec) of a run of `epochs`, over a copy of the data that has pass 0 alone."""
    settings, data = tokenized
    shutil.copytree(data, tmp_path / "data")

    def begin(epochs, *more):
        paths = [f"run_dir={tmp_path}/run", f"data_dir={tmp_path}/data"]
        loaded = spec.load("quickstart", [*settings, f"train.epochs={epochs}", *paths, *more])
        return loaded, *build_ahead.build_first(loaded, 0, silent, silent)

    return begin


@pytest.fixture
def no_free_cpu(ray_local):
    """Holds every CPU of the cluster."""

    @ray_local.remote(num_cpus=1)
    class Busy:
        def is_there(self):
            return True

    busy = [Busy.remote() for _ in range(2)]
    ray_local.get([actor.is_there.remote() for actor in busy])
    yield
    for actor in busy:
        ray_local.kill(actor)


def silent(*progress):
    pass


def wait_until(condition, timeout_s=60):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def wait_until_built(ahead, manifest, rows):
    """Waits until the rows [0, rows) can be read; raises what stopped the building."""

    def is_built():
        ahead.check()
        return passes.covers(Passes(manifest), rows)

    wait_until(is_built)


def test_epochs_become_whole_steps_and_the_rest_is_left_out(first):
    _, manifest, resolved = first(2.5)
    [rows] = Passes(manifest).rows(0)
    assert rows == {11: 108, 12: 110, 13: 109}.get(sys.version_info.minor, rows)  # of this Python's library
    assert (resolved.train.steps, resolved.train.epochs) == (5 * rows // 16, None)  # 2.5 epochs of 8 rows a step


def test_the_coming_pass_is_built_while_the_run_is_in_the_one_before(first, monkeypatch):
    monkeypatch.setattr(build_ahead, "POLL_S", 0.05)
    _, manifest, resolved = first(3)
    rows = Passes(manifest).rows(0)[0]
    position = [0]
    with BuildAhead(resolved, manifest, lambda: position[0], silent, silent) as ahead:
        wait_until(lambda: len(Passes(manifest).rows(0)) == 2)
        time.sleep(0.3)
        assert len(Passes(manifest).rows(0)) == 2
        position[0] = rows // 8 + 1
        wait_until(lambda: len(Passes(manifest).rows(0)) == 3)
        position[0] = 2 * rows // 8 + 2
        wait_until_built(ahead, manifest, 8 * resolved.train.total_steps)
    assert Loader(manifest.path).num_rows >= 8 * resolved.train.total_steps


def test_what_the_run_comes_to_only_later_is_not_built_yet(first, monkeypatch):
    monkeypatch.setattr(build_ahead, "POLL_S", 0.05)
    monkeypatch.setattr(build_ahead, "AHEAD_ROWS", 40)
    _, manifest, resolved = first(2)
    rows = Passes(manifest).rows(0)[0]
    position = [(rows - 41) // 8]
    with BuildAhead(resolved, manifest, lambda: position[0], silent, silent) as ahead:
        time.sleep(0.5)
        assert Passes(manifest).receipts(0)[1:] == []
        position[0] += 1
        wait_until_built(ahead, manifest, 8 * resolved.train.total_steps)
    assert len(Passes(manifest).rows(0)) == 2


def test_rows_that_an_incident_leaves_out_are_built_for_at_the_end(first, monkeypatch):
    monkeypatch.setattr(build_ahead, "POLL_S", 0.05)
    _, manifest, resolved = first(1)
    rows, incidents = 8 * resolved.train.total_steps, []
    assert passes.covers(Passes(manifest), rows)
    with BuildAhead(resolved, manifest, lambda: 5, silent, silent, lambda: incidents) as ahead:
        time.sleep(0.3)
        assert len(Passes(manifest).rows(0)) == 1
        incidents.append(Incident(incarnation=1, step=6, rows=Rows(40, 48), reason="loss nan", time_s=0.0))
        wait_until_built(ahead, manifest, rows + 8)


def test_an_occupied_cluster_never_stops_the_coming_pass(first, no_free_cpu, monkeypatch):
    monkeypatch.setattr(ray_tasks, "PROBE_S", 0.2)
    _, manifest, resolved = first(2, "cluster.cpus_per_worker=0.5")
    said = []
    with BuildAhead(resolved, manifest, lambda: 0, silent, said.append) as ahead:
        wait_until_built(ahead, manifest, 8 * resolved.train.total_steps)
    assert said == ["no CPU of the cluster was free for data within 0.2 s: the driver does it"]
    assert Loader(manifest.path).num_rows >= 8 * resolved.train.total_steps


def test_a_cpu_that_is_taken_just_before_the_tasks_come_does_not_stop_them(first, no_free_cpu, monkeypatch):
    monkeypatch.setattr(ray_tasks, "_gets_a_cpu", lambda selector, is_left: True)
    monkeypatch.setattr(build, "PACK_STUCK_S", 1.0)
    monkeypatch.setattr(build, "TOKENIZE_STUCK_S", 1.0)
    _, manifest, resolved = first(1.1, "cluster.cpus_per_worker=0.5", "data.group_tokens=20000")
    said = []
    with BuildAhead(resolved, manifest, lambda: 0, silent, said.append) as ahead:
        wait_until_built(ahead, manifest, 8 * resolved.train.total_steps)
    assert said == ["the cluster did nothing for 1 s: the driver does it"]
    assert Loader(manifest.path).num_rows >= 8 * resolved.train.total_steps


def test_cpus_that_the_workers_need_when_they_start_again_are_not_taken(first):
    _, manifest, resolved = first(2, "cluster.cpus_per_worker=2")
    said = []
    with BuildAhead(resolved, manifest, lambda: 0, silent, said.append) as ahead:
        wait_until_built(ahead, manifest, 8 * resolved.train.total_steps)
    assert said == ["the cluster has no CPU for data beside the training workers: the driver does it"]


def test_data_that_went_bad_ends_the_run_with_one_line(first, tmp_path):
    _, manifest, resolved = first(2)
    for file in (tmp_path / "data/tokens").glob("*.parquet"):
        file.write_bytes(b"rubbish")
    with BuildAhead(resolved, manifest, lambda: 0, silent, silent) as ahead:
        wait_until(lambda: not ahead._thread.is_alive())
        with pytest.raises(DataError, match=r"\.parquet: .*; "):
            ahead.check()


def test_storage_that_does_not_answer_for_a_while_ends_neither_the_building_nor_the_run(first, monkeypatch):
    monkeypatch.setattr(build_ahead, "POLL_S", 0.05)
    _, manifest, resolved = first(2)
    coming, failures, said = passes.coming, [StorageUnavailable("gs://b/rows: cannot be listed: 503")] * 3, []

    def at_the_fourth(*arguments, **options):
        if failures:
            raise failures.pop()
        return coming(*arguments, **options)

    monkeypatch.setattr(passes, "coming", at_the_fourth)
    with BuildAhead(resolved, manifest, lambda: 0, silent, said.append) as ahead:
        wait_until_built(ahead, manifest, 8 * resolved.train.total_steps)
    assert len(Passes(manifest).rows(0)) == 2
    assert said == ["gs://b/rows: cannot be listed: 503; trying on"]


def test_the_end_of_an_attempt_ends_the_building_too(first):
    _, manifest, resolved = first(2)
    begun = threading.Event()
    with BuildAhead(resolved, manifest, lambda: 0, lambda *progress: begun.set(), silent) as ahead:
        assert begun.wait(60)
    assert not ahead._thread.is_alive()
    ahead.check()
    assert len(Passes(manifest).rows(0)) == 1


def test_a_run_of_epochs_reads_every_row_of_its_passes_once(first, monkeypatch):
    from openmoe.platform.train import train_loop

    monkeypatch.setattr(build_ahead, "POLL_S", 0.05)
    loaded, manifest, resolved = first(2.2)
    run = RunDir(loaded.run_dir)
    run.create(loaded)
    assert run_dir.summarize(run).steps is None
    steps = [0]

    def record(values):
        steps[0] = values["step"]

    with BuildAhead(resolved, manifest, lambda: steps[0], silent, silent) as ahead:
        train_loop.train(resolved, run, run.claim(), manifest.path, record)
        ahead.check()
    trace, loader = run.trace(), Loader(manifest.path)
    assert [r["rows"] for r in trace] == [[8 * s, 8 * s + 8] for s in range(resolved.train.total_steps)]
    assert all(r["data_wait_s"] >= 0 for r in trace)
    read = Counter(loader.locate(0, trace[-1]["rows"][1]))
    assert set(read.values()) == {1}
    passes = Passes(manifest).rows(0)
    assert [sum(record.number == n for record in read) for n in (0, 1)] == passes[:2]

    result = report.finish(loaded, run, manifest.path)
    assert (result.epoch_rows, result.go_on) == (passes[0], "train.epochs=4.4")
    assert 2.1 < result.epochs <= 2.2
    assert run_dir.summarize(run).steps == resolved.train.steps == result.steps
    assert json.loads(Path(run.at("run.json")).read_text())["spec"]["train"]["epochs"] == 2.2
    assert run_length.is_reached(loaded.train, run.finished())
    assert not run_length.is_reached(loaded.train.model_copy(update={"epochs": 3.0}), run.finished())
