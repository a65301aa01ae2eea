"""Joins the Ray cluster that the environment names, or starts a Ray on this machine while it is needed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from types import FrameType

from openmoe.clusters import local_ray
from openmoe.platform.run_file.spec import ClusterConfig


@contextlib.contextmanager
def started(cluster: ClusterConfig) -> Generator[str]:
    """Yields where Ray runs, in words; a Ray that was started here ends with the block.

    `RAY_ADDRESS` names a running cluster, as it does inside a Ray job. Ray's own lines go to its log folder; nothing
    that is printed to stdout inside the block is seen.

    Raises:
      LocalRayError: this machine cannot start it, or has not the devices for the workers.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # Left to itself, Ray turns tokens on in some of its parts and not in others.
        os.environ.setdefault("RAY_AUTH_MODE", "token" if _has_token() else "disabled")
    else:
        os.environ.update(local_ray.environment())
        # A process less in every group: nobody but Ray itself could announce that it takes this machine away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    if address or cluster.dashboard_port is not None:
        os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "1"  # the dashboard's Train page; costs 10 s at start
        # Its search for runs that were killed: where a slice had gone, the end of a group waited 30 s for it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION", "0")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # of 30 s of notice, Ray's 5 are too many
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # of 2: a dead worker is noticed sooner
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a thread that outlives `ray.shutdown` would start another Ray
    import ray

    if ray.is_initialized():
        yield "the Ray of this process"
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address:
        with signals_wait():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        where = f"the Ray cluster at {address}"
    else:
        needed = int(cluster.num_workers * cluster.cpus_per_worker + 0.999)
        arguments = local_ray.init_arguments(
            num_cpus=needed + 1,  # one for the coming pass of the data, while all workers train
            object_store_bytes=cluster.object_store_bytes,
            dashboard_port=cluster.dashboard_port,
        )
        local_ray.remove_old_sessions(Path(local_ray.log_dir()), time.time())
        has_api_server = cluster.dashboard_port is not None
        with contextlib.nullcontext() if has_api_server else local_ray.without_api_server(), signals_wait():
            ray.init(**arguments)
        where = f"a Ray on this machine (logs: {local_ray.log_dir()}/session_latest/logs)"
    try:
        if not address and (problem := lacking(cluster, ray.cluster_resources())):
            raise local_ray.LocalRayError(problem)
        # Ray prints there what its logs have, such as the state of a raylet that died.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield where
    finally:
        ray.shutdown()


@contextlib.contextmanager
def signals_wait() -> Generator[None]:
    """Lets a request to stop wait for the end of the block: an exception inside `ray.init` ends in a crash of Ray.

    A second one does not wait: a cluster may not answer for long.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    asked = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def wait(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            stop()

    def stop() -> None:
        for each in asked:
            if came or signal.getsignal(each) is wait:  # else Ray has put one of its own there, which ends it properly
                signal.signal(each, before[each])
        if came:
            signal.raise_signal(came[0])

    for number in asked if threading.current_thread() is threading.main_thread() else ():
        signal.signal(number, wait)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            stop()


def lacking(cluster: ClusterConfig, resources: Mapping[str, float]) -> str:
    """Returns what a Ray of one machine lacks for a run, with the remedy; "" if nothing: it would wait for ever."""
    wanted = cluster.num_workers * cluster.devices_per_worker
    here = int(resources.get(cluster.accelerator.upper(), 0))
    if cluster.accelerator == "cpu" or here >= wanted:  # as many CPUs as are wanted are told to Ray
        return ""
    return (
        f"cluster: {cluster.num_workers} workers with {cluster.devices_per_worker} {cluster.accelerator} devices each, "
        f"and Ray finds {here} on this machine; set num_workers, devices_per_worker and mesh to what there is, or hand "
        "the run to a cluster (`openmoe submit`, or RAY_ADDRESS)"
    )


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()
