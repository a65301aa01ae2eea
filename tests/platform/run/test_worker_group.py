"""A worker group under a real Ray: one JAX process group on CPU, and honest evidence of how it ended."""

import errno
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
import ray.exceptions

from openmoe.pipelines.config import DataError
from openmoe.pipelines.storage import StorageError
from openmoe.platform.run import verdict, worker_group
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run.verdict import Failure
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec import ClusterConfig
from openmoe.platform.train import stacks
from openmoe.platform.train.health import LossSpike, NonFiniteLoss
from openmoe.platform.train.restore import DamagedCheckpoint
from openmoe.platform.train.saver import Superseded

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def run_group(ray_local, tmp_path_factory):
    """Runs a function on 2 workers x 2 virtual devices; functions are defined in tests, so Ray ships them by value."""
    folder = tmp_path_factory.mktemp("group")
    loaded = spec.load("quickstart", [f"run_dir={folder}"])

    def run(worker, **config):
        return worker_group.run_incarnation(worker, config, loaded, name=worker.__name__)

    return run


@pytest.fixture(scope="module")
def failed(run_group, tmp_path_factory):
    """(evidence of a group whose workers exchanged data before one of them raised, what each rank saw)."""

    def exchange_and_fail(config):
        import jax
        import numpy as np
        from jax.experimental import multihost_utils
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        mesh = jax.make_mesh((4,), ("expert",))
        own = jax.make_array_from_callback(
            (4,), NamedSharding(mesh, P("expert")), lambda index: np.arange(4.0, dtype=np.float32)[index]
        )
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(own)
        with open(f"{config['folder']}/{jax.process_index()}", "w") as file:
            file.write(f"{jax.process_count()} {jax.local_device_count()} {float(total)}")
        multihost_utils.sync_global_devices("all have written")
        if jax.process_index() == 1:
            raise KeyError("no such layer")

    folder = tmp_path_factory.mktemp("seen")
    evidence = run_group(exchange_and_fail, folder=str(folder))
    return evidence, {path.name: path.read_text() for path in folder.iterdir()}


def test_workers_on_cpu_form_one_process_group_that_exchanges_data(failed):
    assert failed[1] == {"0": "2 2 6.0", "1": "2 2 6.0"}


def test_a_rank_waits_until_rank_0_listens():
    listening = threading.Event()
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))

        def open_late():
            time.sleep(0.2)
            listening.set()
            door.listen()

        opener = threading.Thread(target=open_late)
        opener.start()
        worker_group.wait_for_listener(f"127.0.0.1:{door.getsockname()[1]}")
        opener.join()
    assert listening.is_set()
    worker_group.wait_for_listener("127.0.0.1:1", timeout_s=0.1)  # nobody ever does: that is for JAX to say


def test_an_exception_in_a_worker_is_bad_code_with_its_trace(failed):
    found = verdict.diagnose(failed[0])
    assert found.cause == "bad_code"
    assert "no such layer" in found.reason
    assert "in exchange_and_fail" in found.trace


def test_a_killed_worker_is_a_host_fault(run_group):
    def die(config):
        import jax

        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    assert verdict.diagnose(run_group(die)).cause == "host_fault"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (ray.exceptions.OutOfMemoryError("a worker was killed"), "out_of_memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."), "out_of_memory"),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
                "Used 20.13G of 15.75G hbm."
            ),
            "out_of_memory",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: Ran out of memory in memory space vmem."), "out_of_memory"),
        (
            jax.errors.JaxRuntimeError(
                "INTERNAL: Error loading program: Attempting to reserve 5.6G at the bottom of memory."
            ),
            "out_of_memory",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "out_of_memory"),
        (jax.errors.JaxRuntimeError("INTERNAL: std::bad_alloc"), "out_of_memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (OSError(errno.ENOENT, "No such file"), "raised"),
        (ray.exceptions.NodeDiedError("the node was running low on memory"), "out_of_memory"),
        (ray.exceptions.RayActorError(), "process_died"),
        (ray.exceptions.ActorDiedError(), "process_died"),
        (DataError("wiki.jsonl: no document"), "bad_input"),
        (RunDirError("run_dir: belongs to another run"), "bad_input"),
        (StorageError("shard: cannot be read"), "bad_input"),
        (NonFiniteLoss("step 3: loss nan"), "bad_numbers"),
        (LossSpike("step 3: loss 9"), "bad_numbers"),
        (DamagedCheckpoint(1, "its bits differ"), "damaged_checkpoint"),
        (Superseded("incarnation 1 is no longer the newest"), "superseded"),
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo AllReduce failed: Connection reset by peer"), "lost_peer"),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service has gone"), "lost_peer"),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ"), "raised"),
        (ValueError("gloo is a word here"), "raised"),
    ],
)
def test_what_a_worker_raised_is_named_by_its_kind(error, kind):
    assert worker_group.failure_of(3, error) == Failure(rank=3, kind=kind, text=str(error))


def test_the_trace_that_an_error_carries_is_its_text():
    error = ValueError("no such layer")
    error.add_note("Traceback: in layers.py")
    assert worker_group.failure_of(0, error) == Failure(rank=0, kind="raised", text="Traceback: in layers.py")


def test_of_bad_input_the_text_is_its_one_line_whatever_trace_it_carries():
    error = StorageError("/data/shard: cannot be read: permission denied")
    error.add_note("Traceback: in storage.py")
    assert worker_group.failure_of(1, error) == Failure(
        rank=1, kind="bad_input", text="/data/shard: cannot be read: permission denied"
    )


@pytest.mark.parametrize(
    ("cluster", "asked_for", "environment"),
    [
        (
            {"accelerator": "cpu", "num_workers": 2, "devices_per_worker": 4},
            (2, False, False, None, None, {"CPU": 1}),
            {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "4",
                "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0"
                ":glibc.malloc.trim_threshold=1099511627776",
            },
        ),
        (
            {"accelerator": "gpu", "num_workers": 3, "devices_per_worker": 8, "cpus_per_worker": 12},
            (3, True, False, None, None, {"CPU": 12, "GPU": 8}),
            {"JAX_PLATFORMS": "cuda"},
        ),
        (
            {
                **{"accelerator": "tpu", "num_workers": 4, "devices_per_worker": 4, "cpus_per_worker": 2},
                **{"topology": "2x2x2", "accelerator_type": "TPU-V4"},
            },
            (4, False, True, "2x2x2", "TPU-V4", {"CPU": 2, "TPU": 4}),
            {},
        ),
        (
            {
                **{"accelerator": "tpu", "num_workers": 2, "devices_per_worker": 8},
                **{"topology": "2x2x2", "accelerator_type": "TPU-V7X"},
            },
            (2, False, True, "2x2x2", "TPU-V7X", {"CPU": 1, "TPU": 4}),
            {},
        ),
    ],
)
def test_ray_is_asked_for_whole_workers_and_jax_finds_their_platform(cluster, asked_for, environment, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    config = ClusterConfig(**cluster)
    asked = worker_group.scaling_config(config)
    assert asked_for == (
        asked.num_workers,
        asked.use_gpu,
        asked.use_tpu,
        asked.topology,
        asked.accelerator_type,
        asked.resources_per_worker,
    )
    assert worker_group.worker_environment(config) == environment


def test_workers_on_several_slices_are_told_which_is_theirs():
    """Ray Train sorts them by slice; one slice needs nothing."""
    found = [worker_group.slice_environment("10.0.0.1:4321", rank, 4, 2) for rank in range(4)]
    assert [each["MEGASCALE_SLICE_ID"] for each in found] == ["0", "0", "1", "1"]
    assert {each["MEGASCALE_COORDINATOR_ADDRESS"] for each in found} == {"10.0.0.1"}
    assert {each["MEGASCALE_NUM_SLICES"] for each in found} == {"2"}
    assert worker_group.slice_environment("10.0.0.1:4321", 3, 4, 1) == {}


def test_a_worker_takes_the_gpus_that_ray_gave_it_and_learns_its_slice():
    """Whatever a batch system says of the host's. In a process of its own, since a group is joined once."""
    code = (
        "import os, jax; from openmoe.platform.run import worker_group as w; "
        "w._join(w._free_address(), 1, 0, w.JaxGroupConfig(num_gpus=2), {'MEGASCALE_SLICE_ID': '1'}); "
        "print(jax.config.values['jax_cuda_visible_devices'], os.environ['MEGASCALE_SLICE_ID'])"
    )
    environment = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_LOCALID": "7"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.split() == ["0,1", "1"]


@pytest.mark.parametrize(
    ("cluster", "slices"),
    [
        ({"accelerator_type": "TPU-V4", "topology": "2x2x2", "num_workers": 2}, 1),
        ({"accelerator_type": "TPU-V4", "topology": "2x2x2", "num_workers": 4}, 2),
        ({"accelerator_type": "TPU-V5LITEPOD", "topology": "4x4", "num_workers": 8}, 2),
        ({"accelerator_type": "TPU-V99", "topology": "4x4", "num_workers": 8}, 1),
    ],
)
def test_slices_follow_from_workers_and_topology(cluster, slices):
    config = ClusterConfig(accelerator="tpu", devices_per_worker=4, **cluster)
    assert config.num_slices == slices
    assert (f" in {slices} slices of " in str(config)) == (slices > 1)


def test_what_the_user_has_told_malloc_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    config = ClusterConfig(accelerator="cpu", num_workers=1, devices_per_worker=1)
    assert worker_group.worker_environment(config) == {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def test_a_worker_that_lives_and_gets_nowhere_is_a_hang_that_names_where_it_stood(run_group, tmp_path):
    from openmoe.platform.run import board as boards

    def wait_for_what_never_comes(config):
        import threading

        import jax
        from jax.experimental import multihost_utils

        from openmoe.platform.train import worker

        rank = jax.process_index()
        keep = functools.partial(stacks.keep, RunDir(config["run_dir"]), 7, rank)
        with worker.watched(config["board"], rank, 3 if rank == 1 else 60, keep):
            if rank == 1:
                threading.Event().wait()
            multihost_utils.sync_global_devices("all are here")

    board = boards.start()
    evidence = run_group(wait_for_what_never_comes, board=board, run_dir=str(tmp_path))
    found = verdict.diagnose(evidence.with_told(boards.ask(board.failures.remote(), {})))
    assert (found.cause, found.reason) == ("hang", "rank 1 made no progress: stuck here: no step for 3 s")
    assert "in wait_for_what_never_comes" in found.trace
    run = RunDir(str(tmp_path))
    assert (stacks.kept(run, 7), stacks.kept(run, 8)) == (["stacks/000007-00001.txt"], [])
    text = (tmp_path / "stacks" / "000007-00001.txt").read_text()
    assert "in wait_for_what_never_comes" in text
    assert "thread watchdog\n" in text


def test_a_board_that_is_gone_answers_nothing_and_ends_no_run(ray_local):
    from openmoe.platform.run import board as boards

    board = boards.start()
    board.put.remote({"step": 3})
    assert boards.ask(board.take.remote(), None) == {"step": 3, "rendered_groups": 0}
    ray_local.kill(board)
    assert boards.ask(board.take.remote(), None) is None
    assert boards.ask(board.placements.remote(), {0: "node"}) == {0: "node"}
    another = boards.living(board)
    assert boards.ask(another.placements.remote(), None) == {}
    assert boards.living(another) is another
