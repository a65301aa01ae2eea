"""On each host of Google Cloud, beside `ray start`: hears that the host will be taken away, and drains its slice.

Ray does not watch the metadata server. The agent asks it to answer when something changes (a long poll), and then has
Ray drain every host of the slice, as what Ray calls a preemption with a deadline: the run hears of it, saves if that
fits, and its end is known to be a preemption. This file needs nothing but Python and Ray, no OpenMoE: Ray's launcher
copies it to the hosts.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import http.client
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

METADATA_URL = "http://metadata.google.internal/computeMetadata/v1"
SPOT_GRACE_S = 30.0
MAINTENANCE_GRACE_S = 3600.0
POLL_S = 60  # after which the server answers even if nothing has changed
RETRY_S = 0.5
SLICE = "ray.io/tpu-slice-name"  # label that Ray gives to TPU hosts


def notice_s(
    key: str, value: str, *, spot_s: float = SPOT_GRACE_S, maintenance_s: float = MAINTENANCE_GRACE_S
) -> float:
    """Returns how long the host stays when a value of the metadata server says so; 0 for one that takes nothing away.

    A migration (MIGRATE_ON_HOST_MAINTENANCE) only pauses the host, and is not known to TPUs.
    """
    match key, value.strip().upper():
        case "preempted", "TRUE":
            return spot_s
        case "maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE":
            return maintenance_s
    return 0.0


def watch(key: str, url: str, heard: Callable[[str], bool], say: Callable[[str], None]) -> None:
    """Follows a value of the metadata server until `heard(value)`, called at each change, returns true.

    What goes wrong meanwhile is said once, and tried again: the server may be restarted, and lose connections.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    etag, trouble = "0", ""  # with which the server answers at once
    while True:
        address = f"{url}/instance/{key}?wait_for_change=true&last_etag={etag}&timeout_sec={POLL_S}"
        request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
        try:
            with opener.open(request, timeout=POLL_S + 15) as answer:
                value, newest = answer.read().decode(), answer.headers["ETag"]
            if newest is None:
                raise ValueError(f"{url} is no metadata server: it gives no ETag")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if str(error) != trouble:
                trouble = str(error)
                say(f"{key}: {trouble}; trying on")
            time.sleep(RETRY_S)
            continue
        changed, etag, trouble = newest != etag, newest, ""
        if changed and heard(value):
            return


def drain_slice(address: str, slice_name: str, grace_s: float, say: Callable[[str], None]) -> bool:
    """Has Ray drain the hosts of a slice; returns whether it took all.

    Args:
      address: of the cluster; "auto" for the one that this host is in.
      slice_name: of the slice; "" for the one that this host is in, or for the host alone if it is in none.
      grace_s: from now, until they are gone.
      say: gets a line for each thing done.
    """
    import ray

    deadline_s = time.monotonic() + grace_s
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        here, gcs_address = ray.get_runtime_context().get_node_id(), ray.get_runtime_context().gcs_address
        alive = {node["NodeID"]: node.get("Labels") or {} for node in ray.nodes() if node["Alive"]}
        name = slice_name or alive[here].get(SLICE, "")
        hosts = [node_id for node_id, labels in alive.items() if labels.get(SLICE) == name] if name else [here]
        left_s = max(1, round(deadline_s - time.monotonic()))
        drains = [subprocess.Popen(drain_command(gcs_address, node_id, left_s)) for node_id in hosts]
        taken = sum(drain.wait() == 0 for drain in drains)
    finally:
        ray.shutdown()
    say(f"{name or 'this host'}: Ray has been told of {taken} of {len(hosts)} hosts, which go in {left_s} s")
    return taken == len(hosts)


def drain_command(gcs_address: str, node_id: str, grace_s: int) -> list[str]:
    """Returns what `ray_start.drain_command` of openmoe.clusters does, which cannot be imported here."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={gcs_address}"]
    command += [f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
    return [*command, "--reason-message=preempted by the provider", f"--deadline-remaining-seconds={grace_s}"]


def follow(
    url: str,
    drain: Callable[[float], bool],
    say: Callable[[str], None],
    *,
    spot_s: float = SPOT_GRACE_S,
    maintenance_s: float = MAINTENANCE_GRACE_S,
) -> None:
    """Watches for both kinds of notice until a preemption has been passed on; a maintenance does not end the watch.

    Args:
      url: of the metadata server, with its version.
      drain: passes on that the host goes in so many seconds; tried again while it returns false or raises.
      say: gets a line for each thing heard and done.
      spot_s: what a preemption leaves.
      maintenance_s: what a maintenance leaves.
    """
    one_at_a_time = threading.Lock()  # Ray knows one connection a process

    def heard(key: str, value: str) -> bool:
        left_s = notice_s(key, value, spot_s=spot_s, maintenance_s=maintenance_s)
        if not left_s:
            return False
        ends_s = time.monotonic() + left_s
        say(f"{key} is {value.strip()}: this host goes in {left_s:g} s")
        while time.monotonic() < ends_s:
            try:
                with one_at_a_time:
                    if drain(ends_s - time.monotonic()):
                        break
            except Exception as error:  # whatever Ray raises, in the time that is left there is nothing better to do
                say(f"not drained ({error}); trying again")
            time.sleep(RETRY_S)
        return key == "preempted"

    for key in ("maintenance-event", "preempted"):
        arguments = (key, url, functools.partial(heard, key), say)
        watcher = threading.Thread(target=watch, args=arguments, name=key, daemon=True)
        watcher.start()
    watcher.join()


def run(address: str, slice_name: str, url: str, spot_s: float, maintenance_s: float) -> None:
    """Follows the metadata server until a preemption; a second agent on the host ends at once."""
    # In a folder of this user's own, or others could keep it from watching; homes may be shared among hosts.
    lock = (Path.home() / f".openmoe-host-agent-{socket.gethostname()}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say("another agent watches this host")
        return
    _say(f"watches {url}")
    drain = functools.partial(drain_slice, address, slice_name, say=_say)
    follow(url, drain, _say, spot_s=spot_s, maintenance_s=maintenance_s)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} host agent: {line}", flush=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Drain this host's slice when Google Cloud takes it away.")
    parser.add_argument("--address", default="auto", help="Ray cluster; auto for the one that this host is in")
    parser.add_argument("--slice", default="", help="slice to drain; default the one that this host is in")
    parser.add_argument("--metadata", default=METADATA_URL, help="metadata server")
    parser.add_argument("--grace", type=float, default=SPOT_GRACE_S, help="seconds that a preemption leaves")
    parser.add_argument("--maintenance-grace", type=float, default=MAINTENANCE_GRACE_S, help="and a maintenance")
    given = parser.parse_args()
    run(given.address, given.slice, given.metadata.rstrip("/"), given.grace, given.maintenance_grace)


if __name__ == "__main__":
    main()
