"""`openmoe cluster`: a cluster on this machine, up and down, and a slice taken away."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from openmoe.clusters.spec import ClusterSpec
    from openmoe.clusters.twin import ClusterStatus, Connection

app = typer.Typer(help="Start, look at and shake a cluster on this machine.", no_args_is_help=True)

ClusterArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CLUSTER",
        help="A cluster file, or the name of a shipped one or of one that is up; default: what is up, else local.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def up(cluster: ClusterArgument = None, as_json: Json = False) -> None:
    """Start a cluster on this machine, or what died of it."""
    from openmoe.clusters import twin, twin_state

    spec = spec_of(cluster)
    try:
        connection = twin.up(spec, state_dir(spec.name), _say(as_json))
    except twin_state.StartFailed as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    if as_json:
        _print_json(dataclasses.asdict(twin.status(state_dir(spec.name))))
    else:
        _show_connection(spec.name, connection)


@app.command()
def down(cluster: ClusterArgument = None, as_json: Json = False) -> None:
    """End a cluster's processes and remove its files."""
    from openmoe.clusters import twin

    name = name_of(cluster)
    was_up = (state_dir(name) / "cluster.json").exists()
    twin.down(state_dir(name), _say(as_json))
    if as_json:
        _print_json({"down": name, "was_up": was_up})


@app.command()
def status(cluster: ClusterArgument = None, as_json: Json = False) -> None:
    """Show a cluster's slices, as units."""
    from openmoe.clusters import twin

    found = twin.status(state_dir(name_of(cluster)))
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        _show_status(found)


@app.command()
def preempt(
    names: Annotated[
        list[str], typer.Argument(metavar="[CLUSTER] SLICE", help="The slice, such as slice-a, and whose it is.")
    ],
    grace_s: Annotated[float, typer.Option("--grace", min=0, metavar="S", help="Seconds of notice.")] = 0,
    as_json: Json = False,
) -> None:
    """Take a slice away, as a cloud does with spot machines."""
    from openmoe.clusters import twin

    if len(names) > 2:
        raise typer.BadParameter(f"a cluster and a slice at most, got {' '.join(names)}", param_hint="SLICE")
    name = name_of(names[0] if len(names) == 2 else None)
    twin.preempt(state_dir(name), names[-1], grace_s, _say(as_json))
    if as_json:
        _print_json({"preempted": names[-1], "cluster": name, "grace_s": grace_s})


def state_dir(name: str) -> Path:
    """Returns where a cluster of this machine is kept."""
    return _clusters() / name


def name_of(cluster: str | None) -> str:
    """Returns the name of a cluster that is given by its name or its file; None is the one that is up, or local.

    Raises:
      TwinError: None was given, and several are up.
      SpecError: there is no such file, or it is not a cluster file.
    """
    from openmoe.clusters import twin
    from openmoe.platform.jobs import cluster_file

    running = sorted(path.parent.name for path in _clusters().glob("*/cluster.json"))
    if cluster is None:
        if len(running) > 1:
            raise twin.TwinError(f"several clusters are up: {', '.join(running)}; say which")
        return running[0] if running else "local"
    return cluster if cluster in running else cluster_file.load(cluster).name


def spec_of(cluster: str | None) -> "ClusterSpec":
    """Returns the settings of a cluster, given as for `name_of`: of a bare name, those that it is up with.

    Raises:
      TwinError: None was given, and several are up.
      SpecError: there is no such file, or it is not a cluster file.
    """
    from openmoe.clusters import twin
    from openmoe.platform.jobs import cluster_file

    if cluster is None:
        cluster = name_of(None)
    if (state_dir(cluster) / "cluster.json").exists():
        return twin.settings(state_dir(cluster))
    return cluster_file.load(cluster)


def _clusters() -> Path:
    from openmoe.platform import home

    return home.home() / "clusters"


def _say(as_json: bool) -> Callable[[str], None]:
    """Returns what prints a line at once; where JSON is asked for, stdout is left to that."""
    return functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, default=str))


def _show_connection(name: str, connection: "Connection") -> None:
    print(f"""
Ray's dashboard  {connection.dashboard_url}  (asks for the token: cat {connection.token_file})
for `ray` and `ray job`:
  export RAY_ADDRESS={connection.gcs_address} RAY_API_SERVER_ADDRESS={connection.dashboard_url}
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(cat {connection.token_file})
look             openmoe cluster status {name}
end              openmoe cluster down {name}""")


def _show_status(found: "ClusterStatus") -> None:
    from datetime import datetime

    from openmoe.platform.commands import tables

    if found.connection is None:
        print(f"cluster {found.name} is not up; `openmoe cluster up FILE` starts one")
        return
    print(f"cluster {found.name} ({found.provider}), head {found.connection.gcs_address}", end=" ")
    print("alive" if found.head_alive else "dead")
    rows: list[tuple[Any, ...]] = []
    for one in found.slices:
        for host in one.hosts:
            first = host is one.hosts[0]
            since = f"{datetime.fromtimestamp(host.since_s).astimezone():%H:%M:%S}" if host.since_s else ""
            row = (host.name, host.ip, "alive" if host.alive else "dead", f"{host.instance} {since}")
            rows.append((one.name if first else "", one.state if first else "", *row))
    if rows:
        tables.show("", ("slice", "state", "host", "address", "raylet", "provider's record"), rows)
    if not found.head_alive or any(one.state != "ready" for one in found.slices):
        print(f"`openmoe cluster up {found.name}` starts what does not run, whole slices at a time")
