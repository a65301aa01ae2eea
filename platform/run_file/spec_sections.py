"""The sections of a run file that belong to the platform; model and data have theirs in their own packages."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from openmoe.clusters import tpu
from openmoe.platform.run_file.spec_errors import show


class Section(BaseModel):
    """Part of a run file: frozen, of exact types, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def _steps_or_auto(value: object) -> object:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"must be auto, or an integer >= 1, got {show(value)}")


# One validator, since a union of pydantic's would say of each bad value twice what is wrong with it.
_SCHEMA = Annotated[int, Field(ge=1)] | Literal["auto"]
StepsOrAuto = Annotated[int | Literal["auto"], PlainValidator(_steps_or_auto, json_schema_input_type=_SCHEMA)]


class StopWhenConfig(Section):
    """When a run has learned what it can: its last evaluations brought no gain worth the name."""

    metric: str = Field(
        default="loss",
        min_length=1,
        description="What is to fall: loss, text_loss (sentinels left out), or loss/NAME of a source or denoiser.",
    )
    patience: int = Field(ge=1, description="Evaluations in a row without a gain after which the run ends.")
    min_gain: float = Field(ge=0, description="Nats below the best evaluation so far that count as a gain.")


class EvalConfig(Section):
    """Held-out loss while the run trains, on rows of `data.validation_share`."""

    every_steps: int | None = Field(default=None, ge=1, description="Steps between evaluations; the last step has one.")
    every_tokens: int | None = Field(
        default=None, ge=1, description="Instead of every_steps: tokens between them, padding included."
    )
    rows: int = Field(default=64, ge=1, description="Held-out rows of each source; fewer where it has fewer.")
    sample_tokens: int = Field(default=0, ge=0, description="Tokens sampled at each evaluation; 0 for none.")

    @model_validator(mode="after")
    def _one_distance(self) -> Self:
        if (self.every_steps is None) == (self.every_tokens is None):
            raise ValueError("every_steps: give either every_steps or every_tokens")
        return self

    def is_due(self, step: int, *, step_tokens: int) -> bool:
        """Returns whether to evaluate after a step, that is whether a multiple of the distance was reached in it."""
        if self.every_steps is not None:
            return step % self.every_steps == 0
        distance = self.every_tokens or 1
        return step * step_tokens // distance > (step - 1) * step_tokens // distance


class HealthConfig(Section):
    """What is done about bad numbers, and what raises an alarm."""

    on_bad_numbers: Literal["stop", "skip", "rewind"] = Field(
        default="stop",
        description="stop: the attempt ends, or starts again as budgets.bad_numbers says. skip: an update that is not "
        "finite is not made. rewind: back to the checkpoint before, on without those rows, within the same budget.",
    )
    max_skips: int = Field(default=5, ge=0, description="Updates in a row that may be skipped.")
    spike_score: float | None = Field(
        default=None,
        gt=0,
        description="Robust deviations above the median at which a loss has spiked, such as 20; without it none does.",
    )
    spike_window_steps: int = Field(default=128, ge=8, description="Steps whose losses a spike is compared with.")
    spike_steps: int = Field(default=1, ge=1, description="Steps in a row above that make a spike.")
    guilty_steps_before: int = Field(
        default=1, ge=0, description="Steps before the first bad one whose rows are left out as well."
    )
    collapsed_share: float = Field(
        default=0.01, ge=0, le=1, description="Of an even share of the choices, below which an expert has collapsed."
    )
    least_load_entropy: float = Field(
        default=0.3, ge=0, le=1, description="Of the experts' load in a layer, as a share of an even load's."
    )
    least_router_entropy: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Of a token's distribution over the experts, mean over a layer's tokens, over an even one's.",
    )
    alarm_steps: int = Field(default=200, ge=1, description="Steps in a row after which that raises an alarm.")
    hang_multiple: float = Field(
        default=50.0,
        gt=1,
        description="Of the median step, after which a step is stuck; see also cluster.step_timeout_s.",
    )
    hang_least_s: float = Field(
        default=300.0, gt=0, description="No step is stuck before this: storage that fails for a while is waited for."
    )

    @property
    def rewound_steps(self) -> int:
        """Steps that a rewind may take back besides the one at which it is found out."""
        return self.spike_steps - 1 + self.guilty_steps_before if self.on_bad_numbers == "rewind" else 0


class TrainConfig(Section):
    """How long, how large a step, how often to save."""

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps of the whole run; may be raised later.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="Instead of steps: how often as many rows as pass 0 of all sources holds; whole steps of them.",
    )
    batch_rows: int = Field(ge=1, le=2**20, description="Rows of a step, all devices and microbatches together.")
    microbatches: int = Field(
        default=1,
        ge=1,
        description="Equal parts of a step: losses and routing groups are formed in each, gradients summed.",
    )
    checkpoint_every_steps: StepsOrAuto = Field(
        description="Steps between checkpoints, or auto: solved from what saves cost and how often the run is "
        "interrupted. The last step saves too.",
    )
    keep_checkpoints: int = Field(default=3, ge=1, description="Newest checkpoints kept.")
    keep_every_steps: int | None = Field(
        default=None, ge=1, description="The first checkpoint at or after each multiple of it is kept for ever."
    )
    keep_best: int = Field(default=0, ge=0, description="So many checkpoints of the lowest best_metric are kept too.")
    best_metric: str = Field(
        default="loss", min_length=1, description="A metric by its name in the records, such as loss."
    )
    sample_tokens: int = Field(default=32, ge=0, description="Tokens sampled when the run ends; 0 for none.")
    stop_when: StopWhenConfig | None = Field(
        default=None, description="Ends the run before its last step once evaluations show no gain."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is None and self.epochs is None:
            raise ValueError("steps: missing; add `steps:` or `epochs:` to `train`")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"epochs: a run has steps or epochs, got steps={self.steps} too; remove one (or train.steps=null)"
            )
        return self

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; a run of epochs has them once `run_length.resolved` has seen its data."""
        if self.steps is None:
            raise ValueError(f"train.epochs={self.epochs:g}: not steps yet, the data is not built")
        return self.steps


class MeshConfig(Section):
    """How the devices are laid out; a resize changes this and never the mathematics."""

    data: int = Field(default=1, ge=1, description="Devices along the data axis: rows are divided over it.")
    fsdp: int = Field(default=1, ge=1, description="Devices over which rows and slices of all parameters are divided.")
    expert: int = Field(default=1, ge=1, description="Devices over which rows and experts are divided.")
    tensor: int = Field(default=1, ge=1, description="Devices over which heads, widths and vocabulary are divided.")

    @property
    def num_devices(self) -> int:
        """Devices of the whole mesh."""
        return self.num_batch_shares * self.tensor

    @property
    def num_batch_shares(self) -> int:
        """Parts into which the rows of a batch are divided."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        shown = {"data": self.data, "fsdp": self.fsdp, "expert": self.expert, "tensor": self.tensor}
        return " x ".join(f"{axis}={n}" for axis, n in shown.items() if axis in ("data", "expert") or n > 1)


class ClusterConfig(Section):
    """What Ray Train is asked for."""

    accelerator: Literal["cpu", "gpu", "tpu"] = Field(default="cpu", description="Kind of device.")
    num_workers: int = Field(ge=1, description="Worker processes; on TPUs one a host.")
    devices_per_worker: int = Field(ge=1, description="Devices of each worker; on cpu these are virtual.")
    topology: str | None = Field(
        default=None, pattern=r"^\d+x\d+(x\d+)?$", description="Chips of one TPU slice, such as 4x4x4."
    )
    accelerator_type: str | None = Field(
        default=None, pattern=r"^TPU-V", description="Ray's name of the TPU generation, such as TPU-V4."
    )
    cpus_per_worker: float = Field(default=1.0, gt=0, description="CPUs Ray reserves for each worker.")
    data_cpus: int | None = Field(
        default=None,
        ge=1,
        description="Most CPUs that data work takes at a time; without it all that the workers leave.",
    )
    data_task_memory_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Memory that Ray reserves for each task of data work, which takes one CPU. On Linux a task ends "
        "that wants more beyond what an idle worker has.",
    )
    # JAX may take a second more; the group of a dead or frozen peer ends within 30 s.
    heartbeat_timeout_s: int = Field(default=25, ge=5, description="Silence after which a peer is dead.")
    shutdown_timeout_s: int = Field(default=20, ge=1, description="Wait for the peers when a worker ends.")
    init_timeout_s: int = Field(default=120, ge=10, description="Wait for all workers to join the group.")
    step_timeout_s: float = Field(
        default=1800.0, gt=0, description="A worker without a step for so long is stuck; compiling counts too."
    )
    expected_interruption_s: float = Field(
        default=3 * 3600.0,
        gt=0,
        description="How long machines stay, on average, before the run has seen it; what checkpoint_every_steps: auto "
        "begins with.",
    )
    shard_cache_bytes: int = Field(
        default=16 * 2**30,
        ge=2**20,
        description="Disk that shards of gs:// may take on each host; the least recently used are removed.",
    )
    compile_cache: str | None = Field(
        default=None,
        min_length=1,
        description="Folder, local or gs://, of compiled programs, which runs may share; <run_dir>/compile_cache if not"
        " given, none to do without. Who may write there decides what the workers execute.",
    )
    object_store_bytes: int = Field(
        default=200_000_000,
        ge=80_000_000,
        description="Shared memory of a Ray that this command starts; a running cluster keeps its own.",
    )
    dashboard_port: int | None = Field(
        default=None, ge=1024, le=65535, description="Port of Ray's dashboard; without one it is not started."
    )

    def __str__(self) -> str:
        slices = f" in {self.num_slices} slices of {self.topology}" if self.num_slices > 1 else ""
        return f"{self.num_workers} workers with {self.devices_per_worker} {self.accelerator} devices each{slices}"

    @property
    def generation(self) -> str | None:
        """TPU generation, as cluster files name it; None where there are no TPUs, or those of a type not known here."""
        kinds = (kind for kind in tpu.GENERATIONS if tpu.ray_accelerator_type(kind) == self.accelerator_type)
        return next(kinds, None) if self.accelerator == "tpu" else None

    @property
    def num_slices(self) -> int:
        """TPU slices of all workers together; 1 where there are none, or none that is known."""
        if self.generation is None or self.topology is None:
            return 1
        return max(self.num_workers // tpu.hosts_per_slice(self.generation, self.topology), 1)

    @property
    def chips_per_worker(self) -> int:
        """TPU chips that a worker asks Ray for: fewer than its devices where JAX sees several of a chip, as on v7x."""
        if self.generation is None or self.topology is None:
            return self.devices_per_worker
        return min(self.devices_per_worker, tpu.chips_per_host(self.generation, self.topology))


class BudgetsConfig(Section):
    """Restarts each cause may cost before the run is given up; bad input is never retried.

    One counts for a day, and as long as the newest checkpoint is no further than at the time.
    """

    preemption: int = Field(default=1000, ge=0, description="The provider took the machines back.")
    lost_slice: int = Field(default=100, ge=0, description="A TPU slice lost a host, or all, without notice.")
    host_fault: int = Field(default=10, ge=0, description="A process, a machine or the storage failed by itself.")
    hang: int = Field(default=3, ge=0, description="A step that never ended.")
    out_of_memory: int = Field(default=1, ge=0, description="A worker ran out of memory.")
    bad_numbers: int = Field(default=0, ge=0, description="A loss that is not finite.")
    bad_code: int = Field(default=0, ge=0, description="An exception in the training code.")
    cluster_lost: int = Field(default=1000, ge=0, description="Ray's head died; the run goes on when it is back.")
    unknown: int = Field(default=3, ge=0, description="An end without evidence.")
