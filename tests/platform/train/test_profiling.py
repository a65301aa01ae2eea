"""A live run is looked into while it trains, and its steps do not wait for it."""

import gzip
import json
import threading
import time

import jax
import pytest
from typer.testing import CliRunner

from openmoe.platform.commands import cli
from openmoe.platform.run import journal
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError
from openmoe.platform.train import compile_cache, profiling
from openmoe.platform.train.profiling import Request, Responder
from openmoe.platform.train.recorder import Recorder
from openmoe.platform.train.train_step import TrainStep


@pytest.fixture
def live(tmp_path, monkeypatch):
    """A run directory whose one worker does steps until the test ends."""
    monkeypatch.setattr(profiling, "POLL_S", 0.05)
    loaded = spec.load("quickstart", [f"run_dir={tmp_path}/run"])
    run, stop = RunDir(loaded.run_dir), threading.Event()
    run.create(loaded)
    profiling.ask(run, Request(id="before", processes=(), stacks=True))
    with Recorder(run, run.claim(), lambda record: None, row_tokens=1) as recorder:
        recorder.event("started", processes=1)
        recorder.flush()
        train_step = TrainStep(
            jax.jit(lambda state, batch: state + batch @ batch), recorder, compile_cache.Programs(recorder)
        )

        def train():
            state, batch = jax.numpy.zeros((8, 8)), jax.numpy.ones((8, 8))
            while not stop.wait(0.01):
                state = jax.block_until_ready(train_step(state, batch))

        thread = threading.Thread(target=train, name="the loop")
        with Responder(run, train_step):
            thread.start()
            while train_step.calls < 2:
                time.sleep(0.01)
            yield run
            stop.set()
            thread.join()


def profile(run, *flags):
    return CliRunner().invoke(cli.app, ["profile", run.path, *flags], catch_exceptions=False)


def test_a_live_run_gives_a_trace_of_its_steps_its_program_its_memory_and_its_stacks(live, tmp_path):
    result = profile(live, "--steps", "3", "--hlo", "--memory", "--stacks", "--timeout-s", "120")
    assert result.exit_code == 0, result.output
    [folder] = (tmp_path / "run/profiles").glob("2*/00000")
    assert (
        f"process 0, steps {json.loads(folder.with_name('00000.json').read_text())['first_step']} to " in result.output
    )
    files = {path.name: path for path in folder.rglob("*") if path.is_file()}
    assert f"  {files['perfetto_trace.json.gz'].relative_to(folder)}" in result.output
    assert [name for name in files if name.endswith(".xplane.pb")]
    assert "dot" in files["step.hlo.txt"].read_text()
    memory = json.loads(files["memory.json"].read_text())
    assert memory["resident_bytes"] > memory["live_array_bytes"] >= 2 * 8 * 8 * 4
    assert len(memory["devices"]) == 8
    assert files["memory.prof"].stat().st_size > 0
    assert "thread the loop\n" in files["stacks.txt"].read_text()
    events = json.loads(gzip.decompress(files["perfetto_trace.json.gz"].read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "train" for event in events) >= 3


def test_what_was_asked_before_a_worker_came_is_not_for_it(live, tmp_path):
    assert profile(live, "--stacks").exit_code == 0
    assert not (tmp_path / "run/profiles/before").exists()


def test_nobody_who_answers_and_bad_requests_are_told(tmp_path):
    run = RunDir(f"{tmp_path}/run")
    with pytest.raises(SpecError, match="nothing is asked for; give --steps 3"):
        profile(run)
    with pytest.raises(RunDirError, match="no run is here"):
        profile(run, "--stacks")
    run.create(spec.load("quickstart", [f"run_dir={run.path}"]))
    with pytest.raises(RunDirError, match="no worker group has started yet"):
        profile(run, "--stacks")
    events = journal.Journal(run.at("journal"), incarnation=1, process=0)
    events.append({"event": "started", "time_s": 1.0, "processes": 2})
    events.flush()
    with pytest.raises(SpecError, match="--processes 0,2: the run has 2, from 0 on"):
        profile(run, "--stacks", "--processes", "0,2")
    result = profile(run, "--stacks", "--processes", "all", "--timeout-s", "0")
    assert result.exit_code == 1
    assert "no answer from process 0, 1 in 0 s: does it live?" in result.output
    run.finish({"time_s": 0.5})  # and then gone on with
    assert profile(run, "--stacks", "--timeout-s", "0").exit_code == 1
    run.finish({"time_s": 2.0})
    with pytest.raises(RunDirError, match="run: it is finished; nobody would answer, ask again when it trains"):
        profile(run, "--stacks")
    events.append({"event": "ended", "time_s": 3.0, "cause": "host_fault"})
    events.flush()
    with pytest.raises(RunDirError, match=r"its newest worker group has ended \(host fault\); nobody would answer"):
        profile(run, "--stacks")
