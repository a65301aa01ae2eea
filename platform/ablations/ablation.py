"""The ablation: a small baseline of the original's kind, its variants as data, and what their runs add up to. Pure.

Every variant departs from the baseline in one thing and keeps the kernels that act on a token, so widths follow from
the baseline's. A gated block has 4 d F parameters, F = d_ff (3 d F with swiglu); every m-th layer has, besides its
dense block, one for each of a token's K experts. So a layer has 4 d F (m + K) / m on average, which is what is kept.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from openmoe.model import counts, optimizer_config
from openmoe.model.config import DEPARTURES, PRESETS, ModelConfig
from openmoe.model.optimizer_config import AdafactorConfig
from openmoe.platform.run_file.spec_errors import Problem, SpecError, did_you_mean

SEQ_LEN = 512
BATCH_ROWS = 4
STEP_TOKENS = BATCH_ROWS * SEQ_LEN
FEWEST_STEPS = 10  # the last tenth of them is what is judged
OPTIMIZER = AdafactorConfig(learning_rate=0.5, warmup_steps=25)  # as runs/quickstart.yaml, for a few times its steps
BASELINE, NEXT = "baseline", "next"

# The same tokenizer for all, so that losses are those of the same targets.
SCALES: dict[str, ModelConfig] = {
    "small": replace(PRESETS["openmoe-nano"], d_model=64, head_dim=32, d_ff=192),
    "100m": replace(
        PRESETS["openmoe-base"],
        d_ff=1536,
        vocab_size=PRESETS["openmoe-nano"].vocab_size,
        text_vocab_size=PRESETS["openmoe-nano"].text_vocab_size,
        group_size=1024,
    ),
}
# What openmoe-next-* have in common, whatever their size.
NEXT_SETTINGS = ("aux_loss_weight", "moe_every", *(name for name in DEPARTURES if name != "d_ff_expert"))


class Variant(NamedTuple):
    """A departure from the baseline.

    Attributes:
      changes: the settings of the baseline that it is given, in which it differs.
      what: it changes, and what goes with that so that the rest stays comparable.
      reason: to expect something of it.
      paper: that it is from, on arXiv; "" for a plain correction.
    """

    changes: Callable[[ModelConfig], dict[str, Any]]
    what: str
    reason: str
    paper: str = ""


def _swiglu(base: ModelConfig) -> dict[str, Any]:
    return {"ffn": "swiglu", "d_ff": _divided(4 * base.d_ff, 3)}


def _fine_grained(base: ModelConfig) -> dict[str, Any]:
    return {
        "d_ff_expert": _divided(base.d_ff, 4),
        "num_experts": 4 * base.num_experts,
        "top_k": 4 * base.top_k,
        "capacity_factor_train": 4 * base.capacity_factor_train,
        "capacity_factor_eval": 4 * base.capacity_factor_eval,
    }


def _every_layer(base: ModelConfig) -> dict[str, Any]:
    every, top_k = base.moe_every, base.top_k
    return {
        "moe_every": 1,
        "d_ff": _divided(base.d_ff * (every + top_k), every * (1 + top_k)),
        "num_experts": _divided(base.num_experts * (1 + top_k), every + top_k),
    }


def _coarse(base: ModelConfig) -> dict[str, Any]:
    names = ("no-padding", "capacity-top-k", "renormalized", "qk-norm", "swiglu", "parallel-mlp", "reset-positions")
    return {key: value for name in names for key, value in VARIANTS[name].changes(base).items()}


def _next(base: ModelConfig) -> dict[str, Any]:
    """A quarter of each layer's width for the shared expert, three quarters for a token's experts."""
    width = _divided(4 * base.d_ff * (base.moe_every + base.top_k), 3 * base.moe_every)
    top_k = 4 * base.top_k
    sizes = {"num_experts": 4 * base.num_experts, "top_k": top_k}
    sizes |= {"d_ff": _divided(width, 4), "d_ff_expert": _divided(3 * width, 4 * top_k)}
    return {name: getattr(PRESETS["openmoe-next-base"], name) for name in NEXT_SETTINGS} | sizes


def _divided(number: int, by: int) -> int:
    if number % by:
        raise ValueError(f"the baseline's sizes leave no whole width: {number} / {by}")
    return number // by


VARIANTS: dict[str, Variant] = {
    BASELINE: Variant(lambda base: {}, "nothing: the original's model, made small", "what the others are held against"),
    "no-padding": Variant(
        lambda base: {"route_padding": False},
        "padding asks for no expert",
        "in the original it always asks for experts 0 and 1, takes places there from tokens, and counts as load",
    ),
    "capacity-top-k": Variant(
        lambda base: {"capacity_counts_top_k": True},
        "places are the same multiple of group size x top-k / experts, instead of group size / experts",
        "the original leaves top-k out, so at top-2 and factor 1.25 there is room for 62.5 % of what is asked",
    ),
    "renormalized": Variant(
        lambda base: {"renormalize_gates": True},
        "the weights of a token's experts sum to 1",
        "the experts' part no longer shrinks when the router is unsure, as it is at the start",
        "2401.04088",
    ),
    "dropless": Variant(
        lambda base: {"dropless": True},
        "each expert answers everyone who asks",
        "no token goes without its experts, and no token's answer depends on others in its group",
        "2211.15841",
    ),
    "qk-norm": Variant(
        lambda base: {"qk_norm": True},
        "RMSNorm of each head's queries and keys",
        "attention logits stay small, which keeps large models from diverging; OLMoE has it",
        "2302.05442",
    ),
    "swiglu": Variant(
        _swiglu,
        "two factors in the gated block instead of three, and 4/3 of the width: the same parameters",
        "the block that other models have, with one product less",
        "2002.05202",
    ),
    "parallel-mlp": Variant(
        lambda base: {"extra_mlp": "parallel"},
        "the extra dense block of an MoE layer beside the experts instead of after them: a shared expert",
        "what all tokens need is learned once, and experts are free for the rest; one step less in depth",
        "2401.06066",
    ),
    "reset-positions": Variant(
        lambda base: {"reset_positions": True},
        "positions count from the start of each packed segment",
        "angles stay small in long rows; as RoPE knows only distances, and segments do not see each other, nothing but "
        "rounding can differ",
    ),
    "sigmoid": Variant(
        lambda base: {"router": "sigmoid", "renormalize_gates": True},
        "a sigmoid of each expert's logit instead of a softmax over all, with renormalised gates as in DeepSeek-V3",
        "experts do not compete in the scores, only in the choice; compare with `renormalized`",
        "2412.19437",
    ),
    "bias-balancing": Variant(
        lambda base: {"router_bias_rate": 1e-3, "aux_loss_weight": 0.0},
        "a bias for each expert, moved towards equal load, instead of the auxiliary loss",
        "the auxiliary loss pulls against the loss proper; a bias has no gradient",
        "2408.15664",
    ),
    "fine-grained": Variant(
        _fine_grained,
        "4 times the experts and the choices at a quarter of the width; 4 times the capacity factor, so that as large "
        "a share of the choices finds a place",
        "more combinations of experts for the same arithmetic; OLMoE has 64, 8 of them chosen (arXiv:2409.02060)",
        "2401.06066",
    ),
    "every-layer": Variant(
        _every_layer,
        "experts in every layer, all blocks narrower and fewer experts a layer: the same active and about as many "
        "parameters in all",
        "OLMoE and DeepSeek-V3 have no or few layers without experts; the original has them in every 4th or 6th",
        "2409.02060",
    ),
    "init-scale": Variant(
        lambda base: {"init_scale": 1.0},
        "kernels begin with ten times the variance, as they commonly do; no switch",
        "to know what the original's tenth is worth, which was meant for the stability of large models",
        "2101.03961",
    ),
    "coarse": Variant(
        _coarse,
        "padding kept out, capacity by top-k, renormalised gates, QK-norm, SwiGLU and the parallel block together",
        "how far one gets with the original's experts: their number, size, layers, softmax and auxiliary loss",
    ),
    NEXT: Variant(
        _next,
        "all of the above as in openmoe-next-*: a quarter of the width for the shared expert, the rest for a token's",
        "what the switches do together; experts in every layer give it more parameters in all",
        "2409.02060",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run.

    Attributes:
      scale: name of the baseline.
      base: its settings.
      tokens: of each run, whole steps.
      seeds: runs of each variant, with the seeds from 0 on.
      only: names of variants; none for all.
    """

    scale: str
    base: ModelConfig
    tokens: int
    seeds: int
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            Problem("", f"--only {name}: no variant of this name; {did_you_mean(name, VARIANTS)}")
            for name in self.only
            if name not in VARIANTS
        ]
        if self.seeds < 1:
            problems.append(Problem("", f"--seeds {self.seeds}: must be at least 1"))
        least = FEWEST_STEPS * STEP_TOKENS
        if self.tokens < least or self.tokens % STEP_TOKENS:
            near = max(self.tokens // STEP_TOKENS * STEP_TOKENS, least)
            message = f"must be a multiple of {STEP_TOKENS:,}, {least:,} at least; take {near}"
            problems.append(Problem("", f"--tokens {self.tokens}: {message}"))
        if problems:
            raise SpecError(problems)

    @property
    def num_steps(self) -> int:
        """Steps of each run."""
        return self.tokens // STEP_TOKENS

    @property
    def judged_steps(self) -> int:
        """Steps at the end, whose mean is the result."""
        return self.num_steps // 10

    def configs(self) -> dict[str, ModelConfig]:
        """Returns the variants wanted, in the table's order."""
        return {name: config_of(name, self.base) for name in VARIANTS if not self.only or name in self.only}


def config_of(name: str, base: ModelConfig) -> ModelConfig:
    """Returns the settings of a variant."""
    return replace(base, **VARIANTS[name].changes(base))


def settings_id(config: ModelConfig, tokens: int, data_id: str) -> str:
    """Identifies all that a run's losses depend on besides its seed and the code."""
    made_of = [asdict(config), optimizer_config.identity(OPTIMIZER), BATCH_ROWS, SEQ_LEN, tokens, data_id]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run; losses, drops and load are means over its last tenth.

    Attributes:
      variant: its name.
      seed: of the parameters and of the order of rows.
      settings: `settings_id`.
      tokens: trained on.
      data_id: of the rows.
      loss: cross-entropy in nats, sentinels included.
      text_loss: the same of text alone.
      drop_fraction: share of the choices that found no place.
      load_cv: standard deviation of the experts' loads over their mean, averaged over MoE layers.
      tokens_per_s: from the first step's end to the last one's.
      seconds: of the whole run; for the first seed of a variant, compilation included.
      device: kind of device, and how many.
    """

    variant: str
    seed: int
    settings: str
    tokens: int
    data_id: str
    loss: float
    text_loss: float
    drop_fraction: float
    load_cv: float
    tokens_per_s: float
    seconds: float
    device: str


def comparable(outcomes: Sequence[Outcome], base: ModelConfig, data: tuple[int, str] | None = None) -> list[Outcome]:
    """Returns the outcomes of today's variants on the same tokens.

    Args:
      outcomes: of one scale.
      base: its baseline.
      data: (tokens, data_id) wanted; if None, those that most outcomes have.
    """
    current = [
        o
        for o in outcomes
        if o.variant in VARIANTS and o.settings == settings_id(config_of(o.variant, base), o.tokens, o.data_id)
    ]
    by_data = Counter((o.tokens, o.data_id) for o in current)
    chosen = data or (by_data.most_common(1)[0][0] if by_data else None)
    return [o for o in current if (o.tokens, o.data_id) == chosen]


class Summary(NamedTuple):
    """All seeds of a variant; `difference` is None without a baseline of the same seeds."""

    variant: str
    losses: tuple[float, ...]  # by seed
    loss: float  # their mean
    spread: float  # largest minus smallest
    difference: float | None  # to the baseline's mean
    verdict: str  # whether that exceeds the larger of both spreads, in a word or two
    text_loss: float
    drop_fraction: float
    load_cv: float
    tokens_per_s: float
    active: int
    total: int
    flops: int  # per token


def summarize(outcomes: Sequence[Outcome], base: ModelConfig) -> list[Summary]:
    """Returns one summary for each variant that has outcomes, in the table's order."""
    by_variant = {name: sorted((o for o in outcomes if o.variant == name), key=lambda o: o.seed) for name in VARIANTS}
    return [_summary(name, of, by_variant[BASELINE], base) for name, of in by_variant.items() if of]


def _summary(name: str, of: list[Outcome], baseline: list[Outcome], base: ModelConfig) -> Summary:
    config = config_of(name, base)
    losses, theirs = [o.loss for o in of], [o.loss for o in baseline]
    difference = None
    if name != BASELINE and [o.seed for o in of] == [o.seed for o in baseline]:
        difference = statistics.fmean(losses) - statistics.fmean(theirs)
    return Summary(
        variant=name,
        losses=tuple(losses),
        loss=statistics.fmean(losses),
        spread=spread(losses),
        difference=difference,
        verdict="" if difference is None else verdict(difference, losses, theirs),
        text_loss=statistics.fmean(o.text_loss for o in of),
        drop_fraction=statistics.fmean(o.drop_fraction for o in of),
        load_cv=statistics.fmean(o.load_cv for o in of),
        tokens_per_s=statistics.median(o.tokens_per_s for o in of),
        active=counts.active_parameters(config),
        total=counts.parameter_counts(config).total,
        flops=counts.flops_per_token(config, seq_len=SEQ_LEN),
    )


def spread(losses: Sequence[float]) -> float:
    """Returns by how much seeds differ at most."""
    return max(losses) - min(losses)


def verdict(difference: float, losses: Sequence[float], baseline: Sequence[float]) -> str:
    """Says whether a difference of means is larger than what seeds alone make of it."""
    if min(len(losses), len(baseline)) < 2:
        return "one seed"
    if difference != difference:
        return "diverged"
    if abs(difference) <= max(spread(losses), spread(baseline)):
        return "within spread"
    return "better" if difference < 0 else "worse"


def still_to_run(plan: Plan, data_id: str, done: Mapping[tuple[str, int], Outcome]) -> list[tuple[str, int]]:
    """Returns the (variant, seed) that have no outcome of these very settings, variant after variant."""
    wanted = {name: settings_id(config, plan.tokens, data_id) for name, config in plan.configs().items()}
    runs = [(name, seed) for name in wanted for seed in range(plan.seeds)]
    return [run for run in runs if run not in done or done[run].settings != wanted[run[0]]]
