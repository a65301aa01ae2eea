"""The command lines and environments of the twin's Ray nodes. Values only."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from openmoe.clusters.provider import Instance
from openmoe.clusters.spec import ClusterSpec

OBJECT_STORE_BYTES = 200_000_000
# Below the ports that the kernel gives to outgoing connections, and above Ray's default range for workers.
PORTS = range(20_000, 32_000)
PORTS_OF_A_NODE = 4
MOST_HOSTS = 200  # the last byte of their addresses, less some
# Of the head, whose drivers write down why they stop before they are killed; Ray gives them 3 s, gs:// may need more.
JOB_STOP = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
# Of the head, which asks each raylet every second: one that was killed is seen to be dead in 4 s instead of 15, one
# that froze with its machine in 24 s instead of 65, so that a run's group ends within 30 s of either. No sooner than
# JAX would end it: a host that Ray gives up has to be started again.
HEALTH_CHECK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
# What would make a node something else than it is told to be; all of RAY_* goes too.
_FOREIGN = ("RAY_", "TPU_", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "LIBTPU_", "MEGASCALE_")


def subnet(state_dir: Path) -> str:
    """Returns the first three bytes of the cluster's own loopback addresses: "127.71.3".

    Each host needs an address of its own, or Ray takes two for one. Two clusters of one name, each in a home of its
    own, get different ones.
    """
    digest = hashlib.sha256(str(state_dir).encode()).digest()
    return f"127.{64 + digest[0] % 64}.{digest[1]}"


def first_port(state_dir: Path) -> int:
    """Returns where to begin looking for free ports: the same for one cluster each time, so that addresses stay."""
    digest = hashlib.sha256(str(state_dir).encode()).digest()
    return PORTS.start + int.from_bytes(digest[2:4], "big") % (len(PORTS) - PORTS_OF_A_NODE * (MOST_HOSTS + 20))


def slice_name(number: int) -> str:
    """Returns "slice-a" for 0, "slice-z" for 25, "slice-aa" for 26."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"slice-{letters}"


def planned(spec: ClusterSpec, network: str) -> list[Instance]:
    """Returns the instances that a cluster consists of, not started yet."""
    if not spec.has_slices:
        return []
    return [
        Instance(
            name=f"{slice_name(index)}-{worker_id}",
            slice=slice_name(index),
            worker_id=worker_id,
            ip=f"{network}.{10 + index * spec.hosts_per_slice + worker_id}",
            state="STOPPED",
            since_s=0.0,
        )
        for index in range(spec.slices)
        for worker_id in range(spec.hosts_per_slice)
    ]


def head_command(
    *, cpus: int, ip: str | None, port: int, dashboard_port: int, temp_dir: Path, agent_port: int
) -> list[str]:
    """Returns the command of the head; without an `ip` Ray takes the machine's own."""
    return [
        *_RAY,
        "start",
        "--head",
        *((f"--node-ip-address={ip}",) if ip else ()),
        f"--port={port}",
        f"--num-cpus={cpus}",
        "--num-gpus=0",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        *_node_options(temp_dir, agent_port),
    ]


def host_command(
    spec: ClusterSpec, instance: Instance, *, gcs_address: str, temp_dir: Path, agent_port: int
) -> list[str]:
    """Returns the command of a TPU host; Ray makes the slice's labels and resources from its environment."""
    return [
        *_RAY,
        "start",
        f"--address={gcs_address}",
        f"--node-ip-address={instance.ip}",
        f"--num-cpus={spec.host_cpus}",
        "--num-gpus=0",
        f"--resources={json.dumps({'TPU': spec.chips_per_host})}",
        # Forwards what workers print to drivers, which nobody here asks for; a process of 90 MB on each host.
        "--include-log-monitor=false",
        *_node_options(temp_dir, agent_port),
    ]


def _node_options(temp_dir: Path, agent_port: int) -> tuple[str, ...]:
    # The temp dir: nodes that share one delete each other's files. The agent's port: its default is bound on 127.0.0.1
    # too, whatever the node's address, and so taken by any other Ray of this machine.
    return (
        "--block",
        f"--temp-dir={temp_dir}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--dashboard-agent-listen-port={agent_port}",
        "--disable-usage-stats",
        "--log-color=false",
    )


def drain_command(*, gcs_address: str, node_id: str, grace_s: float, why: str) -> list[str]:
    """Returns Ray's own command that a node will be taken away in `grace_s` seconds: there is no public function."""
    return [
        *_RAY,
        "drain-node",
        f"--address={gcs_address}",
        f"--node-id={node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        f"--reason-message={why}",
        f"--deadline-remaining-seconds={max(1, round(grace_s))}",
    ]


def environment(inherited: Mapping[str, str], token_file: Path) -> dict[str, str]:
    """Returns the environment of every process that speaks to the cluster; the token itself is not in it."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(_FOREIGN)}
    return kept | {
        # A job's entry point says `python`: this one, which has the packages.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), inherited.get("PATH", os.defpath))),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Some of Ray's patience can be set, some not: hence the tries of twin_start.py.
        "RAY_raylet_start_wait_time_s": "180",
        "RAY_agent_register_timeout_ms": "180000",
        # Hosts of a dead head end after 20 s instead of 60: they can be of no use to a new head.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
        **JOB_STOP,
        **HEALTH_CHECK,
        "JAX_PLATFORMS": "cpu",
    }


def host_environment(spec: ClusterSpec, instance: Instance) -> dict[str, str]:
    """Returns what a TPU host has in its environment beyond that; Ray and JAX believe it."""
    return {
        "TPU_NAME": instance.slice,
        "TPU_WORKER_ID": str(instance.worker_id),
        "TPU_ACCELERATOR_TYPE": spec.pod_type,
        "TPU_TOPOLOGY": str(spec.topology),
        "JAX_NUM_CPU_DEVICES": str(spec.chips_per_host),
    }
