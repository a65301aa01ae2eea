"""What was compiled once is loaded; what is damaged, or of other settings, is not."""

import hashlib
import os
import time
from pathlib import Path

import jax
import pytest

from openmoe.pipelines import storage
from openmoe.platform.run import journal
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec
from openmoe.platform.train import compile_cache
from openmoe.platform.train.compile_ahead import Counted
from openmoe.platform.train.recorder import Recorder
from openmoe.platform.train.train_step import TrainStep


@pytest.fixture
def used(tmp_path, monkeypatch):
    """Enters the cache of a new incarnation; its events are in the journal afterwards."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")

    def enter(function, *settings):
        loaded = spec.load("quickstart", [f"run_dir={tmp_path}/run", *settings])
        run = RunDir(loaded.run_dir)
        claim = run.claim()
        with (
            Recorder(run, claim, lambda record: None, row_tokens=1) as recorder,
            compile_cache.used(loaded, recorder) as programs,
        ):
            function(recorder, programs)
            programs.tell()
        return [
            e for n, _, e in journal.read(run.at("journal")) if n == claim.incarnation and e["event"] == "compiled"
        ][-1]

    return enter


def compiles(recorder, programs):
    """As an incarnation does: a new jitted function, of the same program."""
    step = TrainStep(jax.jit(lambda state, batch: state * 3.25 + batch), recorder, programs)
    one = jax.numpy.ones(7)
    assert step(one, one)[0] == 4.25
    assert "multiply" in step.text()


def test_a_second_incarnation_compiles_nothing_and_loads_no_damaged_program(used, tmp_path):
    settings = (f"cluster.compile_cache={tmp_path}/programs",)
    first = used(compiles, *settings)
    assert (first["loaded"], first["fetched"], first["refused"]) == (0, 0, 0)
    [folder] = storage.list_folders(f"{tmp_path}/programs")
    names = storage.list_files(f"{tmp_path}/programs/{folder}")
    assert any("lambda" in name for name in names)
    for name in names:
        data = storage.read_bytes(f"{tmp_path}/programs/{folder}/{name}")
        assert hashlib.sha256(data[32:]).digest() == data[:32]
    second = used(compiles, *settings)
    assert (second["fetched"], second["programs"] - second["loaded"]) == (len(names), 0)
    ours = [name for name in names if "lambda" in name]
    for name in ours:
        path = tmp_path / "programs" / folder / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    third = used(compiles, *settings)
    assert (third["fetched"], third["refused"]) == (len(names) - len(ours), len(ours))
    assert third["loaded"] < third["programs"]


def test_what_a_step_compiled_is_kept_while_the_run_goes_on_and_nothing_that_is_written_meanwhile(used, tmp_path):
    programs_dir = f"{tmp_path}/programs"

    def names():
        folders = storage.list_folders(programs_dir)
        return [name for folder in folders for name in storage.list_files(f"{programs_dir}/{folder}")]

    def compiles_and_waits(recorder, programs):
        compiles(recorder, programs)
        programs.keep_new()
        local = Path(jax.config.jax_compilation_cache_dir)
        half = local / "half-written"
        half.write_bytes(b"")
        os.utime(half, (time.time() + 9, time.time() + 9))  # still being written
        deadline_s = time.monotonic() + 60
        while not names():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        there = {path.name for path in local.iterdir()} - {half.name}
        while set(names()) != there:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        half.unlink()

    used(compiles_and_waits, f"cluster.compile_cache={programs_dir}")


def test_other_settings_fetch_nothing_and_none_are_kept_when_it_is_off(used, tmp_path):
    used(compiles)
    assert len(storage.list_folders(f"{tmp_path}/run/compile_cache")) == 1
    assert used(compiles, "train.batch_rows=8")["fetched"] == 0
    assert len(storage.list_folders(f"{tmp_path}/run/compile_cache")) == 2
    used(compiles, "train.batch_rows=16", "cluster.compile_cache=none")
    assert len(storage.list_folders(f"{tmp_path}/run/compile_cache")) == 2


def test_storage_that_cannot_be_written_costs_the_cache_and_not_the_run(used, tmp_path):
    (tmp_path / "file").write_text("")
    told = used(compiles, f"cluster.compile_cache={tmp_path}/file/below")
    assert told["programs"] > told["loaded"] == told["fetched"] == 0
    failed = [e for _, _, e in journal.read(f"{tmp_path}/run/journal") if e["event"] == "compile_cache_failed"]
    assert [sorted(event) for event in failed] == [
        ["error", "event", "time_s"],
        ["error", "event", "not_kept", "time_s"],
    ]
    assert all(f"{tmp_path}/file/below" in event["error"] for event in failed)


def test_on_gs_a_second_incarnation_compiles_nothing(used, gcs):
    settings = (f"cluster.compile_cache={gcs}/programs",)
    used(compiles, *settings)
    second = used(compiles, *settings)
    assert second["loaded"] == second["programs"] > 0


def test_a_full_disk_on_the_worker_costs_the_cache_and_not_the_run(tmp_path, mount_disk):
    program = bytes(2_000_000)
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "step-1").write_bytes(hashlib.sha256(program).digest() + program)
    (local := tmp_path / "local").mkdir()
    mount_disk(local, "1m")
    told = Counted()
    compile_cache.Programs(told).fetch(f"{tmp_path}/programs", local)
    assert "No space left" in told.newest["compile_cache_failed"]["error"]
