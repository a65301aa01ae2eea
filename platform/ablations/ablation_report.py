"""What an ablation found, as a page for docs/ and a picture for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from openmoe.model.config import ModelConfig
from openmoe.platform.ablations.ablation import (
    BASELINE,
    BATCH_ROWS,
    OPTIMIZER,
    SEQ_LEN,
    STEP_TOKENS,
    VARIANTS,
    Outcome,
    Summary,
)
from openmoe.platform.commands import facts

COLUMNS = (
    *("variant", "loss", "lowest to highest", "to baseline", "", "text loss", "dropped", "load CV"),
    *("active", "total", "FLOPs/token", "tokens/s"),
)
NOT_SHOWN = (
    "**Length.** {tokens} tokens are {steps} steps, the steep beginning of a training. What pays or hurts only later "
    "(specialised experts, a rate that has decayed, data seen twice) is not in it.",
    "**Stability.** QK-norm, small initial kernels and z-losses keep large models from diverging after thousands of "
    "steps. Here nothing is large or runs that long: a switch without effect may be the one that matters.",
    "**Capacity.** Groups are {group} tokens; trainings have 4,096 and more, with steadier loads. How much is "
    "dropped, and what dropless routing is worth, depends on that.",
    "**Balance.** Biases move by 0.001 a step, {reach} in {steps} steps at most: enough where scores are close, "
    "little for a router that has made up its mind. No expert is on another device, so imbalance costs no time.",
    "**Experts.** {experts}, with 6 MB of Python's documentation and sources, leave little to specialise in, which is "
    "where fine-grained experts and a shared one are said to pay.",
    "**Padding.** These rows are packed to the last slots, with under 1 % padding (`openmoe data inspect quickstart`); "
    "emptier ones would show more.",
    "**Tuning.** All have the baseline's learning rate and schedule, which may suit it better than others.",
    "**Speed.** Tokens/s are those of the machine as busy as it was, with several runs side by side maybe, and steps "
    "this small leave an accelerator waiting: `benchmarks/model_step.py` compares speed.",
    "**Seeds.** A few give an idea of the spread and are no test; of this many variants one may look better by chance.",
)

LEGEND = (
    "- **Loss** is the cross-entropy in nats over the last tenth of the steps, sentinels included; **text loss** "
    "leaves them out. No row is read twice, and the rows of the last tenth are the same for all, so it is the loss on "
    "rows not seen before (of documents of which other rows were). A seed draws the parameters and the order of rows.",
    "- **Better** and **worse**: the difference of the means is larger than the seeds of either differ among "
    "themselves.",
    "- **Dropped**: share of the experts' choices that found no place. **Load CV**: standard deviation of the experts' "
    "loads over their mean. **Active**: parameters that act on a token, without embedding and head.",
)

# Why openmoe-next-* are what they are, in view of the results that are shipped.
CHOSEN = (
    "What `openmoe-next-*` make of it: they keep the original's small initial kernels, without which both scales are",
    "worse, and take the switches of `coarse`, which are better at 100m. Fine-grained experts in every layer, the",
    "sigmoid router and balance by bias gain nothing by themselves in so short a training; they are in it on the word",
    "of OLMoE and DeepSeek-V3, who measured over hundreds of billions of tokens. All together, `next`, have the",
    "lowest mean of all variants at both scales, ahead of `coarse` by less than its seeds differ, and with more",
    "parameters in all.",
)


class Section(NamedTuple):
    """The results at one scale; `outcomes` are comparable with each other, and `summaries` are theirs."""

    scale: str
    base: ModelConfig
    outcomes: Sequence[Outcome]
    summaries: Sequence[Summary]


def page(sections: Sequence[Section], folder: str) -> str:
    """Returns the Markdown page; its pictures are in `folder`, one a scale."""
    lines = [
        "<!-- Written by `openmoe model ablate`, from the results beside it; edits are lost. -->",
        "# Improved mode: each switch, its reason, and what it did",
        "",
        "The presets of the original are its model, peculiarities included. Each switch departs from it in one",
        "thing; `openmoe-next-*` combine them. This page says what each did in a small training.",
        "",
        *CHOSEN,
        "",
        "## The switches",
        "",
        "Widths are chosen so that in all variants as many parameters act on a token.",
        "",
        *_markdown(("variant", "what changes", "why", "paper"), [_described(name) for name in VARIANTS]),
        "",
        "## How to read the results",
        "",
        *LEGEND,
    ]
    for section in sections:
        lines += ["", *_of_scale(section, folder)]
    lines += ["", "## What so small a test cannot show", "", *(f"- {line}" for line in _not_shown(sections))]
    lines += [
        *("", "## Measure it again", ""),
        "`openmoe model ablate` trains a small model of the original's kind and each variant of it, from several",
        f"seeds, and writes this page. It keeps one file a run in [`{folder}/`]({folder}) and trains only what is",
        "missing there or has other settings now; after a change to the model's code, remove the files that it makes",
        "wrong.",
    ]
    return "\n".join(lines) + "\n"


def _not_shown(sections: Sequence[Section]) -> list[str]:
    """Returns the reservations, with the values of all scales."""

    def of(value: Callable[[Section], object]) -> str:
        return " and ".join(dict.fromkeys(str(value(section)) for section in sections))

    values = {
        "tokens": of(lambda section: facts.short(section.outcomes[0].tokens)),
        "steps": of(lambda section: f"{section.outcomes[0].tokens // STEP_TOKENS:,}"),
        "group": of(lambda section: f"{section.base.group_size:,}"),
        "reach": of(lambda section: f"{1e-3 * (section.outcomes[0].tokens // STEP_TOKENS):.2f}"),
        "experts": of(lambda section: f"{section.base.num_experts} experts of width {section.base.d_ff:,}"),
    }
    return [line.format(**values) for line in NOT_SHOWN]


def _described(name: str) -> tuple[str, ...]:
    variant = VARIANTS[name]
    paper = f"[{variant.paper}](https://arxiv.org/abs/{variant.paper})" if variant.paper else ""
    return f"`{name}`", variant.what, variant.reason, paper


def _of_scale(section: Section, folder: str) -> list[str]:
    base, first = section.base, section.outcomes[0]
    steps = first.tokens // STEP_TOKENS
    devices = ", ".join(sorted({o.device for o in section.outcomes}))
    command = f"openmoe model ablate --scale {section.scale} --tokens {first.tokens}"
    return [
        f"## At scale `{section.scale}`",
        "",
        f"`{command}`: {base.num_layers} layers, {base.num_moe_layers} of them with {base.num_experts} experts, top-"
        f"{base.top_k}; d_model {base.d_model}, d_ff {base.d_ff}, groups of {base.group_size:,} tokens, {base.dtype}. "
        f"{first.tokens:,} tokens in {steps:,} steps of {BATCH_ROWS} rows of {SEQ_LEN}, from the quickstart's corpus; "
        f"Adafactor, rate {OPTIMIZER.learning_rate:g} / sqrt(max(step, {OPTIMIZER.warmup_steps})). On {devices}.",
        "",
        f"![losses of all seeds]({folder}/{section.scale}.svg)",
        "",
        *_markdown(COLUMNS, table_rows(section.summaries)),
        "",
        *verdicts(section.summaries),
    ]


def table_rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Returns the cells of the results' table."""
    return [
        (
            s.variant,
            f"{s.loss:.3f}",
            f"{min(s.losses):.3f} to {max(s.losses):.3f} ({len(s.losses)})",
            "" if s.difference is None else f"{s.difference:+.3f}",
            s.verdict,
            f"{s.text_loss:.3f}",
            f"{s.drop_fraction:.1%}",
            f"{s.load_cv:.2f}",
            facts.short(s.active),
            facts.short(s.total),
            facts.short(s.flops),
            f"{s.tokens_per_s:,.0f}",
        )
        for s in summaries
    ]


def verdicts(summaries: Sequence[Summary]) -> list[str]:
    """Says in a sentence for each verdict which variants got it."""
    by_verdict: dict[str, list[str]] = {}
    for summary in summaries:
        if summary.verdict:
            by_verdict.setdefault(summary.verdict, []).append(f"`{summary.variant}`")
    return [f"- {verdict}: {', '.join(names)}" for verdict, names in sorted(by_verdict.items())]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def picture(summaries: Sequence[Summary]) -> str:
    """Returns an SVG: for each variant a dot a seed, a line from the lowest to the highest, and a bar at the mean."""
    drawn = [s for s in summaries if all(map(math.isfinite, s.losses))]
    losses = [loss for s in drawn for loss in s.losses] or [0.0]
    margin = max(0.05 * (max(losses) - min(losses)), 0.005)
    low, high = min(losses) - margin, max(losses) + margin
    left, width, row, top = 130, 520, 22, 16

    def x(loss: float) -> str:
        return f"{left + width * (loss - low) / (high - low):.1f}"

    bottom = top + row * len(drawn)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{bottom + 36}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for i in range(5):
        tick = low + (high - low) * i / 4
        lines.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle" fill="#555555">{tick:.3f}</text>')
    lines.append(
        f'<text x="{left + width / 2:.0f}" y="{bottom + 31}" text-anchor="middle" fill="#555555">loss, nats</text>'
    )
    for s in drawn:
        if s.variant == BASELINE:
            lines.append(f'<path d="M{x(s.loss)} {top - 8}V{bottom}" stroke="#999999" stroke-dasharray="3 3"/>')
    for i, s in enumerate(drawn):
        y = top + row * i + 4
        colour = {"better": "#1a7f37", "worse": "#b3261e"}.get(s.verdict, "#444444")
        lines += [
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end" fill="#222222">{escape(s.variant)}</text>',
            f'<path d="M{x(min(s.losses))} {y}H{x(max(s.losses))}" stroke="{colour}" stroke-width="2"/>',
            *(f'<circle cx="{x(loss)}" cy="{y}" r="3" fill="{colour}" fill-opacity="0.5"/>' for loss in s.losses),
            f'<path d="M{x(s.loss)} {y - 6}V{y + 6}" stroke="{colour}" stroke-width="3"/>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
