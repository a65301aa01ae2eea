"""Builds UL2 shards with Ray Data: sources to token cache, token cache to the passes that the mixture needs.

Ray Data schedules work units; their artefacts go to storage, only receipts come back. A unit is done when its
receipt exists, so a build that was killed anywhere goes on where it was, with any number of workers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import packing, shards, sources, storage, token_cache, tokenizer, ul2
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.mixture import Mixture
from openmoe.pipelines.permute import Permutation
from openmoe.pipelines.sources import Unit

Report = Callable[[str, int, int, str], None]  # stage, done, total, unit of both


def build(
    config: DataConfig,
    data_dir: str,
    *,
    min_rows: int,
    report: Report = lambda stage, done, total, unit: None,
    num_workers: int | None = None,
) -> Manifest:
    """Builds what the global rows [0, min_rows) need and that is missing. Ray must be initialized.

    Args:
      config: what the rows are made of.
      data_dir: where artefacts go, local or gs://; may be shared by builds of other configurations.
      min_rows: rows wanted; more can be asked for later and never change earlier ones.
      report: told of progress as receipts arrive.
      num_workers: tasks at a time; None: one for each CPU of the cluster.

    Returns:
      The manifest, with whose path a Loader is opened.
    """
    text = tokenizer.load(config.tokenizer)
    units = {source.name: sources.inventory(source, config.unit_bytes) for source in config.sources}
    everything = [unit for source in config.sources for unit in units[source.name]]
    path = manifests.manifest_path(data_dir, config, text, everything)
    if storage.exists(path):
        manifest = manifests.load(path)
    else:
        folder = storage.join(data_dir, "tokens")
        receipts = _tokenize(everything, config.tokenizer, folder, report, num_workers)
        by_source = {name: [receipts[token_cache.key(u, text)] for u in us] for name, us in units.items()}
        for source in config.sources:
            _check(source, by_source[source.name])
        manifest = manifests.assemble(path, config, text, by_source)
        manifests.commit(manifest)
    _build_passes(manifest, min_rows, report, num_workers)
    return manifest


def _tokenize(
    units: list[Unit], uri: str, folder: str, report: Report, num_workers: int | None
) -> dict[str, dict[str, Any]]:
    """Returns the receipts of all units by key, tokenizing those that have none."""
    keyed = {token_cache.key(unit, tokenizer.load(uri)): unit for unit in units}
    present = set(storage.list_files(folder))
    receipts = {
        key: json.loads(storage.read_bytes(storage.join(folder, f"{key}.json")))
        for key in keyed
        if f"{key}.json" in present
    }
    missing = [unit for key, unit in keyed.items() if key not in receipts]
    tasks = [{"unit": asdict(unit), "uri": uri, "folder": folder} for unit in missing]
    for receipt in _run(_tokenize_task, tasks, num_workers):
        receipts[receipt["key"]] = receipt
        report("tokenize", len(receipts), len(keyed), "units")
    return receipts


def _check(source: SourceConfig, receipts: list[dict[str, Any]]) -> None:
    """Raises DataError when a source is empty or too much of it is unusable."""
    good = sum(receipt["documents"] for receipt in receipts)
    bad = sum(sum(receipt["bad"].values()) for receipt in receipts)
    worst = max(receipts, key=lambda receipt: sum(receipt["bad"].values()), default=None)
    if bad > source.max_bad_share * (good + bad) and worst:
        sample = worst["bad_samples"][0]
        raise DataError(
            f"sources.{source.name}: {bad} of {good + bad} documents are unusable, max_bad_share allows "
            f"{source.max_bad_share:g}; first in {worst['path']} at {sample['offset']}: {sample['reason']}; "
            "mend the file or raise max_bad_share"
        )
    if not good:
        raise DataError(f"sources.{source.name}: no document in {len(receipts)} units of {', '.join(source.paths)}")


def _build_passes(manifest: Manifest, min_rows: int, report: Report, num_workers: int | None) -> None:
    """Adds passes until every source has the rows that its share of [0, min_rows) needs."""
    mixture = Mixture([source.weight for source in manifest.sources], manifest.seed)
    needed = mixture.rows_needed(min_rows)
    while True:
        wanted: list[tuple[int, int]] = []  # (source, pass)
        for index in range(len(manifest.sources)):
            rows = [sum(group["rows"] for group in groups) for groups in manifest.finished_passes(index)]
            lacking = int(needed[index]) - sum(rows)
            if lacking > 0:
                num_passes = -(-lacking // rows[-1]) if rows else 1
                wanted += [(index, len(rows) + extra) for extra in range(num_passes)]
        if not wanted:
            return
        _pack(manifest, wanted, report, num_workers)


def _pack(manifest: Manifest, passes: list[tuple[int, int]], report: Report, num_workers: int | None) -> None:
    """Packs the groups of some passes that have no receipt yet, then completes the passes."""
    receipts = {each: _group_receipts(manifest, *each) for each in passes}
    groups = [(*each, group) for each in passes for group in range(len(manifest.groups(*each)))]
    tasks = [
        {"manifest": manifest.path, "source": index, "number": number, "group": group}
        for index, number, group in groups
        if group not in receipts[index, number]
    ]
    for done, receipt in enumerate(_run(_pack_task, tasks, num_workers), 1):
        receipts[receipt["source"], receipt["number"]][receipt["group"]] = receipt
        report("pack", len(groups) - len(tasks) + done, len(groups), "groups")
    for (index, number), by_group in receipts.items():
        content = {"groups": [by_group[group] for group in sorted(by_group)]}
        path = storage.join(manifest.pass_folder(index, number), "pass.json")
        storage.create_if_absent(path, json.dumps(content).encode())


def _group_receipts(manifest: Manifest, index: int, number: int) -> dict[int, dict[str, Any]]:
    folder = manifest.pass_folder(index, number)
    names = (name for name in storage.list_files(folder) if name.endswith(".json") and name != "pass.json")
    found = (json.loads(storage.read_bytes(storage.join(folder, name))) for name in names)
    return {receipt["group"]: receipt for receipt in found}


def _tokenize_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a unit of the sources to its receipt."""
    task = json.loads(row["task"])
    unit, text = Unit(**task["unit"]), tokenizer.load(task["uri"])
    return _answer(lambda: token_cache.tokenize(unit, text, task["folder"]))


def _pack_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a group of a pass to its receipt."""
    task = json.loads(row["task"])
    manifest = manifests.load(task.pop("manifest"))
    return _answer(lambda: pack_group(manifest, **task))


def pack_group(manifest: Manifest, source: int, number: int, group: int) -> dict[str, Any]:
    """Writes one shard, a pure function of the arguments, and returns its receipt.

    Args:
      manifest: of the build.
      source: index of the source in the manifest.
      number: of the pass.
      group: of the pass.
    """
    units = manifest.groups(source, number)[group]
    key = (manifest.seed, manifest.sources[source].name, number, group)
    tokens, lengths, origin = _shuffled(manifest, source, units, *key)
    rows = packing.rows(tokens, lengths, manifest.seq_len, manifest.vocabulary, *key)
    name = storage.join(manifest.pass_folder(source, number), f"{group:05d}")
    facts = shards.write(f"{name}.array_record", rows, origin)
    receipt = {"source": source, "number": number, "group": group, "units": units, **facts}
    storage.create_if_absent(f"{name}.json", json.dumps(receipt).encode())
    return receipt


def _shuffled(
    manifest: Manifest, source: int, units: list[int], *key: int | str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a group's documents in shuffled order: tokens, lengths, and (unit, document) of each."""
    folder = storage.join(manifest.data_dir, "tokens")
    receipts = [manifest.sources[source].units[unit] for unit in units]
    parts = [token_cache.read(folder, r["key"], sha256=r["sha256"]) for r in receipts]
    tokens = np.concatenate([part.tokens for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    counts = [len(part.lengths) for part in parts]
    origin = np.stack([np.repeat(units, counts), np.concatenate([np.arange(n) for n in counts])], axis=1)
    order = Permutation(len(lengths), "documents", *key)(np.arange(len(lengths)))
    starts = np.cumsum(lengths) - lengths
    return tokens[ul2.ranges(starts[order], lengths[order])], lengths[order], origin[order]


def _answer(work: Callable[[], dict[str, Any]]) -> dict[str, str]:
    """Returns a receipt, or the reason for which there can be none: that stops the build, in one line."""
    try:
        return {"receipt": json.dumps(work()), "error": ""}
    except (DataError, storage.StorageError) as error:
        return {"receipt": "", "error": str(error)}


def _run(
    work: Callable[[dict[str, str]], dict[str, str]], tasks: list[dict[str, Any]], num_workers: int | None
) -> Iterator[dict[str, Any]]:
    """Yields the receipts of tasks as they finish, in any order; only tasks and receipts pass through Ray."""
    if not tasks:
        return
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    items = [{"task": json.dumps(task)} for task in tasks]
    # Tasks rather than actors: the next stage finds their processes running, which take seconds to start.
    size = min(len(items), num_workers or max(1, int(ray.cluster_resources()["CPU"])))
    answers = ray.data.from_items(items, override_num_blocks=len(items)).map(
        work, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=size)
    )
    for answer in answers.iter_rows():
        if answer["error"]:
            raise DataError(answer["error"])
        yield json.loads(answer["receipt"])
