"""From what somebody types, a run file and a cluster, to what a job is submitted with. For `submit` and `schedule`."""

from __future__ import annotations

from collections.abc import Sequence

from openmoe.platform.commands import cli_cluster
from openmoe.platform.jobs import cluster_file, cluster_fit
from openmoe.platform.jobs.job_events import JobRequest
from openmoe.platform.run_file import spec, spec_paths


def resolve(run: str, overrides: Sequence[str], cluster: str) -> JobRequest:
    """Reads and checks everything now, so that what is wrong is told to the person who asks.

    Args:
      run: a run file, or the name of a shipped one.
      overrides: "key.path=value" each.
      cluster: a cluster file, the name of a shipped one or of a cluster that is up, or the http:// address of a Ray
        dashboard.

    Raises:
      SpecError: a file cannot be used, or the run does not fit the cluster.
    """
    loaded = spec_paths.with_absolute_paths(spec.load(run, overrides))
    is_address = cluster.startswith(("http://", "https://"))
    there = None if is_address else cli_cluster.spec_of(cluster)
    return JobRequest(
        name=loaded.name,
        run_dir=loaded.run_dir,
        run_file=spec.dump(loaded),
        cluster=cluster if there is None else there.name,
        cluster_file="" if there is None else cluster_file.dump(there),
        slots=1 if there is None else cluster_fit.slots(loaded, there),
        budgets=loaded.budgets.model_dump(),
    )
