"""What a cluster on this machine is known by: its state directory, and the lock that keeps two commands apart.

`cluster.json` (settings and addresses), `token` (mode 0600), `nodes/*.json` (the processes), `instances/*.json` (what
the provider says), `logs/`. Ray's own files are in a folder of /tmp, since paths of sockets must be short.
"""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from openmoe.clusters import processes, provider
from openmoe.clusters.processes import Process
from openmoe.clusters.spec import ClusterSpec

HEAD = "head"


class TwinError(ValueError):
    """The cluster cannot be started, changed or found; the message says what to do."""


class StartFailed(RuntimeError):
    """Ray did not start here; the message has its last words."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How to reach a cluster on this machine."""

    gcs_address: str
    dashboard_url: str
    token_file: Path
    metrics_sd_file: Path | None
    """Where Ray lists the addresses of its metrics, for Prometheus."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What was started for the head or for a host: it lives while all of its `processes` do."""

    name: str
    mark: str
    """What its processes carry; another one after each start."""
    node_id: str
    """Ray's; empty until it has registered."""
    processes: tuple[Process, ...]

    @property
    def alive(self) -> bool:
        """Whether it has registered, and its processes live."""
        return bool(self.node_id) and all(process.alive for process in self.processes)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that was started here, whatever is left of it."""

    state_dir: Path
    spec: ClusterSpec
    temp_dir: Path
    ip: str | None
    """Of the head; None where Ray chooses."""
    gcs_address: str
    dashboard_url: str

    @property
    def token_file(self) -> Path:
        """Ray's token, readable by its owner alone."""
        return self.state_dir / "token"

    @property
    def connection(self) -> Connection:
        """How to reach it."""
        return Connection(
            gcs_address=self.gcs_address,
            dashboard_url=self.dashboard_url,
            token_file=self.token_file,
            metrics_sd_file=self.node_dir(HEAD) / "session_latest" / "prom_metrics_service_discovery.json",
        )

    def node_dir(self, name: str) -> Path:
        """Where Ray keeps a node's files."""
        return self.temp_dir / name

    def log(self, name: str) -> Path:
        """What a node's `ray start` printed."""
        return self.state_dir / "logs" / f"{name}.log"

    def new_mark(self, name: str) -> str:
        """The mark of a start of a node; the temp dir's name is random, so it is nobody else's."""
        return f"{self.temp_dir.name}/{name}/{secrets.token_hex(4)}"

    def kill(self, names: Iterable[str]) -> int:
        """Kills all processes of these nodes, whenever started; returns how many there were."""
        theirs = tuple(f"{self.temp_dir.name}/{name}/" for name in names)
        return processes.kill(lambda mark: mark.startswith(theirs))

    def kill_all(self) -> int:
        """Kills all processes of the cluster; returns how many there were."""
        return processes.kill(lambda mark: mark.startswith(f"{self.temp_dir.name}/"))

    def save(self) -> None:
        """Writes cluster.json."""
        (self.state_dir / "logs").mkdir(exist_ok=True)
        (self.state_dir / "nodes").mkdir(exist_ok=True)
        values = {
            "spec": self.spec.model_dump(mode="json", exclude_unset=True),
            "temp_dir": str(self.temp_dir),
            "ip": self.ip,
            "gcs_address": self.gcs_address,
            "dashboard_url": self.dashboard_url,
        }
        provider.replace_file(self.state_dir / "cluster.json", json.dumps(values, indent=2))

    def save_node(self, node: Node) -> None:
        """Records what runs for a node."""
        provider.replace_file(self.state_dir / "nodes" / f"{node.name}.json", json.dumps(asdict(node), indent=2))

    def nodes(self) -> dict[str, Node]:
        """Returns what was started, by name.

        Raises:
          TwinError: a record is damaged, or of another version.
        """
        found = {}
        for path in (self.state_dir / "nodes").glob("*.json"):
            with contextlib.suppress(FileNotFoundError), _named(path, self.state_dir):  # taken down while we read
                values = json.loads(path.read_text())
                values["processes"] = tuple(Process(**process) for process in values["processes"])
                found[values["name"]] = Node(**values)
        return found


def load(state_dir: Path) -> Cluster | None:
    """Returns the cluster of a state directory; None if there is none.

    Raises:
      TwinError: the record is damaged, or of another version.
    """
    path = state_dir / "cluster.json"
    try:
        with _named(path, state_dir):
            values = json.loads(path.read_text())
            spec = ClusterSpec.model_validate_json(json.dumps(values.pop("spec")))
            return Cluster(state_dir=state_dir, spec=spec, temp_dir=Path(values.pop("temp_dir")), **values)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _named(record: Path, state_dir: Path) -> Generator[None]:
    """Names the record that cannot be understood."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise TwinError(f"{record}: not what this version writes; end its processes and remove {state_dir}") from error


@contextlib.contextmanager
def locked(state_dir: Path, doing: str) -> Generator[None]:
    """Keeps other commands from changing the same cluster; the kernel drops the lock with the process.

    Raises:
      TwinError: another command is at it.
    """
    state_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state_dir.parent / f".{state_dir.name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read() or "another command"
            raise TwinError(f"cluster {state_dir.name}: {other} is changing it; wait until that is done") from None
        file.truncate(0)
        file.write(f"`openmoe cluster {doing}` (process {os.getpid()})")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
