"""A TPU cluster's twin on this machine: a real Ray head and real raylets that Ray takes for TPU hosts in slices.

A slice is started, and ends, as a whole: a run needs all of its hosts. A plain local Ray (provider `local`) is the same
without slices.
"""

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openmoe.clusters import processes, provider, ray_start, twin_start, twin_state
from openmoe.clusters.provider import Instance, InstanceState
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.twin_state import HEAD, Cluster, Connection, Node, TwinError

Say = Callable[[str], None]
SliceState = Literal["ready", "broken", "preempted", "stopped"]


@dataclass(frozen=True, kw_only=True)
class HostStatus:
    """One host: whether it runs, and what its provider says."""

    name: str
    worker_id: int
    ip: str
    alive: bool
    instance: InstanceState
    since_s: float
    pid: int | None
    """Of its `ray start`, alive or not."""


@dataclass(frozen=True, kw_only=True)
class SliceStatus:
    """One slice: ready only if each of its hosts is."""

    name: str
    state: SliceState
    hosts: tuple[HostStatus, ...]


@dataclass(frozen=True, kw_only=True)
class ClusterStatus:
    """A cluster, as its recorded processes and its provider's records have it."""

    name: str
    provider: str
    head_alive: bool
    connection: Connection | None
    """None if nothing was started."""
    slices: tuple[SliceStatus, ...]


def up(spec: ClusterSpec, state_dir: Path, say: Say) -> Connection:
    """Starts what does not run: all if the head does not, else every slice that is not whole.

    Args:
      spec: of provider twin or local.
      state_dir: where the cluster is kept; its name is the cluster's.
      say: gets a line for each thing done.

    Raises:
      TwinError: this machine cannot, or another command is at work on the cluster.
      StartFailed: Ray does not start.
    """
    twin_start.check_possible(spec)
    with twin_state.locked(state_dir, "up"):
        began_s = time.monotonic()
        cluster = twin_state.load(state_dir)
        nodes = cluster.nodes() if cluster else {}
        if cluster and HEAD in nodes and nodes[HEAD].alive:
            _check_unchanged(cluster, spec)
            say(f"head ({cluster.gcs_address}) runs")
        else:
            if cluster:
                _clear(cluster, say)
            cluster, nodes = _start_head(spec, state_dir, say), {}
        _start_slices(cluster, nodes, say)
        say(f"cluster {spec.name} is up, {time.monotonic() - began_s:.0f} s")
        return cluster.connection


def _check_unchanged(cluster: Cluster, spec: ClusterSpec) -> None:
    if cluster.spec != spec:
        changed = [name for name in ClusterSpec.model_fields if getattr(cluster.spec, name) != getattr(spec, name)]
        raise TwinError(
            f"cluster {spec.name}: runs with other settings ({', '.join(changed)}); "
            f"first `openmoe cluster down {spec.name}`"
        )


def _clear(cluster: Cluster, say: Say) -> None:
    """Ends what is left of a cluster whose head is gone; the token stays, so that clients need no new one."""
    ended = cluster.kill_all()
    say(f"head is gone; ended what was left ({ended} processes), all starts anew")
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    for folder in ("nodes", "instances"):
        shutil.rmtree(cluster.state_dir / folder, ignore_errors=True)


def _start_head(spec: ClusterSpec, state_dir: Path, say: Say) -> Cluster:
    twin_start.check_shared_memory(spec, 1 + spec.num_hosts)
    say(_announcement(spec))
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    ip, gcs_address, dashboard_url = twin_start.addresses(state_dir)
    cluster = Cluster(
        state_dir=state_dir,
        spec=spec,
        temp_dir=Path(tempfile.mkdtemp(prefix="openmoe-", dir="/tmp")),
        ip=ip,
        gcs_address=gcs_address,
        dashboard_url=dashboard_url,
    )
    cluster.save()
    if not cluster.token_file.exists():
        with os.fdopen(os.open(cluster.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    provider.write(state_dir, ray_start.planned(spec, ray_start.subnet(state_dir)))
    say(f"head ({gcs_address}): {twin_start.start_head(cluster, say):.1f} s")
    return cluster


def _announcement(spec: ClusterSpec) -> str:
    hosts = f" and {spec.num_hosts} hosts in {spec.slices} slice(s)" if spec.num_hosts else ""
    needed_gb = 0.9 + 0.3 * spec.num_hosts  # measured, with nothing running on them
    return f"starting a head{hosts}: {needed_gb:.1f} GB of memory, and some 5 s each on idle cores"


def _start_slices(cluster: Cluster, nodes: Mapping[str, Node], say: Say) -> None:
    for one in _slices(cluster, nodes, head_alive=True):
        if one.state == "ready":
            say(f"{one.name} runs")
            continue
        if one.state != "stopped":
            ended = cluster.kill(host.name for host in one.hosts)
            say(f"{one.name} is {one.state}; ended what was left ({ended} processes)")
        twin_start.check_shared_memory(cluster.spec, len(one.hosts))
        hosts = [each for each in instances(cluster.state_dir) if each.slice == one.name]
        for host in hosts:
            say(f"{host.name} ({host.ip}): {twin_start.start_host(cluster, host, say):.1f} s")
        # Only now: who asks meanwhile why the slice's hosts went away still finds the answer.
        provider.set_state(cluster.state_dir, hosts, "RUNNING", time.time())


def down(state_dir: Path, say: Say) -> None:
    """Ends all processes of a cluster, whatever is left of them, and removes its files.

    Raises:
      TwinError: another command is at work on the cluster.
    """
    with twin_state.locked(state_dir, "down"):
        cluster = twin_state.load(state_dir)
        if cluster is None:
            say(f"cluster {state_dir.name} is not up")
            return
        nodes = cluster.nodes().values()
        alive = sum(node.alive for node in nodes)
        ended = cluster.kill_all()
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)
        shutil.rmtree(state_dir)
        say(f"cluster {state_dir.name} is down: {alive} of {len(nodes)} nodes were alive, {ended} processes ended")


def status(state_dir: Path) -> ClusterStatus:
    """Returns what the records and processes of this machine show; Ray is not asked."""
    cluster = twin_state.load(state_dir)
    if cluster is None:
        return ClusterStatus(name=state_dir.name, provider="", head_alive=False, connection=None, slices=())
    nodes = cluster.nodes()
    head_alive = HEAD in nodes and nodes[HEAD].alive
    return ClusterStatus(
        name=state_dir.name,
        provider=cluster.spec.provider,
        head_alive=head_alive,
        connection=cluster.connection,
        slices=_slices(cluster, nodes, head_alive=head_alive),
    )


def _slices(cluster: Cluster, nodes: Mapping[str, Node], *, head_alive: bool) -> tuple[SliceStatus, ...]:
    hosts: dict[str, list[HostStatus]] = {}
    for instance in instances(cluster.state_dir):
        node = nodes.get(instance.name)
        hosts.setdefault(instance.slice, []).append(
            HostStatus(
                name=instance.name,
                worker_id=instance.worker_id,
                ip=instance.ip,
                alive=node is not None and node.alive,
                instance=instance.state,
                since_s=instance.since_s,
                pid=node.processes[0].pid if node else None,
            )
        )
    return tuple(
        SliceStatus(name=name, state=slice_state(of, head_alive=head_alive), hosts=tuple(of))
        for name, of in hosts.items()
    )


def slice_state(hosts: Sequence[HostStatus], *, head_alive: bool) -> SliceState:
    """Returns what a slice is as a whole: what the provider says comes first, then what lives."""
    records = {host.instance for host in hosts}
    if "PREEMPTED" in records:
        return "preempted"
    if "STOPPED" in records:
        return "stopped"
    return "ready" if head_alive and all(host.alive for host in hosts) else "broken"


def preempt(state_dir: Path, slice: str, grace_s: float, say: Say) -> None:
    """Takes a slice away as a cloud does: the provider's record, notice if there is any, then the power.

    Args:
      state_dir: of a cluster that is up.
      slice: its name.
      grace_s: seconds from the notice to the end; 0 gives none.
      say: gets a line for each thing done.

    Raises:
      TwinError: no such slice, no cluster, or another command is at work on it.
    """
    with twin_state.locked(state_dir, "preempt"):
        cluster = _loaded(state_dir)
        hosts = [instance for instance in instances(state_dir) if instance.slice == slice]
        if not hosts:
            slices = dict.fromkeys(instance.slice for instance in instances(state_dir))
            raise TwinError(f"cluster {state_dir.name}: no slice {slice!r}; it has {', '.join(slices) or 'none'}")
        nodes = [node for name, node in cluster.nodes().items() if name in {host.name for host in hosts}]
        provider.set_state(state_dir, hosts, "PREEMPTED", time.time())
        say(f"{slice}: the provider's record says PREEMPTED")
    # From here without the lock: a long notice keeps nobody from taking the cluster down. An `up` meanwhile starts
    # other processes, which are not ours to kill.
    try:
        alive = [node for node in nodes if node.alive]
        if grace_s > 0 and alive:
            told = _drain(cluster, alive, grace_s)
            say(f"{slice}: Ray has been told of {told} of {len(hosts)} hosts, which go in {grace_s:g} s")
            time.sleep(grace_s)
    finally:
        ended = processes.kill({node.mark for node in nodes}.__contains__)
        say(f"{slice}: its {len(hosts)} hosts are gone ({ended} processes)")


def _drain(cluster: Cluster, nodes: Sequence[Node], grace_s: float) -> int:
    """Tells Ray of all nodes at once; returns how many it acknowledged."""
    environment = ray_start.environment(os.environ, cluster.token_file)
    asked = [
        subprocess.Popen(
            ray_start.drain_command(
                gcs_address=cluster.gcs_address, node_id=node.node_id, grace_s=grace_s, why="preempted by the provider"
            ),
            env=environment,
            cwd=cluster.state_dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for node in nodes
    ]
    return sum(process.wait() == 0 for process in asked)


def instances(state_dir: Path) -> list[Instance]:
    """Returns what the provider says of each host; cheap, and empty when there is no such cluster."""
    return provider.read_all(state_dir)


def settings(state_dir: Path) -> ClusterSpec:
    """Returns the settings of a cluster that was started.

    Raises:
      TwinError: there is none.
    """
    return _loaded(state_dir).spec


def connection(state_dir: Path) -> Connection:
    """Returns how to reach the cluster.

    Raises:
      TwinError: it is not up, or its head is dead.
    """
    cluster = _loaded(state_dir)
    head = cluster.nodes().get(HEAD)
    if head is None or not head.alive:
        raise TwinError(f"cluster {state_dir.name}: its head is dead; `openmoe cluster up {state_dir.name}` starts it")
    return cluster.connection


def _loaded(state_dir: Path) -> Cluster:
    cluster = twin_state.load(state_dir)
    if cluster is None:
        raise TwinError(f"cluster {state_dir.name}: not up; `openmoe cluster up FILE` starts it")
    return cluster
