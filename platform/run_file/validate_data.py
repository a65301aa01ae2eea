"""What follows from the data of a run file: its length, its stages, and the passes that it will reach.

A run in epochs knows its steps once pass 0 of every source is built; what is built is looked for where that is quick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from openmoe.model import counts
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.mixture import Mixture, Stage, one_stage
from openmoe.pipelines.passes import Passes
from openmoe.platform.commands.facts import Fact, Section, count, short
from openmoe.platform.data import data_summary
from openmoe.platform.run_file import run_length
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.train import cadence

# UL2 rows of 2,048 tokens hold 1,920 to 1,933 tokens of text, whichever the corpus; the rest are prompts,
# sentinels and ends. Packed as the original did it, they hold 1,280.
TEXT_SHARE_OF_ROW = {"ul2": 0.94, "prefix_lm": 0.99, "next_token": 1.0, "chat": 0.9}
TEXT_SHARE_OF_REFERENCE_ROW = 0.625


def find_built(spec: RunSpec) -> Passes | None:
    """Returns what is built of the run's data; None if nothing is, it lies on gs://, or there are several builds."""
    if storage.is_remote(spec.data_dir):
        return None
    try:
        builds = data_summary.builds(spec.data, spec.data_dir)
    except DataError:
        return None
    return Passes(builds[0]) if len(builds) == 1 else None


def length(spec: RunSpec, epoch_rows: int | None) -> tuple[Fact, ...]:
    """Returns how long the run is.

    Args:
      spec: of the run.
      epoch_rows: rows of pass 0 of all sources together; None where they are not built.
    """
    train = spec.train
    if train.epochs is not None and epoch_rows is None:
        note = "steps follow from the rows of pass 0, once that is built: `openmoe data build`"
        return (Fact("epochs", train.epochs, f"{train.epochs:g}", note),)
    steps = run_length.steps_of(train, epoch_rows or 0)
    tokens = steps * train.batch_rows * spec.data.seq_len
    flops = tokens * counts.flops_per_token(spec.model, seq_len=spec.data.seq_len)
    return (
        count("steps", steps),
        *([_epochs(spec, steps, epoch_rows)] if epoch_rows else ()),
        count("total_tokens", tokens),
        Fact("total_flops", float(flops), f"{flops:.3g}"),
        _checkpoints(spec, steps),
    )


def _checkpoints(spec: RunSpec, steps: int) -> Fact:
    train = spec.train
    kept = f"{train.keep_checkpoints} kept"
    kept += f", one every {train.keep_every_steps} for ever" if train.keep_every_steps else ""
    kept += f", and the {train.keep_best} of the lowest {train.best_metric}" if train.keep_best else ""
    every = train.checkpoint_every_steps
    if every == "auto":
        solved = cadence.solve(cadence.NOTHING_SEEN, spec.cluster.expected_interruption_s)
        return Fact("checkpoints", None, "auto", f"{solved}, {kept}")
    return count("checkpoints", math.ceil(steps / every), f"every {every} steps, {kept}")


def _epochs(spec: RunSpec, steps: int, epoch_rows: int) -> Fact:
    rows = steps * spec.train.batch_rows
    note = f"of {epoch_rows:,} rows, pass 0 of all sources"
    if spec.train.epochs is not None:
        left = run_length.rows_of(spec.train.epochs, epoch_rows) - rows
        note += f"; the last {left}, less than a step, left out" if left else ""
    return Fact("epochs", rows / epoch_rows, f"{rows / epoch_rows:.2f}", note)


def rows(spec: RunSpec) -> tuple[Fact, ...]:
    """Returns how many rows the run reads of each stream, if its steps are known."""
    total, names = _total_rows(spec), spec.data.stream_names()
    if total is None:
        return ()
    needed = mixture(spec).rows_needed(total).tolist()
    shares = [text_share(spec, stream.objective) for stream in spec.data.streams()]
    text_tokens = [n * spec.data.seq_len * share for n, share in zip(needed, shares, strict=True)]
    shards = sum(math.ceil(tokens / spec.data.group_tokens) for tokens in text_tokens)
    return (
        count("rows", total, "steps x rows a step"),
        *(
            count(f"rows_{_key(name)}", n, f"{n / total:.2%} of the rows, {short(tokens)} tokens of text")
            for name, n, tokens in zip(names, needed, text_tokens, strict=True)
        ),
        count("expected_shards", shards, "estimate, at least: a source that ends before starts its next pass"),
    )


def how(spec: RunSpec) -> tuple[Fact, ...]:
    """Returns how rows are made, so far as the stages do not say it."""
    facts, packing = [], spec.data.packing
    if not spec.data.stages:
        facts.append(Fact("objective", spec.data.objective, spec.data.objective))
    if "ul2" in {stream.objective for stream in spec.data.streams()}:
        notes = {
            "budgeted": "UL2 rows are filled to the last slots",
            "reference": "as the original, 67 % full",
        }
        facts.append(Fact("packing", packing, packing, notes[packing]))
    return tuple(facts)


def text_share(spec: RunSpec, objective: str) -> float:
    """Returns the tokens of text in a row of an objective, as a share of its slots."""
    is_reference = (objective, spec.data.packing) == ("ul2", "reference")
    return TEXT_SHARE_OF_REFERENCE_ROW if is_reference else TEXT_SHARE_OF_ROW[objective]


def stages(spec: RunSpec) -> list[Section]:
    """Returns a section for each stage; without stages, the mixture of a run whose steps are not known."""
    if not spec.data.stages:
        return [Section("mixture", _shares(spec, 0))] if _total_rows(spec) is None else []
    total, start, sections = _total_rows(spec), 0, []
    for number, stage in enumerate(_stages(spec)):
        end = total if stage.end is None else stage.end
        objective = spec.data.stages[number].objective
        facts = [_span(spec, start, end), Fact("objective", objective, objective)]
        if end is not None:
            rows = max(end - start, 0)
            facts.append(count("tokens", rows * spec.data.seq_len, f"{rows:,} rows"))
        if total is not None and start >= total:
            facts.append(Fact("reached", "no", "no", f"the run ends at {total * spec.data.seq_len:,} tokens"))
        sections.append(Section(f"stage {number + 1}", (*facts, *_shares(spec, number))))
        start = end or 0
    return sections


def _span(spec: RunSpec, start_row: int, end_row: int | None) -> Fact:
    """Returns the steps of a stretch of rows; a step may belong to two stages, hence halves of one."""
    batch = spec.train.batch_rows
    ends = [row / batch if row % batch else row // batch for row in (start_row, end_row) if row is not None]
    words = [f"{end:,.10g}" for end in ends] if end_row is not None else [f"{ends[0]:,.10g}", "the end of the run"]
    return Fact("steps", ends, " to ".join(words))


def _shares(spec: RunSpec, stage: int) -> tuple[Fact, ...]:
    of_stage = spec.data.stages[stage].weights if spec.data.stages else {}
    weights = {s.name: of_stage.get(s.name, 0) if s.weight is None else s.weight for s in spec.data.sources}
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    return tuple(Fact(f"share_{name}", share, f"{share:.2%}", "of the rows") for name, share in shares.items())


def passes_reached(spec: RunSpec, built: Passes | None) -> list[Section]:
    """Returns how often the run reads each stream, if its data is built and its steps are known."""
    total = _total_rows(spec)
    if built is None or total is None:
        return []
    needed = built.manifest.mixture.rows_needed(total).tolist()  # a missing source has no part in it
    return [Section("passes", tuple(_reached(built, index, n) for index, n in enumerate(needed)))]


def _reached(built: Passes, stream: int, num_rows: int) -> Fact:
    key, passes = f"passes_{_key(built.manifest.stream_names[stream])}", built.rows(stream)
    if not passes:
        return Fact(key, None, "not built", f"{num_rows:,} rows are read")
    reached = passes_of(passes, num_rows)
    return Fact(key, reached, f"{reached:.2f}", f"of {passes[0]:,} rows; {len(passes)} built")


def passes_of(passes: Sequence[int], num_rows: int) -> float:
    """Returns how many passes rows of a stream are, given the rows of its first ones; later ones are like the last."""
    left, reached = num_rows, 0.0
    for size in passes:
        reached += min(left / size, 1)
        left -= min(left, size)
    return reached + left / passes[-1]


def _key(stream_name: str) -> str:
    return stream_name.replace(" ", "_")


def _total_rows(spec: RunSpec) -> int | None:
    return None if spec.train.steps is None else spec.train.steps * spec.train.batch_rows


def _stages(spec: RunSpec) -> tuple[Stage, ...]:
    return manifests.stages_of(spec.data) or one_stage(spec.data.weights_by_stage()[0])


def mixture(spec: RunSpec) -> Mixture:
    """Returns which stream, and which row of it, each row of the run is."""
    return Mixture(_stages(spec), spec.data.seed)
