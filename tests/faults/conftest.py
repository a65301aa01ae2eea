"""The real command on a small run in a process of its own, and the means to kill parts of it."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from openmoe.clusters import processes, twin_state
from openmoe.clusters import twin as twin_module
from openmoe.clusters.spec import ClusterSpec
from openmoe.pipelines import stdlib_corpus
from openmoe.platform.run.run_dir import RunDir

# openmoe-nano, narrower and with shorter rows: compiles in seconds, and 60 steps leave time to kill something.
SMALL = (
    "model.num_layers=2",
    "model.d_model=64",
    "model.d_ff=64",
    "model.group_size=128",
    "data.seq_len=128",
    "train.steps=60",
    "train.checkpoint_every_steps=10",
    "train.sample_tokens=0",
)
SOURCES = """
    - {name: c4, format: redpajama, paths: [CORPUS/c4/*.jsonl], weight: 1}
    - {name: the_stack, format: the_stack, paths: [CORPUS/the_stack/data/*/*.parquet], weight: 1}
"""


@dataclass
class Trainer:
    """`openmoe train` of the small run in `run_dir`, as a user starts it."""

    run_file: Path
    run_dir: str
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    @property
    def run(self) -> RunDir:
        return RunDir(self.run_dir)

    def entrypoint(self, python: str = "python") -> list[str]:
        """The command, as a Ray job gets it."""
        command = [python, "-m", "openmoe.platform", "train", str(self.run_file), *SMALL]
        return [*command, f"run_dir={self.run_dir}", *self.overrides]

    def start(self) -> None:
        environment = {**os.environ, **self.environment}
        for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            self.entrypoint(sys.executable),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,  # a group of its own, as a terminal gives it
        )

    def finish(self, timeout_s: float = 240) -> str:
        """Waits for the end; returns what was printed."""
        output, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, output
        return output

    def wait_for_acceptance(self, number: int, timeout_s: float = 180) -> None:
        """Waits until at least `number` checkpoints were accepted."""
        deadline_s = time.monotonic() + timeout_s
        while len(self.run.acceptances()) < number:
            assert self.process.poll() is None, f"ended early: {self.process.communicate()[0]}"
            assert time.monotonic() < deadline_s, "no checkpoint in time"
            time.sleep(0.02)

    def descendants(self, words: str = "") -> list[psutil.Process]:
        """Returns the live processes below the driver whose command line has `words`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill_worker(self) -> None:
        workers = self.descendants("RayTrainWorker")
        assert len(workers) == 2, [" ".join(w.cmdline()) for w in workers]
        workers[-1].send_signal(signal.SIGKILL)

    def kill_driver(self) -> None:
        """Kills the driver alone; its workers must end by themselves (Ray's own agents take a minute longer)."""
        below = self.descendants("RayTrainWorker")
        assert len(below) == 2
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive, [" ".join(p.cmdline()) for p in alive]

    def stop(self, number: signal.Signals) -> str:
        """Asks the run to stop (Ctrl-C reaches all processes of a terminal, SIGTERM one); returns what was printed."""
        below = self.descendants()
        assert len(self.descendants("RayTrainWorker")) == 2
        (os.killpg if number == signal.SIGINT else os.kill)(self.process.pid, number)
        output, _ = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(below, timeout=30)
        assert not alive, [" ".join(p.cmdline()) for p in alive]
        assert self.process.returncode == 1, output
        return output

    def kill_everything(self) -> None:
        for process in [*self.descendants(), psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="session")
def run_file(tmp_path_factory):
    """The quickstart's run file over a small corpus, its data built once for all runs of the session."""
    folder = tmp_path_factory.mktemp("faults")
    stdlib_corpus.write_corpus(f"{folder}/corpus", max_text_bytes=200_000, max_code_bytes=200_000)
    text = (Path(__file__).parents[2] / "runs" / "quickstart.yaml").read_text()
    head, _, rest = text.partition("  sources:")
    _, _, tail = rest.partition("\ntrain:")
    head = "\n".join(line for line in head.splitlines() if not line.startswith("sample_corpus"))
    text = f"{head}\n  sources:{SOURCES.replace('CORPUS', f'{folder}/corpus')}\ndata_dir: {folder}/data\ntrain:{tail}"
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def small():
    """The settings that make the quickstart's run small."""
    return SMALL


@pytest.fixture(scope="session")
def new_trainer(run_file):
    """Returns the function that gives a Trainer in any run directory; whoever starts it ends it."""
    return functools.partial(Trainer, run_file)


@pytest.fixture
def trainer(run_file, tmp_path):
    """Returns a function that gives a Trainer in a run directory of its own."""
    made = []

    def make(name="run", *overrides, **environment):
        made.append(Trainer(run_file, str(tmp_path / name), overrides, environment))
        return made[-1]

    yield make
    for each in made:
        if each.process and each.process.poll() is None:
            each.kill_everything()


@pytest.fixture(scope="session")
def undisturbed(run_file, tmp_path_factory):
    """The trace of the small run when nothing happens to it."""
    trainer = Trainer(run_file, str(tmp_path_factory.mktemp("undisturbed") / "run"))
    trainer.start()
    trainer.finish()
    return trainer.run


@dataclass
class LostWorker:
    """A run that loses a worker, trained once: `events` leads from one moment to the next, for all who ask."""

    trainer: Trainer
    events: Iterator[str] = field(init=False)
    output: str = ""

    def __post_init__(self) -> None:
        self.events = self._events()

    def _events(self) -> Iterator[str]:
        self.trainer.start()
        for number in (1, 2):
            self.trainer.wait_for_acceptance(number)
            yield f"saved {number}"
        self.trainer.kill_worker()
        yield "killed"
        self.output = self.trainer.finish()


@pytest.fixture(scope="session")
def lost_worker(run_file, tmp_path_factory):
    own_cache = {"JAX_COMPILATION_CACHE_DIR": ""}  # the run's: what other tests compiled is not there
    run_dir = f"{tmp_path_factory.mktemp('lost')}/watched"
    lost = LostWorker(Trainer(run_file, run_dir, ("train.sample_tokens=8",), own_cache))
    yield lost
    if lost.trainer.process and lost.trainer.process.poll() is None:
        lost.trainer.kill_everything()


def _trains(process: psutil.Process, home: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        is_train = process.cmdline()[1:4] == ["-m", "openmoe.platform", "train"]
        return is_train and process.environ().get("OPENMOE_HOME") == str(home)
    return False


@pytest.fixture(scope="session")
def driver_of():
    """Returns the function that finds the one driver that the controller of a home has started."""

    def find(home: Path) -> psutil.Process:
        [driver] = [process for process in psutil.process_iter() if _trains(process, home)]
        return driver

    return find


@dataclass(frozen=True)
class Twin:
    """A cluster of two slices with two hosts each, kept in a home of its own, and the means to break it."""

    home: Path
    spec: ClusterSpec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def state_dir(self) -> Path:
        return self.home / "clusters" / self.name

    def up(self) -> list[str]:
        """Starts what does not run; returns what was said."""
        said = []
        twin_module.up(self.spec, self.state_dir, said.append)
        return said

    def states(self) -> dict[str, str]:
        return {each.name: each.state for each in twin_module.status(self.state_dir).slices}

    def processes(self, node: str = "", words: str = "") -> list[psutil.Process]:
        """Live processes of the nodes whose name starts with `node` (all: ""), and whose command line has `words`."""
        ours = f"{twin_state.load(self.state_dir).temp_dir.name}/{node}"
        found = []
        for process in processes.marked(lambda mark: mark.startswith(ours)):
            with contextlib.suppress(psutil.Error):
                if words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill_host(self, name: str) -> None:
        """A machine dies: all of its processes, at once."""
        twin_state.load(self.state_dir).kill([name])

    def freeze_host(self, name: str) -> None:
        """A machine freezes: all of its processes stop, and their connections stay."""
        for process in self.processes(f"{name}/"):
            process.suspend()

    def environment(self) -> dict[str, str]:
        """What a program needs to join the cluster as a driver."""
        connection = twin_module.connection(self.state_dir)
        joined = {"RAY_ADDRESS": connection.gcs_address, "RAY_AUTH_TOKEN": connection.token_file.read_text()}
        return {**os.environ, **joined, "RAY_AUTH_MODE": "token"}


def pytest_collection_modifyitems(items):
    """Tests of the twin last: its five Ray nodes cost CPU even when idle, and are there from the first of them on."""
    items.sort(key=lambda item: "the_twin" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def the_twin(tmp_path_factory):
    """The one twin of all tests, taken down when they are done."""
    home = tmp_path_factory.mktemp("home")
    spec = ClusterSpec(name="twin", provider="twin", accelerator="v4", topology="2x2x2", slices=2)
    made = Twin(home, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENMOE_HOME", str(home))  # of the head's jobs too
        yield made
        twin_module.down(made.state_dir, print)


@pytest.fixture(scope="module")
def twin(the_twin):
    """The twin, running and whole; a module may leave it broken."""
    the_twin.up()
    return the_twin
