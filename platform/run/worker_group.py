"""One incarnation under Ray Train: start the workers, join them into one JAX process group, collect the evidence.

The only file that imports ray.train. Ray Train runs exactly one worker group per `fit()` and restarts nothing;
what follows a failure is decided by the driver.

Ray's own JAX backend does nothing on CPU, where every worker then trains alone without a word, and passes no
timeouts, so that a frozen peer is noticed only after 100 s. `JaxGroupBackend` forms the group on CPU, GPU and
TPU alike, with timeouts.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import (
    ControllerError,
    PreemptionError,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.v2.jax import JaxConfig, JaxTrainer
from ray.util.tpu import get_tpu_coordinator_env_vars

from openmoe.pipelines import storage
from openmoe.pipelines.config import DataError
from openmoe.platform.run.run_dir import RunDirError
from openmoe.platform.run.verdict import Evidence, Failure, FailureKind
from openmoe.platform.run_file.spec import ClusterConfig, RunSpec
from openmoe.platform.train import milestones

UNKNOWN_GRACE_S = 30.0  # of a drain without a deadline
KNOCK_FOR_S, KNOCK_EVERY_S = 10.0, 0.02  # at rank 0's door
GARBAGE_OBJECTS = 300_000  # more of them than before, and Python looks which are garbage


@dataclass
class JaxGroupConfig(JaxConfig):
    """Ray Train's JaxConfig, with our backend and the timeouts of the JAX process group.

    Attributes:
      heartbeat_timeout_s: a silent peer ends the group after this long.
      shutdown_timeout_s: how long the group waits for all to leave.
      init_timeout_s: how long the group waits for all to arrive.
      num_slices: TPU slices that the workers are on.
      num_gpus: of each worker, all that Ray lets it see; 0 for other devices.
    """

    heartbeat_timeout_s: int = 25
    shutdown_timeout_s: int = 20
    init_timeout_s: int = 120
    num_slices: int = 1
    num_gpus: int = 0

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend that Ray Train starts with every worker group."""
        return JaxGroupBackend


class JaxGroupBackend(Backend):
    """Joins all workers of a group into one JAX process group.

    Workers leave it themselves when they are done. After a failure nobody waits for the dead: Ray Train kills the rest.
    """

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Starts the group: rank 0 offers an address, every rank joins it."""
        assert isinstance(backend_config, JaxGroupConfig)
        address, ranks = worker_group.execute_single(0, _free_address), range(len(worker_group))
        found = [slice_environment(address, rank, len(ranks), backend_config.num_slices) for rank in ranks]
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, address, len(ranks), rank, backend_config, found[rank])
                for rank in ranks
            ]
        )


def slice_environment(address: str, rank: int, num_workers: int, num_slices: int) -> dict[str, str]:
    """Returns what libtpu on a worker must know of the slices to join them; empty for a single one.

    Ray Train sorts workers by slice, and each slice has as many.
    """
    if num_slices == 1:
        return {}
    slice_id = rank * num_slices // num_workers
    return get_tpu_coordinator_env_vars(address.rpartition(":")[0], num_slices, slice_id)


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def _join(
    address: str, num_processes: int, process_id: int, config: JaxGroupConfig, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)  # over what the provider wrote there: slices may have been replaced since
    milestones.passed("join_s")
    # A pass over the million objects of Ray, JAX and a traced step takes a quarter second, and Python would make half a
    # dozen of them until there is a step.
    gc.set_threshold(GARBAGE_OBJECTS)
    import jax

    if process_id:
        wait_for_listener(address)
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        # Else JAX takes what a batch system such as Slurm says, which knows nothing of Ray's workers.
        local_device_ids=list(range(config.num_gpus)) or None,
        heartbeat_timeout_seconds=config.heartbeat_timeout_s,
        shutdown_timeout_seconds=config.shutdown_timeout_s,
        initialization_timeout=config.init_timeout_s,
    )
    milestones.passed("joined_s")


def wait_for_listener(address: str, timeout_s: float = KNOCK_FOR_S) -> None:
    """Returns when somebody listens at `address`, or after `timeout_s`: then it is for JAX to go on trying.

    JAX's client comes too early as often as not, and tries again only after a second.
    """
    host, _, port = address.rpartition(":")
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout_s):
            return
        time.sleep(KNOCK_EVERY_S)


def run_incarnation(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    spec: RunSpec,
    name: str,
    tell: Callable[[Failure], None] = lambda failure: None,
) -> Evidence | None:
    """Runs `worker(config)` on every worker of a new group until all return or one fails.

    Args:
      worker: a module-level function; it finds the JAX process group formed.
      config: what it is given, the same on every worker.
      spec: says how many workers, on what.
      name: of this incarnation, unique in the run; Ray's Train page shows it.
      tell: called on the worker with what it raised: Ray leaves that out when a preemption is under way.

    Returns:
      None when all workers returned, else the evidence of what ended the group.
    """
    cluster = spec.cluster
    trainer = JaxTrainer(
        _in_group(worker, tell),
        train_loop_config=config,
        jax_config=JaxGroupConfig(
            use_tpu=cluster.accelerator == "tpu",
            use_gpu=cluster.accelerator == "gpu",
            heartbeat_timeout_s=cluster.heartbeat_timeout_s,
            shutdown_timeout_s=cluster.shutdown_timeout_s,
            init_timeout_s=cluster.init_timeout_s,
            num_slices=cluster.num_slices,
            num_gpus=cluster.devices_per_worker if cluster.accelerator == "gpu" else 0,
        ),
        scaling_config=scaling_config(cluster),
        run_config=RunConfig(
            name=name,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": worker_environment(cluster)},
            **storage.for_pyarrow(storage.join(spec.run_dir, "ray")),
        ),
    )
    try:
        trainer.fit()
    except PreemptionError as error:
        return Evidence(preempted_ranks=tuple(error.preemption_info.preempted_ranks))
    except WorkerGroupError as error:
        return Evidence(failures=tuple(failure_of(r, e) for r, e in sorted(error.worker_failures.items())))
    except ControllerError as error:
        return Evidence(failures=(_controller_failure(error.controller_failure),))
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        return Evidence(failures=(_controller_failure(error),))
    return None


def _in_group(
    worker: Callable[[dict[str, Any]], None], tell: Callable[[Failure], None]
) -> Callable[[dict[str, Any]], None]:
    """Returns `worker` as each rank runs it: it leaves the JAX process group when done, together with its peers.

    What it raises gets its trace as a note, since exceptions travel without theirs, and is told.
    """

    def run(config: dict[str, Any]) -> None:
        import jax

        try:
            worker(config)
        except Exception as error:
            error.add_note(traceback.format_exc())
            tell(failure_of(jax.process_index(), error))
            raise
        jax.distributed.shutdown()

    return run


def announced_end_s() -> float | None:
    """Returns the Unix time at which machines of this worker's group will be taken away; None while none is announced.

    A barrier: it returns when all workers of the group have called it as often. Ray that this command started announces
    nothing (ray_session.py), and is not asked.
    """
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":
        return None
    announced = ray.train.get_preemption_info()
    if announced is None:
        return None
    return announced.deadline_ms / 1000 if announced.deadline_ms else time.time() + UNKNOWN_GRACE_S


def scaling_config(cluster: ClusterConfig) -> ScalingConfig:
    """Returns what Ray Train reserves: one worker a TPU host, else `num_workers` of the devices they need."""
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    match cluster.accelerator:
        case "tpu":
            resources["TPU"] = cluster.chips_per_worker
            return ScalingConfig(
                num_workers=cluster.num_workers,
                use_tpu=True,
                topology=cluster.topology,
                accelerator_type=cluster.accelerator_type,
                resources_per_worker=resources,
            )
        case "gpu":
            resources["GPU"] = cluster.devices_per_worker
            return ScalingConfig(num_workers=cluster.num_workers, use_gpu=True, resources_per_worker=resources)
        case "cpu":
            return ScalingConfig(num_workers=cluster.num_workers, resources_per_worker=resources)


def worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Returns the environment of the workers: which JAX platform, and on CPU how many virtual devices.

    A TPU host decides for itself: JAX finds its chips, and a fake host says that its devices are virtual.
    """
    match cluster.accelerator:
        case "cpu":
            devices = str(cluster.devices_per_worker)
            return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices} | _kept_memory()
        case "gpu":
            return {"JAX_PLATFORMS": "cuda"}
        case "tpu":
            return {}


# In huge pages; and what a process has taken it keeps: one arena (those of threads cannot hold large arrays), which
# large arrays do not pass by, and which is not given back below a TiB of free memory at its end.
_MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
)


def _kept_memory() -> dict[str, str]:
    """Returns what lets glibc's malloc keep its memory, unless the user has tuned it; elsewhere nobody reads it.

    XLA takes the same temporary arrays from malloc in every step, which otherwise maps them anew, page fault by page
    fault, and unmaps them. It has to be set before a process starts. docs/speed.md says what it is worth.
    """
    return {} if "GLIBC_TUNABLES" in os.environ else {"GLIBC_TUNABLES": _MALLOC}


# Words of JAX's own errors when the other side of a collective, or the coordinator, has gone.
_LOST_PEER_WORDS = ("gloo", "nccl", "coordination service", "heartbeat", "connection reset", "unavailable")
# JAX on CPU, GPU and TPU say the first; CUDA, a TPU's compiler and loader, C++ and Ray's memory monitor the others.
_MEMORY_WORDS = (
    *("resource_exhausted", "cuda_error_out_of_memory", "ran out of memory in memory space", "attempting to reserve"),
    *("std::bad_alloc", "running low on memory"),
)
_KIND_OF_NAME: Mapping[str, FailureKind] = {
    "NonFiniteLoss": "bad_numbers",
    "NonFiniteState": "bad_numbers",
    "LossSpike": "bad_numbers",
    "DamagedCheckpoint": "damaged_checkpoint",
    "Superseded": "superseded",
}


def failure_of(rank: int, error: BaseException) -> Failure:
    """Returns what a worker's error says, without judging it: its trace, or of bad input its one line."""
    kind = _kind(error)
    notes = () if kind in ("bad_input", "no_storage") else getattr(error, "__notes__", ())
    return Failure(rank=rank, kind=kind, text="\n".join(notes) or str(error))


def _kind(error: BaseException) -> FailureKind:
    cause = getattr(error, "health_check_failure", error)  # a worker that could not be asked any more
    words = str(cause).lower()
    if isinstance(cause, MemoryError | ray.exceptions.OutOfMemoryError):
        return "out_of_memory"
    if any(word in words for word in _MEMORY_WORDS) or getattr(cause, "errno", None) == errno.ENOMEM:
        return "out_of_memory"
    if isinstance(cause, ray.exceptions.RayActorError):
        return "process_died"
    if isinstance(cause, storage.StorageUnavailable):
        return "no_storage"
    if isinstance(cause, DataError | RunDirError | storage.StorageError):
        return "bad_input"
    if type(cause).__name__ in _KIND_OF_NAME:
        return _KIND_OF_NAME[type(cause).__name__]
    if type(cause).__name__ == "JaxRuntimeError" and any(word in words for word in _LOST_PEER_WORDS):
        return "lost_peer"
    return "raised"


def _controller_failure(error: BaseException) -> Failure:
    kind: FailureKind = "start_timeout" if "Startup" in type(error).__name__ else "controller"
    return Failure(rank=-1, kind=kind, text=str(error))
