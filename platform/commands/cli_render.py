"""`openmoe cluster validate` and `render`: what follows from a cluster file, and what Ray and KubeRay make of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from openmoe.clusters.spec import ClusterSpec
    from openmoe.platform.commands.facts import Section
    from openmoe.platform.run_file.spec import RunSpec

File = Annotated[str, typer.Argument(metavar="FILE", help="A cluster file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file, e.g. slices=4.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="Write here instead of printing.")]
JobRun = Annotated[
    str | None, typer.Option("--job", metavar="RUN", help="kuberay: a RayJob that trains this run file, and ends.")
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to `openmoe cluster`."""
    app.command()(validate)
    app.command()(render)


def validate(file: File, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a cluster file; show what follows from it."""
    from openmoe.platform.commands import tables
    from openmoe.platform.jobs import cluster_file

    tables.show_sections(explain(cluster_file.load(file, overrides or ())), as_json=as_json)


def render(file: File, overrides: Overrides = None, out: Out = None, job: JobRun = None) -> None:
    """Print a cluster file as Ray's launcher or KubeRay take it.

    Launcher YAML for provider gcp, a manifest for kuberay.
    """
    from openmoe.platform.jobs import cluster_file
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    if out is not None and Path(file).exists() and out.exists() and out.samefile(file):
        raise SpecError([Problem("", "is the cluster file itself; give another OUT")], f"--out {out}")
    spec = cluster_file.load(file, overrides or ())
    text = rendered(spec, str(out or f"{spec.name}-{spec.provider}.yaml"), job)
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise SpecError([Problem("", f"cannot be written: {error.strerror}")], f"--out {out}") from error
    print(f"{out} is written; its first lines say how to use it")


def rendered(spec: "ClusterSpec", file: str, job: str | None) -> str:
    """Returns the text of a rendered cluster file.

    Args:
      spec: what to render.
      file: where it will be, for the commands in its comments.
      job: a run file to make a RayJob of; None for the cluster alone.

    Raises:
      SpecError: nothing is rendered for this provider, or the run does not fit the cluster.
    """
    from openmoe.clusters import gcp, kuberay, versions
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    installed = versions.installed()
    if spec.provider == "gcp" and job is None:
        return _text(gcp.notes(spec, installed, file), [gcp.render(spec, installed)])
    if spec.provider == "kuberay" and job is None:
        return _text(kuberay.notes(spec, installed, file, None), [kuberay.render(spec, installed)])
    if spec.provider == "kuberay" and job is not None:
        run, run_file = _run_on(spec, job)
        documents = kuberay.render_job(spec, installed, run_name=run.name, run_file=run_file)
        return _text(kuberay.notes(spec, installed, file, run.name), documents)
    if spec.provider == "gcp":
        message = "a RayJob is made for provider kuberay only; render without --job, then `openmoe submit`"
    else:
        message = f"nothing is rendered for provider {spec.provider}; `openmoe cluster up` starts it"
    raise SpecError([Problem("provider", message)], spec.name)


def explain(spec: "ClusterSpec") -> list["Section"]:
    """Returns every number that follows from a cluster file."""
    from openmoe.platform.commands.facts import Fact, Section

    def fact(key: str, value: int | str, note: str = "") -> Fact:
        return Fact(key, value, f"{value:,}" if isinstance(value, int) else value, note)

    head = fact("head_cpus", spec.head.cpus, "for data work; never preempted")
    if not spec.has_slices:
        return [Section("cluster", (fact("name", spec.name), fact("provider", spec.provider), head))]
    hosts, chips = spec.hosts_per_slice, spec.chips_per_slice
    return [
        Section(
            "cluster",
            (
                fact("name", spec.name),
                fact("provider", spec.provider),
                fact("slices", spec.slices, "spot: may be preempted" if spec.spot else ""),
                fact("hosts", spec.num_hosts, f"{spec.slices} x {hosts}"),
                fact("chips", spec.slices * chips, f"{spec.slices} x {chips}"),
                head,
            ),
        ),
        Section(
            "slice",
            (
                fact("accelerator", str(spec.accelerator)),
                fact("topology", str(spec.topology)),
                fact("pod_type", spec.pod_type, "what Ray calls a slice of this size"),
                fact("chips_per_slice", chips, str(spec.topology).replace("x", " x ")),
                fact("hosts_per_slice", hosts, f"{chips} / {spec.chips_per_host}"),
                fact("chips_per_host", spec.chips_per_host),
            ),
        ),
        Section(
            "Ray's resources",
            (
                fact("CPU", spec.host_cpus, "on each host; at least cluster.cpus_per_worker of the run file"),
                fact("TPU", spec.chips_per_host, "on each host"),
                fact(f"TPU-{spec.pod_type}-head", 1, "on host 0 of each slice"),
            ),
        ),
        Section(
            "run file",
            (
                fact("cluster.accelerator", "tpu", "a run on one slice says this"),
                fact("cluster.accelerator_type", spec.ray_accelerator_type),
                fact("cluster.topology", str(spec.topology)),
                fact("cluster.num_workers", hosts, "one a host"),
                fact("cluster.devices_per_worker", spec.devices_per_host),
            ),
        ),
    ]


def _run_on(spec: "ClusterSpec", run_path: str) -> tuple["RunSpec", str]:
    """The run, kept in the cluster's storage unless it has a gs:// place of its own, and its resolved file."""
    from openmoe.pipelines import storage
    from openmoe.platform.jobs import cluster_file, cluster_fit
    from openmoe.platform.run_file import spec as run_spec
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    run = run_spec.load(run_path)
    if not storage.is_remote(run.run_dir):
        run = run_spec.load(run_path, [f"run_dir={storage.join(str(spec.storage), run.name)}"])
    problems = [*cluster_fit.misfits(run.cluster, spec), *cluster_file.local_paths(run)]
    if run.cluster.accelerator == "cpu":
        message = f"cpu, but cluster {spec.name} is made for this run alone, of TPUs; write tpu"
        problems.insert(0, Problem("cluster.accelerator", message))
    if problems:
        raise SpecError(problems, run_path)
    return run, run_spec.dump(run)


def _text(notes: Sequence[str], documents: Sequence[dict[str, Any]]) -> str:
    from openmoe.platform.run_file import spec_yaml

    comments = "".join(f"# {line}".rstrip() + "\n" for line in notes)
    return comments + "\n" + "---\n".join(spec_yaml.dump(document) for document in documents)
