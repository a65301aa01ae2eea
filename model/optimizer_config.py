"""Settings of the optimizers, each with its own dataclass, and of what they share. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

# What the rate does, and the settings that this takes besides learning_rate and warmup_steps.
SHAPES: dict[str, tuple[str, ...]] = {
    "inverse_sqrt": (),
    "constant": (),
    "cosine": ("end_steps", "final_factor"),
    "wsd": ("end_steps", "cooldown_steps", "cooldown", "final_factor"),
}
# Lengths that a run file may also give in tokens, under the second name; its steps are all of one size.
IN_TOKENS = {"warmup_steps": "warmup_tokens", "end_steps": "end_tokens", "cooldown_steps": "cooldown_tokens"}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate goes on; steps are counted from 0.

    Attributes:
      name: inverse_sqrt is learning_rate / sqrt(max(step, warmup_steps)), as in T5X; the others rise linearly from 0
        to learning_rate until warmup_steps. Then constant stays; cosine falls to the last rate along half a wave;
        wsd stays and falls at the end alone, so that one run can be cooled down at several lengths (arXiv:2405.18392).
      end_steps: cosine and wsd: when the last rate is reached, which holds from then on.
      cooldown_steps: wsd: the steps before end_steps in which the rate falls.
      cooldown: wsd: whether it falls linearly or with 1 - sqrt, which is steeper first.
      final_factor: cosine and wsd: the last rate as a share of learning_rate.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    name: Literal["inverse_sqrt", "constant", "cosine", "wsd"]
    end_steps: int | None = None
    cooldown_steps: int | None = None
    cooldown: Literal["linear", "one_minus_sqrt"] = "linear"
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise ValueError(f"name: must be {' or '.join(SHAPES)}, got {self.name!r}")
        if self.cooldown not in ("linear", "one_minus_sqrt"):
            raise ValueError(f"cooldown: must be linear or one_minus_sqrt, got {self.cooldown!r}")
        for setting in fields(self)[1:]:
            value, used = getattr(self, setting.name), setting.name in SHAPES[self.name]
            if used and value is None:
                raise ValueError(f"{setting.name}: missing; schedule {self.name} needs it")
            if not used and value != setting.default:
                raise ValueError(f"{setting.name}: schedule {self.name} has no such setting; remove it, got {value}")
        for name in ("end_steps", "cooldown_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if not 0 <= self.final_factor <= 1:
            raise ValueError(f"final_factor: must be in [0, 1], got {self.final_factor}")


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Parameters that are treated apart; each belongs to the first group that names it.

    Attributes:
      match: names such as decoder/layers_3/mlp/wi_0/kernel; `*` stands for any characters, `/` too, as in */router/*.
      learning_rate_factor: multiplies the learning rate; 0 freezes them.
      weight_decay: instead of the optimizer's; without it as other parameters.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    match: tuple[str, ...]
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.match or not all(self.match):
            raise ValueError(f"match: at least one name of parameters wanted, got {list(self.match)}")
        _check_not_negative(self, ("learning_rate_factor", "weight_decay"))


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    """How large the steps of an optimizer are; every optimizer has these settings.

    Attributes:
      learning_rate: what the schedule multiplies: the largest rate, or, under inverse_sqrt, that of step 1.
      warmup_steps: until when the rate rises or, under inverse_sqrt, is constant.
      schedule: how the rate goes on.
      max_grad_norm: longer gradients, all parameters taken together, are shortened to this norm; without it none is.
      groups: parameters with a learning rate or weight decay of their own.
    """

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "strict": True}

    learning_rate: float = 1.0
    warmup_steps: int = 10_000
    schedule: ScheduleConfig = ScheduleConfig(name="inverse_sqrt")
    max_grad_norm: float | None = None
    groups: tuple[GroupConfig, ...] = ()

    def __post_init__(self) -> None:
        _check_above_zero(self, ("learning_rate", "max_grad_norm"))
        least = 1 if self.schedule.name == "inverse_sqrt" else 0
        if self.warmup_steps < least:
            raise ValueError(f"warmup_steps: must be at least {least}, got {self.warmup_steps}")
        end, cooldown = self.schedule.end_steps, self.schedule.cooldown_steps or 0
        if end is not None and end - cooldown < self.warmup_steps:
            parts = f"warmup_steps={self.warmup_steps}" + (f" and cooldown_steps={cooldown}" if cooldown else "")
            raise ValueError(f"schedule.end_steps: must leave room for {parts}, got {end}")


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig(RateConfig):
    """Adafactor as T5X runs it: no momentum, no weight decay, updates relative to each parameter's size.

    Attributes:
      name: the optimizer.
      decay_rate: exponent of the second moments' decay, 1 - (step + 1) ** -decay_rate.
      clipping_threshold: largest root mean square of an update before the learning rate.
      min_dim_size_to_factor: a matrix is factored when both its sides are at least this; experts always are.
      epsilon_grad: added to squared gradients.
      epsilon_param: least root mean square of a parameter that scales its updates.
    """

    name: Literal["adafactor"] = "adafactor"
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    min_dim_size_to_factor: int = 128
    epsilon_grad: float = 1e-30
    epsilon_param: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "adafactor":
            raise ValueError(f"name: must be adafactor, got {self.name!r}")
        _check_above_zero(self, ("decay_rate", "clipping_threshold", "epsilon_grad", "epsilon_param"))
        if self.min_dim_size_to_factor < 1:
            raise ValueError(f"min_dim_size_to_factor: must be at least 1, got {self.min_dim_size_to_factor}")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(RateConfig):
    """Adam with decoupled weight decay (arXiv:1711.05101), which matrices have and norms and biases have not.

    Attributes:
      name: the optimizer.
      beta1: decay of the mean gradient.
      beta2: decay of the mean squared gradient.
      epsilon: added to the root of the mean squared gradient.
      weight_decay: share of a matrix that a step takes away, times the learning rate.
    """

    name: Literal["adamw"] = "adamw"
    learning_rate: float = 3e-4
    warmup_steps: int = 2000
    schedule: ScheduleConfig = ScheduleConfig(name="constant")
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "adamw":
            raise ValueError(f"name: must be adamw, got {self.name!r}")
        _check_shares(self, ("beta1", "beta2"))
        _check_above_zero(self, ("epsilon",))
        _check_not_negative(self, ("weight_decay",))


@dataclass(frozen=True, kw_only=True)
class MuonConfig(RateConfig):
    """Muon for the matrices of attention, feed-forward blocks and experts, and AdamW for everything else.

    Muon makes a matrix's mean gradient orthogonal, each expert's and each layer's by itself. Its updates are scaled to
    the size that Adam's have, so that both share a learning rate and weight decay (arXiv:2502.16982).

    Attributes:
      name: the optimizer.
      momentum: decay of a matrix's mean gradient, which is Nesterov's.
      newton_schulz_steps: iterations that make it orthogonal.
      beta1: AdamW's decay of the mean gradient.
      beta2: AdamW's decay of the mean squared gradient.
      epsilon: AdamW's; added to the root of the mean squared gradient.
      weight_decay: share of a matrix, the embedding's and head's too, that a step takes away, times the learning rate.
    """

    name: Literal["muon"] = "muon"
    learning_rate: float = 3e-4
    warmup_steps: int = 2000
    schedule: ScheduleConfig = ScheduleConfig(name="constant")
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "muon":
            raise ValueError(f"name: must be muon, got {self.name!r}")
        _check_shares(self, ("momentum", "beta1", "beta2"))
        _check_above_zero(self, ("epsilon",))
        _check_not_negative(self, ("weight_decay",))
        if self.newton_schulz_steps < 1:
            raise ValueError(f"newton_schulz_steps: must be at least 1, got {self.newton_schulz_steps}")


OptimizerConfig = AdafactorConfig | AdamWConfig | MuonConfig
# What came after the first runs, which keep their hashes where these are as if there were none.
_LATER = ("schedule", "max_grad_norm", "groups")


def identity(config: OptimizerConfig) -> dict[str, Any]:
    """Returns all settings, without later ones that have their default."""
    usual = {field.name for field in fields(config) if getattr(config, field.name) == field.default}
    return {name: value for name, value in asdict(config).items() if name not in _LATER or name not in usual}


def _check_above_zero(config: Any, names: Iterable[str]) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: must be finite and above 0, got {value}")


def _check_not_negative(config: Any, names: Iterable[str]) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: must be finite and not negative, got {value}")


def _check_shares(config: Any, names: Iterable[str]) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: must be in [0, 1), got {getattr(config, name)}")
