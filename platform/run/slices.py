"""Which TPU slices of a cluster have lost a host for good, as a driver finds that out by looking now and then.

A slice is whole or useless; but Ray's table of nodes does not say whether one that is not whole has lost a host, or
whether its hosts are still joining, one by one, which must not be disturbed. A slice of which a living host has been
seen in the whole slice has lost one. Of one that was found in pieces, what tells is time, and that one of its hosts
died. Time also decides of a slice that was in use when it was whole: whoever used it judges first, and may drain it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple

SLICE, WORKER_ID, TOPOLOGY = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id", "ray.io/tpu-topology"  # labels of Ray
PATIENCE_S = 120.0  # between two hosts of a slice that join


class SliceHost(NamedTuple):
    """A host of a slice, alive or on record as dead."""

    node_id: str  # of Ray; new each time it is started
    slice: str
    worker_id: str
    alive: bool
    num_hosts: int  # that a whole slice of its topology has; 0 if it does not say

    @property
    def name(self) -> str:
        """What to call it: slice-a-0."""
        return f"{self.slice}-{self.worker_id}"


class Seen(NamedTuple):
    """What a driver has seen of the slices so far."""

    whole: frozenset[str] = frozenset()  # node ids of living hosts whose slice was idle when it was whole last
    partial_s: Mapping[frozenset[str], float] = {}  # living hosts of a slice in pieces: since when they are these


def slice_of(node: Mapping[str, Any]) -> str:
    """Returns the slice of a Ray node (an entry of `ray.nodes()`); "" when it is in none."""
    return (node.get("Labels") or {}).get(SLICE, "")


def hosts_of(nodes: Iterable[Mapping[str, Any]]) -> list[SliceHost]:
    """Returns the hosts of slices among the entries of `ray.nodes()`."""
    found = []
    for node in nodes:
        labels, chips = node.get("Labels") or {}, (node.get("Resources") or {}).get("TPU", 0)
        if not labels.get(SLICE):
            continue
        topology = labels.get(TOPOLOGY, "")
        num_hosts = math.ceil(math.prod(map(int, topology.split("x"))) / chips) if topology and chips else 0
        host = SliceHost(node["NodeID"], labels[SLICE], labels.get(WORKER_ID, ""), bool(node["Alive"]), num_hosts)
        found.append(host)
    return found


def observe(seen: Seen, hosts: Iterable[SliceHost], in_use: Set[str], now_s: float) -> Seen:
    """Returns what has been seen when `hosts` are there now, and those of the node ids `in_use` are reserved."""
    living = _living(hosts).values()
    ids_of = {frozenset(host.node_id for host in of_slice): _is_whole(of_slice) for of_slice in living}
    partial = {ids for ids, whole in ids_of.items() if not whole}
    idle = {ids for ids, whole in ids_of.items() if whole and not ids & in_use}
    return Seen(
        whole=frozenset().union(*idle, *(ids & seen.whole for ids in partial)),
        partial_s={ids: seen.partial_s.get(ids, now_s) for ids in partial},
    )


def broken(seen: Seen, hosts: Iterable[SliceHost], now_s: float) -> dict[str, list[SliceHost]]:
    """Returns what lives of slices that have lost a host for good, by slice.

    Args:
      seen: the newest `observe`, of these hosts.
      hosts: all that Ray knows of.
      now_s: any clock's, the same for all calls.
    """
    hosts = list(hosts)
    found = {}
    for name, living in _in_pieces(hosts).items():
        ids = frozenset(host.node_id for host in living)
        waited_s = now_s - seen.partial_s.get(ids, now_s)
        if ids & seen.whole or (waited_s >= PATIENCE_S and name in _bereft(hosts)):
            found[name] = living
    return found


def undecided(seen: Seen, hosts: Iterable[SliceHost], now_s: float) -> dict[str, list[SliceHost]]:
    """Returns what lives of slices of which time will tell whether they are broken, by slice; see `broken`."""
    hosts = list(hosts)
    known = broken(seen, hosts, now_s)
    bereft = _bereft(hosts)
    return {name: living for name, living in _in_pieces(hosts).items() if name not in known and name in bereft}


def _living(hosts: Iterable[SliceHost]) -> dict[str, list[SliceHost]]:
    found: dict[str, list[SliceHost]] = defaultdict(list)
    for host in sorted(hosts):
        if host.alive and host.num_hosts:
            found[host.slice].append(host)
    return dict(found)


def _in_pieces(hosts: Iterable[SliceHost]) -> dict[str, list[SliceHost]]:
    return {name: of_slice for name, of_slice in _living(hosts).items() if not _is_whole(of_slice)}


def _is_whole(of_slice: list[SliceHost]) -> bool:
    return len({host.worker_id for host in of_slice}) >= of_slice[0].num_hosts


def _bereft(hosts: Iterable[SliceHost]) -> set[str]:
    """Returns the slices of which a host has died that is not back."""
    hosts = list(hosts)
    alive = {(host.slice, host.worker_id) for host in hosts if host.alive}
    return {host.slice for host in hosts if not host.alive and (host.slice, host.worker_id) not in alive}
