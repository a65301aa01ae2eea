"""From what somebody types, a run file and a cluster, to what a job is submitted with. For `submit` and `schedule`."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from openmoe.platform import home
from openmoe.platform.commands import cli_cluster
from openmoe.platform.jobs import cluster_access, cluster_file, cluster_fit
from openmoe.platform.jobs.job_events import JobError, JobRequest
from openmoe.platform.run_file import spec, spec_paths


def resolve(run: str, overrides: Sequence[str], cluster: str | None) -> JobRequest:
    """Reads and checks everything now, so that what is wrong is told to the person who asks.

    Args:
      run: a run file, or the name of a shipped one.
      overrides: "key.path=value" each.
      cluster: a cluster file, the name of a shipped one or of a cluster that is up, or the http:// address of a Ray
        dashboard; None for the one that is up here.

    Raises:
      SpecError: a file cannot be used, or the run does not fit the cluster.
      JobError: the cluster is a cloud's and not given by its address, or that is none; or not one alone is up here.
    """
    loaded = spec_paths.with_absolute_paths(spec.load(run, overrides))
    cluster = cluster or cluster_access.only_cluster(home.home())
    is_address = cluster.startswith(("http://", "https://"))
    there = None if is_address else cli_cluster.spec_of(cluster)
    if there is not None and there.provider not in ("twin", "local"):
        raise JobError(
            f"cluster: {there.name} is of provider {there.provider}, which nothing here starts or finds; "
            "give the address of its Ray dashboard: --cluster http://HOST:8265"
        )
    return JobRequest(
        name=loaded.name,
        run_dir=loaded.run_dir,
        run_file=spec.dump(loaded),
        cluster=_address(cluster) if there is None else there.name,
        cluster_file="" if there is None else cluster_file.dump(there),
        slots=1 if there is None else cluster_fit.slots(loaded, there),
        budgets=loaded.budgets.model_dump(),
    )


def _address(cluster: str) -> str:
    """Returns the address of a dashboard as it is always written: jobs of one cluster share its room."""
    try:
        is_whole = bool(urlsplit(cluster).hostname) and urlsplit(cluster).port != 0
    except ValueError:  # brackets without an end, or a port that is none
        is_whole = False
    if not is_whole:
        raise JobError(f"cluster: {cluster} is no address of a Ray dashboard, such as http://HOST:8265")
    return cluster.rstrip("/")
