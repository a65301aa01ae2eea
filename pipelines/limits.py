"""What a source may lack and a build may lose: what the run file allows is said and counted, all else stops it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

from openmoe.pipelines import selection, sources, token_cache, tokenizer
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig
from openmoe.pipelines.sources import Unit

Receipts = dict[str, list[dict[str, Any]]]  # by source, in the order of its units

# A task whose worker died so often is given up.
MAX_LOSSES = 3
# What was lost while a node was is not counted, unless it goes on so: a unit may take all memory of its host.
MAX_LOSSES_WITH_NODES = 20


def present(config: DataConfig, say: Callable[[str], None]) -> tuple[DataConfig, list[str]]:
    """Returns the configuration without the sources that are missing and may be, and their names."""
    may_be = [source for source in config.sources if source.missing == "renormalize"]
    missing = [source.name for source in may_be if not sources.find(source)]
    if not missing:
        return config, []
    try:
        left = config.without(missing)
    except ValueError as error:
        raise DataError(f"sources: {', '.join(missing)} is missing, and without it: {error}") from error
    for number, weights in enumerate(left.weights_by_stage(), 1):
        of_streams = zip(left.stream_names(), weights, strict=True)
        shares = ", ".join(f"{name} {weight / sum(weights):.2%}" for name, weight in of_streams if weight)
        stage = f" in stage {number}" if left.stages else ""
        say(f"MISSING SOURCE {', '.join(missing)}: no file matches; the others take its rows{stage}: {shares}")
    return left, missing


def check(source: SourceConfig, receipts: list[dict[str, Any]]) -> None:
    """Raises DataError when a source is empty or too much of it is unusable."""
    good = sum(receipt["documents"] for receipt in receipts)
    bad = sum(sum(receipt["bad"].values()) for receipt in receipts)
    worst = max(receipts, key=lambda receipt: sum(receipt["bad"].values()), default=None)
    if bad > source.max_bad_share * (good + bad) and worst:
        sample = worst["bad_samples"][0]
        raise DataError(
            f"sources.{source.name}: {bad} of {good + bad} documents are unusable, max_bad_share allows "
            f"{source.max_bad_share:g}; first in {sample['path']} at {sample['offset']}: {sample['reason']}; "
            "mend the file or raise max_bad_share"
        )
    given_up = [receipt for receipt in receipts if "quarantined" in receipt]
    if len(given_up) > source.max_quarantined_units:
        raise DataError(
            f"sources.{source.name}: {len(given_up)} units are quarantined, max_quarantined_units allows "
            f"{source.max_quarantined_units}; the first is {given_up[0]['path']} [{given_up[0]['start']}, "
            f"{given_up[0]['stop']}): it {given_up[0]['quarantined']}; delete its receipt {given_up[0]['key']}.json to "
            "try it again"
        )
    if not good:
        raise DataError(f"sources.{source.name}: no document in {len(receipts)} units of {', '.join(source.paths)}")


def check_left(receipts: Receipts, splits: dict[str, Any]) -> None:
    """Raises DataError when nothing of a source is left to train on."""
    for name, units in receipts.items():
        counts = {part: sum(splits[u["key"]][part]["documents"] for u in units) for part in selection.PARTS}
        if not counts["train"]:
            raise DataError(
                f"sources.{name}: of its documents {counts['duplicate']} were there before, and "
                f"{counts['validation']} are for validation: none is left to train on; leave the source out"
            )


class Quarantine:
    """Takes in units that always kill their worker, up to the number that their source allows."""

    def __init__(self, config: DataConfig, folder: str, receipts: Iterable[dict[str, Any]]) -> None:
        self._config, self._folder = config, folder
        self._counts = collections.Counter(receipt["source"] for receipt in receipts if "quarantined" in receipt)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Returns the receipt of a task's unit, or raises DataError when it is one too many."""
        unit = Unit(**task["unit"])
        [allowed] = [source.max_quarantined_units for source in self._config.sources if source.name == unit.source]
        self._counts[unit.source] += 1
        if self._counts[unit.source] > allowed:
            raise DataError(
                f"sources.{unit.source}: {unit} killed its worker {MAX_LOSSES} times, as out of memory does; "
                f"max_quarantined_units allows {allowed}; give tasks more memory (cluster.data_task_memory_bytes), "
                "mend the file, or raise max_quarantined_units to go on without it"
            )
        text = tokenizer.load(self._config.tokenizer)
        return token_cache.quarantine(unit, text, self._folder, reason=f"killed its worker {MAX_LOSSES} times")
