"""Gives up slices that lost a host while no run was on them: drained whole, so that Ray reserves no head of theirs.

A slice that is in use is left to whoever uses it: its driver must first judge how its workers ended.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Sequence, Set
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group_table

from openmoe.platform.run import hosts, slices
from openmoe.platform.run.journal import Journal
from openmoe.platform.run.slices import SliceHost

LOOK_EVERY_S = 2.0
AGAIN_AFTER_S = 10.0  # what Ray refused to drain is asked for again


class SliceWatch:
    """Watches the slices of a cluster as long as a driver lives; each look at them returns at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Begins to watch.

        Args:
          say: told of each slice that is given up.
        """
        self._say = say
        self._seen, self._looked_s = slices.Seen(), -math.inf
        self._undecided: set[str] | None = None  # slices found in pieces at the driver's begin
        self._leaving: dict[str, float] = {}  # node ids of hosts that are given up and still there: since when
        self._drains: dict[str, subprocess.Popen[str]] = {}  # by node id; Ray has not answered yet
        self._refused: dict[str, float] = {}  # node ids of those of them that Ray would not drain: when it said so
        self._news: list[dict[str, Any]] = []

    def look(self, journal: Journal | None = None) -> None:
        """Looks at all slices, unless it has just done so, and begins to drain what lives of broken ones.

        Args:
          journal: what is given up goes there, with what was before there was one.
        """
        if journal and self._news:
            for record in self._news:
                journal.append(record)
            journal.flush()
            self._news.clear()
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._hear(now_s)
        self._looked_s = now_s
        try:
            nodes, in_use = {node["NodeID"]: node for node in ray.nodes()}, _in_use()
        except ray.exceptions.RayError:  # the cluster is gone; its driver hears of that elsewhere
            return
        found = slices.hosts_of(nodes.values())
        alive = {host.node_id for host in found if host.alive}
        self._leaving = {each: since_s for each, since_s in self._leaving.items() if each in alive}
        for node_id in self._to_ask_again(in_use, now_s):
            self._drains[node_id] = hosts.drain(node_id)
        self._seen = slices.observe(self._seen, found, in_use, now_s)
        for name, living in slices.broken(self._seen, found, now_s).items():
            if not {host.node_id for host in living} & (self._leaving.keys() | in_use):
                self._give_up(name, [host for host in living if hosts.answers(nodes[host.node_id])], now_s)
        undecided = slices.undecided(self._seen, found, now_s)
        if self._undecided is None and undecided:
            self._say(f"{', '.join(undecided)} is in pieces: given up if that is so for {slices.PATIENCE_S:.0f} s")
        known = undecided.keys() if self._undecided is None else self._undecided
        self._undecided = known & undecided.keys()

    def settled(self) -> bool:
        """Looks; returns whether there is no slice whose head Ray must not reserve.

        Such are those that were given up and are not yet gone, and those that were found in pieces when the driver
        began, of which time has to tell whether they are broken. What is in pieces later is about to be whole.
        """
        self.look()
        recent_s = time.monotonic() - hosts.NOT_DRAINED_S
        return not self._undecided and not any(since_s > recent_s for since_s in self._leaving.values())

    def _give_up(self, name: str, living: Sequence[SliceHost], now_s: float) -> None:
        if not living:  # Ray will notice
            return
        text = f"{name} is broken, {len(living)} of its {living[0].num_hosts} hosts live and no run is on it"
        self._say(f"{text}: draining what is left of it, so that no worker is placed there")
        left = [host.name for host in living]
        self._news.append({"event": "slice_given_up", "time_s": time.time(), "slice": name, "left": left, "text": text})
        self._leaving |= {host.node_id: now_s for host in living}
        self._drains |= {host.node_id: hosts.drain(host.node_id) for host in living}

    def _hear(self, now_s: float) -> None:
        for node_id, drain in [*self._drains.items()]:
            if drain.poll() is not None:
                del self._drains[node_id]
                if not hosts.hear(drain, self._say):
                    self._refused[node_id] = now_s

    def _to_ask_again(self, in_use: Set[str], now_s: float) -> list[str]:
        """Returns the hosts that Ray refused to drain a while ago, without those that somebody has reserved since."""
        self._refused = {each: at_s for each, at_s in self._refused.items() if each in self._leaving}
        due = [each for each, at_s in self._refused.items() if now_s - at_s >= AGAIN_AFTER_S and each not in in_use]
        for each in due:
            del self._refused[each]
        return due


def _in_use() -> set[str]:
    """Returns the Ray nodes on which somebody has reserved something, as a run's worker group does."""
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return {node_id for group in groups for node_id in group["bundles_to_node_id"].values()}
