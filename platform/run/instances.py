"""What the provider says of the machines of a cluster: read when a worker group has ended, to name the cause."""

from __future__ import annotations

import functools
from collections.abc import Callable

from openmoe.clusters import provider
from openmoe.clusters.provider import Instance
from openmoe.platform.home import home
from openmoe.platform.jobs import cluster_file


def reader(path_or_name: str | None) -> Callable[[], list[Instance]]:
    """Returns a function that reads the records of a cluster's machines as they are then.

    The twin keeps them in its state folder. Those of a cloud are not read: there, Ray's notices tell preemptions.

    Args:
      path_or_name: of a cluster file; None when the run has none.

    Raises:
      SpecError: the cluster file cannot be used.
    """
    if path_or_name is None:
        return list
    spec = cluster_file.load(path_or_name)
    if spec.provider != "twin":
        return list
    return functools.partial(provider.read_all, home() / "clusters" / spec.name)
