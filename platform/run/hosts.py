"""The machines under a worker group: which still live, what the provider says of them, which must be given up.

A slice is whole or useless. Ray reserves the head of a slice without asking whether the rest of it lives, and
would choose the living head of a broken slice again and again; so a broken slice is drained as a whole.
"""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
import ray.util.tpu
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from openmoe.clusters import ray_start
from openmoe.clusters.provider import Instance
from openmoe.platform.run.slices import WORKER_ID, slice_of
from openmoe.platform.run.verdict import Host
from openmoe.platform.run_file.spec import ClusterConfig
from openmoe.platform.train import memory_kills as kills

PROBE_TIMEOUT_S = 2.0
ASK_TIMEOUT_S = 10.0
NOT_DRAINED_S = 60.0


class Watch:
    """The machines of one incarnation, from before its workers start until after they ended."""

    def __init__(self, num_workers: int, instances: Callable[[], Iterable[Instance]]) -> None:
        """Remembers which hosts there are.

        Args:
          num_workers: of the group.
          instances: reads the provider's records; none where it has none.
        """
        self.ranks = set(range(num_workers))
        self._instances, self._began_s = instances, time.time()
        self._at_start = {node["NodeID"] for node in ray.nodes() if node["Alive"] and slice_of(node)}

    def look(self, placements: Mapping[int, str]) -> tuple[Host, ...]:
        """Returns the group's hosts as they are now, with the rest of their slices.

        A killed raylet stays alive in Ray's tables for some seconds; so each one is asked for a connection. Workers
        that died before they said where they were are counted to the hosts that were lost since the start.

        Args:
          placements: Ray node id by rank, as the workers said when they started.
        """
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, node_id in sorted(placements.items()):
            ranks[node_id].append(rank)
        missing = sorted(self.ranks - placements.keys())
        records = {(instance.slice, str(instance.worker_id)): instance for instance in self._instances()}
        nodes = [node for node in ray.nodes() if node["NodeID"] in ranks or node["NodeID"] in self._at_start]
        slices = {slice_of(node) for node in nodes if node["NodeID"] in ranks} - {""}
        hosts = []
        for node in nodes:
            host = _host(
                node, tuple(ranks[node["NodeID"]]), records.get((slice_of(node), _worker_id(node))), self._began_s
            )
            if missing and host.lost and not host.ranks:
                host = replace(host, ranks=tuple(missing))
            if host.ranks or host.slice in slices:
                hosts.append(host)
        return tuple(hosts)


def memory_kills(node_ids: Iterable[str]) -> dict[str, int | None]:
    """Returns the kernel's count of kills for memory on each node that answers."""
    ask = ray.remote(num_cpus=0, max_retries=0)(kills.count)
    pinned = {n: NodeAffinitySchedulingStrategy(n, soft=False) for n in set(node_ids)}
    asked = {ask.options(scheduling_strategy=where).remote(): node_id for node_id, where in pinned.items()}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_TIMEOUT_S) if asked else ([], [])
    found: dict[str, int | None] = {}
    for answer in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            found[asked[answer]] = ray.get(answer)
    return found


def names(placements: Mapping[int, str]) -> list[str]:
    """Returns what to call the host of each rank, in the order of the ranks: slice-a-0, or its address."""
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    return [_name(nodes[node_id]) for _, node_id in sorted(placements.items())]


def name(node_id: str) -> str:
    """Returns what to call the host that is a Ray node."""
    return names({0: node_id})[0]


def _name(node: Mapping[str, Any]) -> str:
    return f"{slice_of(node)}-{_worker_id(node)}" if slice_of(node) else node["NodeManagerAddress"]


def _host(node: Mapping[str, Any], ranks: tuple[int, ...], record: Instance | None, began_s: float) -> Host:
    alive = bool(node["Alive"]) and answers(node)
    if record is None:
        return Host(name=_name(node), slice=slice_of(node), ranks=ranks, alive=alive)
    return Host(
        name=record.name,
        slice=record.slice,
        ranks=ranks,
        alive=alive,
        # A slice that was taken away and is back already was taken away all the same.
        provider_state="PREEMPTED" if record.preempted_s >= began_s else record.state,
    )


def answers(node: Mapping[str, Any]) -> bool:
    """Returns whether the raylet of a Ray node takes a connection; a killed one stays in Ray's table for seconds."""
    try:
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        socket.create_connection(address, timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _worker_id(node: Mapping[str, Any]) -> str:
    return (node.get("Labels") or {}).get(WORKER_ID, "")


def drain_broken_slices(hosts: Sequence[Host], say: Callable[[str], None]) -> None:
    """Tells Ray to give up what still lives of slices that lost a host, and waits until it has."""
    broken = {host.slice for host in hosts if host.slice and host.lost}
    left = [node for node in ray.nodes() if node["Alive"] and slice_of(node) in broken]
    left = [node for node in left if answers(node)]
    if not left:
        return
    for name in sorted({slice_of(node) for node in left}):
        say(f"{name} is broken: draining what is left of it, so that no worker is placed there")
    for asked in [drain(node["NodeID"]) for node in left]:
        hear(asked, say)
    _wait_until_gone({node["NodeID"] for node in left}, say)


def drain(node_id: str) -> subprocess.Popen[str]:
    """Starts to tell Ray to give a node up."""
    address = ray.get_runtime_context().gcs_address
    command = ray_start.drain_command(gcs_address=address, node_id=node_id, grace_s=1, why="its slice is broken")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def hear(drain: subprocess.Popen[str], say: Callable[[str], None]) -> bool:
    """Waits for a `drain` to be told; returns whether Ray has agreed, and says it if not."""
    _, error = drain.communicate()
    if drain.returncode:
        say(f"drain: {error.strip().splitlines()[-1] if error.strip() else drain.returncode}")
    return drain.returncode == 0


def _wait_until_gone(node_ids: set[str], say: Callable[[str], None]) -> None:
    deadline_s = time.monotonic() + NOT_DRAINED_S
    while alive := [n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] in node_ids and n["Alive"]]:
        if time.monotonic() > deadline_s:
            say(f"still there {NOT_DRAINED_S:.0f} s after draining: {', '.join(alive)}")
            return
        time.sleep(0.5)


def wait_for_slices(cluster: ClusterConfig, say: Callable[[str], None], settled: Callable[[], bool]) -> None:
    """Returns when enough whole, idle slices for the run are there; says now and then what it waits for.

    Waiting is no failure: preemptible capacity comes back when it comes back.

    Args:
      cluster: of the run.
      say: told what it waits for.
      settled: asked again and again: whether no slice is there of which Ray must not reserve the head.
    """
    if cluster.accelerator != "tpu" or cluster.topology is None or cluster.accelerator_type is None:
        return
    said_s, wanted, ready = -math.inf, cluster.num_slices, 0
    while not (known := settled()) or (ready := _num_whole_slices(cluster.topology, cluster.accelerator_type)) < wanted:
        if known and time.monotonic() - said_s > 30:
            said_s = time.monotonic()
            say(f"waiting for {wanted} whole slice(s) of {cluster.accelerator_type} {cluster.topology}, {ready} ready")
        time.sleep(0.5)


def _num_whole_slices(topology: str, accelerator_type: str) -> int:
    """Counts whole, idle slices; none while Ray has yet to notice that a host of some slice is gone."""
    hosts = [node for node in ray.nodes() if node["Alive"] and slice_of(node)]
    if not all(answers(node) for node in hosts):
        return 0
    return ray.util.tpu.get_num_ready_tpu_slices(topology, accelerator_type)
