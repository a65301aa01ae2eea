"""Builds UL2 shards with Ray Data: sources to token cache, token cache to the groups that the mixture needs.

Ray Data schedules work units; their artefacts go to storage, only receipts come back. A unit is done when its
receipt exists, so a build that was killed anywhere goes on where it was, with any number of workers.

A cluster whose CPUs are all taken never stops a build: what no CPU is found for is done in this process. A unit
that was done twice is no harm, since both times the same bytes are written.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import passes, sources, storage, token_cache, tokenizer
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.passes import Group, Passes
from openmoe.pipelines.sources import Unit

Report = Callable[[str, int, int, str], None]  # stage, done, total, unit of both
Work = Callable[[dict[str, str]], dict[str, str]]

# A task gets a CPU within this time, or the cluster counts as occupied.
PROBE_S = 30.0
# Ray Data is given up after this time without any receipt: its CPUs were taken after all. Longer than a task takes;
# compressed files of many GB are one unit.
TOKENIZE_STUCK_S = 3600.0
PACK_STUCK_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """How much of the cluster a build may use.

    Attributes:
      num_workers: tasks at a time; None: one for each CPU that is left.
      reserved_cpus: CPUs of the training workers, which must find them free whenever they start again.
      say: told when this process begins to do tasks, and why.
      is_left: says whether the build is to end; nothing more is asked of Ray then.
    """

    num_workers: int | None = None
    reserved_cpus: float = 0
    say: Callable[[str], None] = lambda line: None
    is_left: Callable[[], bool] = lambda: False


def build(
    config: DataConfig,
    data_dir: str,
    *,
    min_rows: int,
    report: Report = lambda *progress: None,
    place: Workplace = Workplace(),
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
    units = {source.name: sources.inventory(source, config.unit_bytes) for source in config.sources}
    everything = [unit for source in config.sources for unit in units[source.name]]
    path = manifests.manifest_path(data_dir, config, text, everything)
    if storage.exists(path):
        return manifests.load(path)
    folder = storage.join(data_dir, "tokens")
    receipts = _tokenize(everything, config.tokenizer, folder, report, place)
    by_source = {name: [receipts[token_cache.key(u, text)] for u in us] for name, us in units.items()}
    for source in config.sources:
        _check(source, by_source[source.name])
    manifest = manifests.assemble(path, config, text, by_source)
    manifests.commit(manifest)
    return manifest


def _tokenize(units: list[Unit], uri: str, folder: str, report: Report, place: Workplace) -> dict[str, dict[str, Any]]:
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
    for receipt in _run(_tokenize_task, tasks, TOKENIZE_STUCK_S, place):
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


def pack(built: Passes, wanted: list[Group], report: Report, place: Workplace) -> None:
    """Packs those of the groups that have no receipt yet, in this order as far as CPUs allow."""
    manifest = built.manifest
    unpacked = passes.unpacked(manifest, wanted)
    tasks = [{"manifest": manifest.path, **group._asdict()} for group in unpacked]
    total = len(wanted)
    for done, _ in enumerate(_run(_pack_task, tasks, PACK_STUCK_S, place), total - len(tasks) + 1):
        report("pack", done, total, "groups")
    built.refresh()
    built.record()


def _tokenize_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a unit of the sources to its receipt."""
    task = json.loads(row["task"])
    unit, text = Unit(**task["unit"]), tokenizer.load(task["uri"])
    return _answer(row, lambda: token_cache.tokenize(unit, text, task["folder"]))


def _pack_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a group of a pass to its receipt."""
    task = json.loads(row["task"])
    manifest = manifests.load(task.pop("manifest"))
    return _answer(row, lambda: passes.pack_group(manifest, **task))


def _answer(row: dict[str, str], work: Callable[[], dict[str, Any]]) -> dict[str, str]:
    """Returns a task's receipt, or the reason for which there can be none: that stops the build, in one line."""
    try:
        return {**row, "receipt": json.dumps(work()), "error": ""}
    except (DataError, storage.StorageError) as error:
        return {**row, "receipt": "", "error": str(error)}


def _run(work: Work, tasks: list[dict[str, Any]], stuck_s: float, place: Workplace) -> Iterator[dict[str, Any]]:
    """Yields the receipts of tasks as they finish, in any order; only tasks and receipts pass through Ray.

    Ray Data waits for ever when the cluster has no CPU for it. So a task is tried first, and one for which no CPU
    was found, or that Ray lost, is done here, before Ray is asked again.
    """
    left = [json.dumps(task) for task in tasks]
    while left and not place.is_left():
        for answer in _in_ray(work, left, stuck_s, place):
            left.remove(answer["task"])
            yield _receipt(answer)
            if place.is_left():
                return
        if left and not place.is_left():
            yield _receipt(work({"task": left.pop(0)}))


def _receipt(answer: dict[str, str]) -> dict[str, Any]:
    if answer["error"]:
        raise DataError(answer["error"])
    return json.loads(answer["receipt"])


def _in_ray(work: Work, tasks: list[str], stuck_s: float, place: Workplace) -> Iterator[dict[str, str]]:
    """Yields the answers to tasks; ends early when the cluster has no CPU for them, or loses them."""
    import ray.exceptions
    from ray.data.exceptions import ExecutionTimeoutError

    try:
        cpus, selector = _offer(place.reserved_cpus)
        if cpus < 1:
            place.say("the cluster has no CPU for data beside the training workers: the driver does it")
        elif not _gets_a_cpu(selector, place.is_left):
            place.say(f"no CPU of the cluster was free for data within {PROBE_S:g} s: the driver does it")
        else:
            yield from _mapped(work, tasks, place.num_workers or cpus, selector, stuck_s)
    except ExecutionTimeoutError:
        place.say(f"the cluster did nothing for {stuck_s:g} s: the driver does it")
    except ray.exceptions.RayError as error:
        place.say(f"Ray lost a task: the driver does it ({' '.join(str(error).split())[:200]})")


def _mapped(
    work: Work, tasks: list[str], at_once: int, selector: dict[str, str] | None, stuck_s: float
) -> Iterator[dict[str, str]]:
    """Yields the answers to tasks as Ray Data gets them; raises ExecutionTimeoutError when it gets none for long."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    # Tasks rather than actors: the next stage finds their processes running, which take seconds to start.
    compute = ray.data.TaskPoolStrategy(size=min(len(tasks), at_once))
    answers = rows.map(work, num_cpus=1, compute=compute, label_selector=selector)
    answers.context.execution_no_progress_timeout_s = stuck_s
    yield from answers.iter_rows()


def _offer(reserved_cpus: float) -> tuple[int, dict[str, str] | None]:
    """Returns how many CPUs the cluster has for data, free or not, and on which nodes.

    Where some hosts have TPUs and others have none, the others are for data; else what the workers leave.
    """
    import ray
    from ray.util import accelerators

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    without_tpu = [node for node in nodes if "TPU" not in node]
    cpus = sum(int(node.get("CPU", 0)) for node in without_tpu)
    if cpus and len(without_tpu) < len(nodes):
        tpus = [name for key, name in vars(accelerators).items() if key.startswith("GOOGLE_TPU_")]
        # Without spaces: Ray 2.60 takes them for part of the names, and would then refuse no host.
        return cpus, {"ray.io/accelerator-type": f"!in({','.join(tpus)})"}
    return int(sum(node.get("CPU", 0) for node in nodes) - reserved_cpus), None


def _gets_a_cpu(selector: dict[str, str] | None, is_left: Callable[[], bool]) -> bool:
    """Returns whether a task gets a CPU now."""
    import ray

    probe = ray.remote(lambda: None).options(num_cpus=1, label_selector=selector).remote()
    deadline_s, started = time.monotonic() + PROBE_S, []
    while not started and time.monotonic() < deadline_s and not is_left():
        started, _ = ray.wait([probe], timeout=0.2)
    if not started and not is_left():
        ray.cancel(probe)
    return bool(started)
