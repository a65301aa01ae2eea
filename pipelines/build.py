"""Builds UL2 shards: sources to token cache, token cache to the groups that the mixture needs.

Ray Data schedules work units (`ray_tasks`); their artefacts go to storage, only receipts come back. A unit is done when
its receipt exists, so a build that was killed anywhere goes on where it was, with any number of workers.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from openmoe.pipelines import limits, passes, ray_tasks, selection, sources, storage, token_cache, tokenizer
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.config import DataConfig
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.passes import Group, Passes
from openmoe.pipelines.ray_tasks import ANYWHERE, Workplace
from openmoe.pipelines.sources import Unit

Report = Callable[..., None]  # stage, done, total, unit of both; and what is left of each source

# Ray Data is given up after this time without any receipt: its CPUs were taken after all. Longer than a task takes;
# compressed files of many GB are one unit.
TOKENIZE_STUCK_S = 3600.0
PACK_STUCK_S = 600.0


def build(
    config: DataConfig,
    data_dir: str,
    *,
    min_rows: int,
    report: Report = lambda *progress: None,
    place: Workplace = ANYWHERE,
) -> Manifest:
    """Builds what the global rows [0, min_rows) need and that is missing. Ray must be initialized.

    Args:
      config: what the rows are made of.
      data_dir: where artefacts go, local or gs://; may be shared by builds of other configurations.
      min_rows: rows wanted; more can be asked for later and never change earlier ones.
      report: told of progress as receipts arrive.
      place: where the tasks run.

    Returns:
      The manifest, with whose path a Loader is opened.
    """
    manifest = tokenize(config, data_dir, report, place)
    extend(Passes(manifest), min_rows, report, place)
    return manifest


def extend(built: Passes, min_rows: int, report: Report, place: Workplace) -> None:
    """Packs the groups that the global rows [0, min_rows) need and that are not packed."""
    built.record()
    while wanted := passes.lacking(built, min_rows):
        pack(built, wanted, report, place)


def tokenize(config: DataConfig, data_dir: str, report: Report, place: Workplace) -> Manifest:
    """Tokenizes what is not in the token cache, once and for all passes; see `build`."""
    text = tokenizer.load(config.tokenizer)
    config, missing = limits.present(config, place.say)
    units = {source.name: sources.inventory(source, config.unit_bytes) for source in config.sources}
    everything = [unit for source in config.sources for unit in units[source.name]]
    path = manifests.manifest_path(data_dir, config, text, everything, missing)
    if storage.exists(path):
        return manifests.load(path)
    receipts = _tokenize(everything, config, storage.join(data_dir, "tokens"), report, place)
    by_source = {
        name: [part for unit in us for part in token_cache.parts(receipts[token_cache.key(unit, text)])]
        for name, us in units.items()
    }
    for source in config.sources:
        limits.check(source, by_source[source.name])
    by_source = _select(config, data_dir, by_source, report, place)
    manifest = manifests.assemble(path, config, text, by_source, missing=missing)
    manifests.commit(manifest)
    return manifest


def _tokenize(
    units: list[Unit], config: DataConfig, folder: str, report: Report, place: Workplace
) -> dict[str, dict[str, Any]]:
    """Returns the receipts of all units by key, tokenizing those that have none."""
    uri = config.tokenizer
    keyed = {token_cache.key(unit, tokenizer.load(uri)): unit for unit in units}
    tasks = {key: {"unit": asdict(unit), "uri": uri, "folder": folder} for key, unit in keyed.items()}
    receipts = storage.receipts(folder, tasks)
    missing = [task for key, task in tasks.items() if key not in receipts]
    quarantine = limits.Quarantine(config, folder, receipts.values())
    left = collections.Counter(unit.source for key, unit in keyed.items() if key not in receipts)
    for receipt in ray_tasks.run(_tokenize_task, missing, TOKENIZE_STUCK_S, place, quarantine):
        receipts[receipt["key"]] = receipt
        left[receipt["source"]] -= 1
        report("tokenize", len(receipts), len(keyed), "units", _told(left))
    return receipts


def _told(left: collections.Counter[str]) -> str:
    return ", ".join(f"{name} {count:,} left" for name, count in left.items() if count)


def _select(
    config: DataConfig, data_dir: str, receipts: limits.Receipts, report: Report, place: Workplace
) -> limits.Receipts:
    """Returns the receipts of tokenized units, by source, with what is trained on of each."""
    if config.dedup == "none" and not config.validation_share:
        return receipts
    everything = [receipt for source in config.sources for receipt in receipts[source.name]]
    dedup = config.dedup == "exact"
    plan = selection.plan(data_dir, everything, dedup=dedup, validation_share=config.validation_share)
    selection.write_plan(plan)
    splits: dict[str, Any] = {}
    for kind, names in selection.stages(plan):
        done = storage.receipts(plan.folder, names)
        tasks = [{"folder": plan.folder, "name": name} for name in names if name not in done]
        for receipt in ray_tasks.run(_select_task, tasks, PACK_STUCK_S, place):
            done[receipt["key"]] = receipt
            report(kind, len(done), len(names), "tasks")
        splits = {key: split for receipt in done.values() for key, split in receipt.get("units", {}).items()}
    limits.check_left(receipts, splits)
    return {name: [{**unit, "split": splits[unit["key"]]} for unit in units] for name, units in receipts.items()}


def pack(built: Passes, wanted: list[Group], report: Report, place: Workplace) -> None:
    """Packs those of the groups that have no receipt yet, in this order as far as CPUs allow."""
    manifest = built.manifest
    unpacked = passes.unpacked(manifest, wanted)
    tasks = [{"manifest": manifest.path, **group._asdict()} for group in unpacked]
    total, names = len(wanted), manifest.stream_names
    left = collections.Counter(names[group.stream] for group in unpacked)
    for done, receipt in enumerate(ray_tasks.run(_pack_task, tasks, PACK_STUCK_S, place), total - len(tasks) + 1):
        left[names[receipt["stream"]]] -= 1
        report("pack", done, total, "groups", _told(left))
    built.refresh()
    built.record()


def pack_validation(manifest: Manifest, report: Report, place: Workplace) -> None:
    """Packs what was kept apart of each stream's source, where anything was and where it is not packed yet."""
    packed = [passes.packed_validation(manifest, stream) for stream in range(len(manifest.streams))]
    missing = [(stream, group) for stream, of in enumerate(packed) for group, has in enumerate(of) if not has]
    tasks = [{"manifest": manifest.path, "stream": stream, "group": group} for stream, group in missing]
    total = sum(map(len, packed))
    for done, _ in enumerate(ray_tasks.run(_validation_task, tasks, PACK_STUCK_S, place), total - len(tasks) + 1):
        report("hold out", done, total, "groups")


def _tokenize_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a unit of the sources to its receipt."""
    task = json.loads(row["task"])
    unit, text = Unit(**task["unit"]), tokenizer.load(task["uri"])
    return ray_tasks.answer(row, lambda: token_cache.tokenize(unit, text, task["folder"]))


def _select_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a step of the selection to its receipt."""
    task = json.loads(row["task"])
    return ray_tasks.answer(row, lambda: selection.run(selection.read_plan(task["folder"]), task["name"]))


def _pack_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a group of a pass to its receipt."""
    task = json.loads(row["task"])
    manifest = manifests.load(task.pop("manifest"))
    return ray_tasks.answer(row, lambda: passes.pack_group(manifest, **task))


def _validation_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a group of what was kept apart for a stream to its receipt."""
    task = json.loads(row["task"])
    return ray_tasks.answer(
        row, lambda: passes.pack_validation(manifests.load(task["manifest"]), task["stream"], task["group"])
    )
