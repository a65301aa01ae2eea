"""Programs compiled before the run needs them, on each number of workers that it may get."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from openmoe.pipelines import storage
from openmoe.platform.planner import layouts
from openmoe.platform.run import ray_session
from openmoe.platform.run.verdict import diagnose
from openmoe.platform.run_file import spec_paths
from openmoe.platform.run_file.spec import RunSpec


def warm(spec: RunSpec, counts: Iterable[int], say: Callable[[str], None]) -> bool:
    """Starts a worker group of each size and lets it compile; returns whether all of them did.

    Raises:
      SpecError: a run cannot be trained by so many workers.
    """
    spec = spec_paths.with_absolute_paths(spec)
    ways = [layouts.on_workers(spec, number) for number in counts]
    folder = spec.cluster.compile_cache or storage.join(spec.run_dir, "compile_cache")
    all_well = True
    with ray_session.started(max((way.cluster for way in ways), key=lambda cluster: cluster.num_workers)) as where:
        from openmoe.platform.run import worker_group  # imports Ray, whose settings are made by now
        from openmoe.platform.train import worker

        say(f"Ray: {where}")
        for way in ways:
            before = _kept(folder)
            name = f"{spec.name}-warm-{way.cluster.num_workers}"
            evidence = worker_group.run_incarnation(worker.warm, {"spec": way.model_dump_json()}, way, name)
            if evidence is not None:
                verdict = diagnose(evidence)
                say(f"{way.cluster}: {verdict.cause}: {verdict.reason}")
                all_well = False
                continue
            axes = ", ".join(f"{axis}: {size}" for axis, size in way.mesh.model_dump().items())
            settings = f"cluster.num_workers={way.cluster.num_workers} 'mesh={{{axes}}}'"
            say(f"{settings}: {_kept(folder) - before} new programs in {folder}")
    return all_well


def _kept(folder: str) -> int:
    return sum(len(storage.list_files(storage.join(folder, name))) for name in storage.list_folders(folder))
