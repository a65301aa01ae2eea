"""Starts the Ray nodes of a cluster on this machine, one by one, each until Ray knows it."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from openmoe.clusters import local_ray, processes, ray_nodes, ray_start
from openmoe.clusters.processes import Process
from openmoe.clusters.provider import Instance
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.twin_state import HEAD, Cluster, Node, StartFailed, TwinError

TIMEOUT_S = 120.0
# A raylet dies when its agents need more than 15 s to start, and `ray start` gives up after 30 s; neither can be set,
# and a machine with more to do than it has cores can be that slow.
TRIES = 6
# `ray start` ends when one of these does, but looks only once a second, and not at all after a clean exit.
_HEAD_PROCESSES = ("gcs_server", "raylet")
_HOST_PROCESSES = ("raylet",)


def check_possible(spec: ClusterSpec) -> None:
    """Raises TwinError if this machine cannot be what `spec` says."""
    if spec.provider not in ("twin", "local"):
        raise TwinError(
            f"provider {spec.provider}: started by its own tools; `openmoe cluster render FILE` writes what they take"
        )
    if spec.provider == "twin" and not sys.platform.startswith("linux"):
        raise TwinError(
            f"provider twin: needs Linux, this is {sys.platform}; provider local (plain local Ray) runs here"
        )
    if spec.num_hosts > ray_start.MOST_HOSTS:
        raise TwinError(
            f"slices: {spec.num_hosts} hosts are more than a twin's {ray_start.MOST_HOSTS} addresses; take fewer slices"
        )


def check_shared_memory(spec: ClusterSpec, num_nodes: int) -> None:
    """Raises TwinError if the object stores of so many more nodes do not fit."""
    needed = num_nodes * ray_start.OBJECT_STORE_BYTES
    try:
        local_ray.check_shared_memory(needed)
    except local_ray.LocalRayError as error:
        raise TwinError(
            f"cluster {spec.name}: the object stores of {num_nodes} Ray nodes take {needed:,} bytes of "
            f"{local_ray.SHARED_MEMORY}, which has less free; mount a larger one, or take fewer slices"
        ) from error


def addresses(state_dir: Path) -> tuple[str | None, str, str]:
    """Chooses the head's address (None where only Ray's own choice works), that of its GCS and its dashboard's URL."""
    ip = f"{ray_start.subnet(state_dir)}.1" if sys.platform.startswith("linux") else None
    ports = _free_ports(state_dir, 0)
    return ip, f"{ip or '127.0.0.1'}:{next(ports)}", f"http://127.0.0.1:{next(ports)}"


def _free_ports(state_dir: Path, block: int) -> Iterator[int]:
    """Yields ports that are free on all addresses, first those of the cluster's block of this number.

    The blocks keep nodes apart that have been given ports and do not use them yet.
    """
    first = ray_start.first_port(state_dir) + block * ray_start.PORTS_OF_A_NODE
    for port in range(first, ray_start.PORTS.stop):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        yield port
    raise TwinError(f"no free port between {first} and {ray_start.PORTS.stop}; end what uses them")


def start_head(cluster: Cluster, say: Callable[[str], None]) -> float:
    """Starts the head; returns the seconds that it took.

    Raises:
      StartFailed: Ray does not start.
    """
    began_s = time.monotonic()
    cpus = cluster.spec.head.cpus
    if cluster.spec.provider == "local":  # its workers run here too: two of them leave one CPU for data work
        cpus = max(cpus, os.cpu_count() or 1, 3)
    agent_port = next(_free_ports(cluster.state_dir, 1))
    command = ray_start.head_command(
        cpus=cpus,
        ip=cluster.ip,
        port=int(cluster.gcs_address.rpartition(":")[2]),
        dashboard_port=int(cluster.dashboard_url.rpartition(":")[2]),
        temp_dir=cluster.node_dir(HEAD),
        agent_port=agent_port,
    )
    _start(cluster, HEAD, cluster.ip, command, {}, _HEAD_PROCESSES, say)
    _wait_until_open(agent_port)  # jobs are submitted through it
    return time.monotonic() - began_s


def start_host(cluster: Cluster, instance: Instance, say: Callable[[str], None]) -> float:
    """Starts a TPU host; returns the seconds that it took.

    Raises:
      StartFailed: Ray does not start.
    """
    began_s = time.monotonic()
    command = ray_start.host_command(
        cluster.spec,
        instance,
        gcs_address=cluster.gcs_address,
        temp_dir=cluster.node_dir(instance.name),
        agent_port=next(_free_ports(cluster.state_dir, int(instance.ip.rpartition(".")[2]))),
    )
    more = ray_start.host_environment(cluster.spec, instance)
    _start(cluster, instance.name, instance.ip, command, more, _HOST_PROCESSES, say)
    return time.monotonic() - began_s


def _start(
    cluster: Cluster,
    name: str,
    ip: str | None,
    command: list[str],
    more: dict[str, str],
    needed: tuple[str, ...],
    say: Callable[[str], None],
) -> None:
    environment = ray_start.environment(os.environ, cluster.token_file) | more
    for count in range(1, TRIES + 1):
        cluster.kill([name])
        shutil.rmtree(cluster.node_dir(name), ignore_errors=True)
        cluster.log(name).unlink(missing_ok=True)
        earlier = {node.node_id for node in _known(cluster)}
        mark = cluster.new_mark(name)
        leader = processes.start(
            command, mark=mark, environment=environment, log=cluster.log(name), folder=cluster.state_dir
        )
        cluster.save_node(Node(name=name, mark=mark, node_id="", processes=(leader,)))
        parts: list[Process] = []
        deadline_s = time.monotonic() + TIMEOUT_S
        while leader.alive and all(part.alive for part in parts) and time.monotonic() < deadline_s:
            if len(parts) < len(needed):
                parts = processes.children(leader, needed)
            elif node_id := _registered(cluster, ip, earlier):
                cluster.save_node(Node(name=name, mark=mark, node_id=node_id, processes=(leader, *parts)))
                return
            time.sleep(0.2)
        say(f"{name}: Ray did not come up, try {count} of {TRIES}")
    cluster.kill([name])
    said = "\n".join(_last_lines(cluster.log(name)))
    raise StartFailed(f"{name}: Ray did not start, tried {TRIES} times; it said ({cluster.log(name)}):\n{said}")


def _known(cluster: Cluster) -> list[ray_nodes.Node]:
    return ray_nodes.nodes(cluster.dashboard_url, cluster.token_file) or []


def _registered(cluster: Cluster, ip: str | None, earlier: set[str]) -> str | None:
    """Returns the id of a node at `ip` that was not there earlier."""
    for node in _known(cluster):
        if node.alive and node.node_id not in earlier and ip in (node.ip, None):
            return node.node_id
    return None


def _wait_until_open(port: int) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise StartFailed(f"{HEAD}: Ray's agent, through which jobs are submitted, did not start in {TIMEOUT_S:.0f} s")


def _last_lines(log: Path, count: int = 15) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-count:] if log.exists() else []
