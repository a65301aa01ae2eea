"""The cluster file: where runs are computed, in the few words that a person decides.

Numbers that follow (hosts, chips, pod types, Ray's resources) are properties, never settings. What a provider does not
use is refused rather than ignored.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from openmoe.clusters import tpu

Provider: TypeAlias = Literal["twin", "local", "gcp", "kuberay"]


class ClusterProblem(NamedTuple):
    """One thing to change in a cluster file: where (dotted path), and why and how."""

    path: str
    message: str


class ClusterError(ValueError):
    """Settings that cannot be a cluster; `problems` holds every reason found."""

    def __init__(self, problems: list[ClusterProblem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{path}: {message}" for path, message in problems))


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class HeadSpec(_Section):
    """The machine of the Ray head: no chips, never preempted, and where data work goes."""

    cpus: int = Field(default=2, ge=1, le=256, description="CPUs it has; data work runs on them.")
    machine_type: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]+(-[a-z0-9]+)+$",
        description="gcp: n2-standard-<cpus> if not given.",
        examples=["c3-standard-22"],
    )


class ClusterSpec(_Section):
    """One cluster."""

    name: str = Field(
        pattern=r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$",
        description="Of the cluster, its machines and its folder.",
        examples=["tpu-1"],
    )
    provider: Provider = Field(description="Who gives the machines.")
    accelerator: Literal["v4", "v5p", "v5e", "v6e", "v7x"] | None = Field(
        default=None, description="TPU generation of all slices.", examples=["v4"]
    )
    topology: str | None = Field(
        default=None, description="Chips of one slice along each dimension.", examples=["4x4x4"]
    )
    slices: int = Field(default=1, ge=1, le=1024, description="Slices wanted.")
    spot: bool = Field(
        default=False, description="gcp, kuberay: slices may be preempted, and cost less; the head stays."
    )
    host_cpus: int = Field(
        default=1,
        ge=1,
        le=512,
        description="CPUs a TPU host offers to Ray; more than its worker takes let data work in.",
    )
    head: HeadSpec = Field(default_factory=HeadSpec)
    project: str | None = Field(
        default=None,
        pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$",
        description="gcp: project id.",
        examples=["my-project-123"],
    )
    zone: str | None = Field(
        default=None,
        pattern=r"^[a-z]+-[a-z]+\d+-[a-z]$",
        description="gcp: where the machines are.",
        examples=["us-central2-b"],
    )
    namespace: str = Field(
        default="default",
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="kuberay: of Kubernetes.",
        examples=["training"],
    )
    service_account: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9.@-]+$",
        description="Identity with access to `storage`: gcp an e-mail address, kuberay a name in the namespace.",
        examples=["openmoe"],
    )
    image: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][\w./-]*[:@][\w.:-]+$",
        description="kuberay: container image that has OpenMoE and its packages, with its tag.",
        examples=["us-docker.pkg.dev/my-project/openmoe/openmoe:0.1.0"],
    )
    setup: tuple[str, ...] = Field(default=(), description="gcp: shell commands on each new host, after the packages.")
    storage: str | None = Field(
        default=None,
        pattern=r"^gs://[a-z0-9][a-z0-9._-]+(/.*)?$",
        description="Where runs are kept.",
        examples=["gs://my-bucket/runs"],
    )

    @model_validator(mode="after")
    def _refuse_the_impossible(self) -> Self:
        if problems := impossible(self.model_dump(exclude_defaults=True)):
            raise ClusterError(problems)
        return self

    @property
    def has_slices(self) -> bool:
        """Whether it has TPU slices, real or of the twin; a plain local Ray has none."""
        return self.provider != "local"

    @property
    def _tpu(self) -> tuple[str, str]:
        if self.accelerator is None or self.topology is None:
            raise ClusterError([ClusterProblem("provider", f"a {self.provider} cluster has no TPU slices")])
        return self.accelerator, self.topology

    @property
    def generation(self) -> tpu.Generation:
        """The TPU generation of all slices."""
        return tpu.GENERATIONS[self._tpu[0]]

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return tpu.num_chips(self._tpu[1])

    @property
    def chips_per_host(self) -> int:
        """Chips of one host."""
        return tpu.chips_per_host(*self._tpu)

    @property
    def devices_per_host(self) -> int:
        """Devices that JAX sees on one host; a twin has one for each chip."""
        return self.chips_per_host * (1 if self.provider == "twin" else self.generation.devices_per_chip)

    @property
    def hosts_per_slice(self) -> int:
        """Hosts of one slice, all of which a run needs."""
        return tpu.hosts_per_slice(*self._tpu)

    @property
    def num_hosts(self) -> int:
        """TPU hosts of all slices; 0 where there are none."""
        return self.slices * self.hosts_per_slice if self.has_slices else 0

    @property
    def summary(self) -> str:
        """The slices in one line: "2 x v4-128 (4x4x4, 16 hosts of 4 chips each), spot; head on demand"."""
        hosts = f"{self.topology}, {self.hosts_per_slice} hosts of {self.chips_per_host} chips each"
        return f"{self.slices} x {self.pod_type} ({hosts}){', spot' if self.spot else ''}; head on demand"

    @property
    def pod_type(self) -> str:
        """Ray's name of a slice's size: "v4-16"."""
        return tpu.pod_type(*self._tpu)

    @property
    def ray_accelerator_type(self) -> str:
        """Ray's name of the generation: "TPU-V4"."""
        return tpu.ray_accelerator_type(self._tpu[0])


_SLICES = {"accelerator", "topology", "slices", "host_cpus"}
_CLOUD = _SLICES | {"spot", "storage", "service_account"}
_COMMON = {"name", "provider", "head"}
_USED = {
    "local": _COMMON,
    "twin": _COMMON | _SLICES,
    "gcp": _COMMON | _CLOUD | {"project", "zone", "setup"},
    "kuberay": _COMMON | _CLOUD | {"namespace", "image"},
}
_NEEDED = {
    "local": (),
    "twin": ("accelerator", "topology"),
    "gcp": ("accelerator", "topology", "project", "zone", "storage"),
    "kuberay": ("accelerator", "topology", "image", "storage"),
}
_INSTEAD = {
    ("twin", "spot"): "any slice of a twin can be preempted: `openmoe cluster preempt`",
    ("twin", "storage"): "the run file says where a run is kept",
    ("local", "storage"): "the run file says where a run is kept",
    ("gcp", "image"): "put what the hosts need into `setup`",
    ("kuberay", "setup"): "put what the hosts need into the image",
}
_N2_STANDARD_CPUS = (2, 4, 8, 16, 32, 48, 64, 80, 96, 128)


def impossible(given: Mapping[str, Any]) -> list[ClusterProblem]:
    """What a provider lacks or does not use, and slices that do not exist.

    Args:
      given: settings as written; of types that may still be wrong, which is not looked at here.
    """
    provider = given.get("provider")
    if not isinstance(provider, str) or provider not in _USED:
        return []
    return [
        *_unused(provider, given),
        *_missing(provider, given),
        *_impossible_slice(provider, given.get("accelerator"), given.get("topology")),
        *_impossible_head(provider, given.get("head")),
        *_foreign_account(provider, given.get("service_account")),
    ]


def _unused(provider: str, given: Mapping[str, Any]) -> Iterator[ClusterProblem]:
    for field in given:
        if field in ClusterSpec.model_fields and field not in _USED[provider]:
            others = ", ".join(name for name, used in _USED.items() if field in used)
            instead = _INSTEAD.get((provider, field), f"it is for {others}")
            yield ClusterProblem(field, f"means nothing under provider {provider}; remove it ({instead})")


def _missing(provider: str, given: Mapping[str, Any]) -> Iterator[ClusterProblem]:
    for field in _NEEDED[provider]:
        if given.get(field) is None:
            example = (ClusterSpec.model_fields[field].examples or [""])[0]
            yield ClusterProblem(field, f"missing; provider {provider} needs it, such as `{field}: {example}`")


def _impossible_slice(provider: str, accelerator: object, topology: object) -> Iterator[ClusterProblem]:
    if not isinstance(accelerator, str) or accelerator not in tpu.GENERATIONS:
        return
    generation = tpu.GENERATIONS[accelerator]
    if provider == "gcp" and generation.gcp_type is None:
        yield ClusterProblem("accelerator", f"Ray's launcher makes no {accelerator} hosts; take provider kuberay")
    if isinstance(topology, str) and topology not in generation.topologies:
        allowed = ", ".join(generation.topologies)
        yield ClusterProblem("topology", f"no {accelerator} slice is {topology!r}; write one of {allowed}")


def _impossible_head(provider: str, head: object) -> Iterator[ClusterProblem]:
    if not isinstance(head, Mapping):
        return
    cpus, machine_type = head.get("cpus", 2), head.get("machine_type")
    if provider != "gcp" and machine_type is not None:
        yield ClusterProblem("head.machine_type", f"means nothing under provider {provider}; remove it (it is for gcp)")
    if provider == "gcp" and machine_type is None and isinstance(cpus, int) and 0 < cpus not in _N2_STANDARD_CPUS:
        sizes = ", ".join(map(str, _N2_STANDARD_CPUS))
        message = f"no n2-standard machine has {cpus} CPUs; write one of {sizes}, or give head.machine_type too"
        yield ClusterProblem("head.cpus", message)


def _foreign_account(provider: str, account: object) -> Iterator[ClusterProblem]:
    """An account of Google Cloud where Kubernetes is asked, which makes no pod for it, or the other way round."""
    if not isinstance(account, str) or provider not in ("gcp", "kuberay") or ("@" in account) == (provider == "gcp"):
        return
    wanted = "its e-mail address, such as openmoe@my-project-123.iam.gserviceaccount.com"
    if provider == "kuberay":
        wanted = "the name of one in the namespace, such as openmoe"
    yield ClusterProblem("service_account", f"{account} is no account of provider {provider}; write {wanted}")
