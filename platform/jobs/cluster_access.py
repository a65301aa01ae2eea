"""Where a job's cluster is and how much room it has: a cluster of this machine by its name, another by its address."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from openmoe.clusters import twin
from openmoe.platform.jobs.job import DONE, Job
from openmoe.platform.jobs.job_events import JobError


class Access(NamedTuple):
    """How to talk to a cluster's dashboard. Never printed or stored: it holds the token."""

    address: str
    token: str


def is_address(cluster: str) -> bool:
    """Returns whether a job's `cluster` is the address of a dashboard; else it is a name."""
    return "://" in cluster


def access(cluster: str, home: Path) -> Access:
    """Returns how to talk to a cluster now.

    The token of an address is the one that Ray's own commands take: RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH
    names, or ~/.ray/auth_token.

    Raises:
      TwinError: a cluster of this machine is not up.
    """
    if not is_address(cluster):
        connection = twin.connection(home / "clusters" / cluster)
        return Access(connection.dashboard_url, connection.token_file.read_text().strip())
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return Access(cluster, token.strip())
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return Access(cluster, file.read_text().strip() if file.is_file() else "")


def only_cluster(home: Path) -> str:
    """Returns the one cluster of this machine that is up.

    Raises:
      JobError: there is none, or more than one.
    """
    names = sorted(path.parent.name for path in (home / "clusters").glob("*/cluster.json"))
    alive = [name for name in names if twin.status(home / "clusters" / name).head_alive]
    if len(alive) == 1:
        return alive[0]
    if alive:
        raise JobError(f"cluster: {len(alive)} are up ({', '.join(alive)}); say which one: --cluster {alive[0]}")
    raise JobError(
        "cluster: none is up on this machine; `openmoe up` or `openmoe cluster up local` starts one, "
        "--cluster http://HOST:8265 takes another machine's"
    )


def check_known(cluster: str, home: Path) -> None:
    """Raises JobError for the name of a cluster that was never started here: nothing could be submitted to it."""
    if not is_address(cluster) and not (home / "clusters" / cluster / "cluster.json").exists():
        raise JobError(f"cluster: {cluster} was not started on this machine; `openmoe cluster up FILE` starts it")


def capacity(cluster: str, jobs: Iterable[Job], home: Path) -> int:
    """Returns how many slots a cluster has, those in use included.

    A cluster with slices has as many as are whole; any other takes one job at a time, since nobody here knows what
    fits beside it.
    """
    if not is_address(cluster):
        found = twin.status(home / "clusters" / cluster)
        if found.provider != "local":
            return sum(each.state == "ready" for each in found.slices) if found.head_alive else 0
        if not found.head_alive:
            return 0
    return max((job.slots for job in jobs if job.cluster == cluster and job.state not in DONE), default=1)
