"""Builds UL2 shards with Ray Data: sources to token cache, token cache to the groups that the mixture needs.

Ray Data schedules work units; their artefacts go to storage, only receipts come back. A unit is done when its
receipt exists, so a build that was killed anywhere goes on where it was, with any number of workers.

A cluster whose CPUs are all taken never stops a build: what no CPU is found for is done in this process. A unit
that was done twice is no harm, since both times the same bytes are written.

Ray would repeat for ever a task that always kills its worker. So it repeats none: what it lost is given to it again,
the last time alone, and then given up. Losses are counted by the living driver only: whatever else dies together
with it, no unit is blamed for that. Nor is it blamed for what was lost while a node was: nodes are taken away.
"""

from __future__ import annotations

import collections
import json
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from openmoe.pipelines import limits, passes, selection, sources, storage, task_memory, token_cache, tokenizer
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.config import DataConfig, DataError
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.passes import Group, Passes
from openmoe.pipelines.sources import Unit

Report = Callable[..., None]  # stage, done, total, unit of both; and what is left of each source
GiveUp = Callable[[dict[str, Any]], dict[str, Any]]
Work = Callable[[dict[str, str]], dict[str, str]]

# Nodes that `ray start --labels openmoe.ai/role=data` started do data work, and no others do.
DATA_LABEL = ("openmoe.ai/role", "data")
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
      task_memory_bytes: memory that Ray reserves for each task, and that it may take; None: as it sees fit.
      reserved_cpus: CPUs of the training workers, which must find them free whenever they start again.
      say: told when this process begins to do tasks, and why.
      is_left: says whether the build is to end; nothing more is asked of Ray then.
    """

    num_workers: int | None = None
    task_memory_bytes: int | None = None
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
    for receipt in _run(_tokenize_task, missing, TOKENIZE_STUCK_S, place, quarantine):
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
        for receipt in _run(_select_task, tasks, PACK_STUCK_S, place):
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
    for done, receipt in enumerate(_run(_pack_task, tasks, PACK_STUCK_S, place), total - len(tasks) + 1):
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
    for done, _ in enumerate(_run(_validation_task, tasks, PACK_STUCK_S, place), total - len(tasks) + 1):
        report("hold out", done, total, "groups")


def _tokenize_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a unit of the sources to its receipt."""
    task = json.loads(row["task"])
    unit, text = Unit(**task["unit"]), tokenizer.load(task["uri"])
    return _answer(row, lambda: token_cache.tokenize(unit, text, task["folder"]))


def _select_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a step of the selection to its receipt."""
    task = json.loads(row["task"])
    return _answer(row, lambda: selection.run(selection.read_plan(task["folder"]), task["name"]))


def _pack_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a group of a pass to its receipt."""
    task = json.loads(row["task"])
    manifest = manifests.load(task.pop("manifest"))
    return _answer(row, lambda: passes.pack_group(manifest, **task))


def _validation_task(row: dict[str, str]) -> dict[str, str]:
    """Ray task: a group of what was kept apart for a stream to its receipt."""
    task = json.loads(row["task"])
    return _answer(row, lambda: passes.pack_validation(manifests.load(task["manifest"]), task["stream"], task["group"]))


def _answer(row: dict[str, str], work: Callable[[], dict[str, Any]]) -> dict[str, str]:
    """Returns a task's receipt, or the reason for which there can be none: that stops the build, in one line."""
    try:
        return {**row, "receipt": json.dumps(work()), "error": "", "fault": ""}
    except storage.StorageDenied as error:
        return {**row, "receipt": "", "error": str(error), "fault": "", "denied": "yes"}
    except (DataError, storage.StorageError) as error:
        return {**row, "receipt": "", "error": str(error), "fault": ""}
    except MemoryError:
        raise  # counts as the end of the worker
    except Exception:
        return {**row, "receipt": "", "error": "", "fault": traceback.format_exc()}


def _give_up(task: dict[str, Any]) -> dict[str, Any]:
    raise DataError(f"a task killed its worker {limits.MAX_LOSSES} times, as out of memory does: {json.dumps(task)}")


def _run(
    work: Work, tasks: list[dict[str, Any]], stuck_s: float, place: Workplace, give_up: GiveUp = _give_up
) -> Iterator[dict[str, Any]]:
    """Yields the receipts of tasks as they finish, in any order; only tasks and receipts pass through Ray.

    Ray Data waits for ever when the cluster has no CPU for it. So a task is tried first, and one for which no CPU
    was found is done here, before Ray is asked again; but never one whose worker died.

    Args:
      work: a Ray task.
      tasks: its arguments.
      stuck_s: when Ray is given up.
      place: where the tasks run.
      give_up: returns the receipt of a task whose workers all died alone, or raises DataError.
    """
    left = [json.dumps(task) for task in tasks]
    losses: collections.Counter[str] = collections.Counter()
    with_nodes: collections.Counter[str] = collections.Counter()
    while left and not place.is_left():
        together = [task for task in left if losses[task] < limits.MAX_LOSSES - 1]
        tried, answered = together or left[:1], False
        for answer in _in_ray(work, tried, stuck_s, place):
            answered, task = True, answer["task"]
            nodes = answer.get("nodes", "")
            with_nodes[task] += bool(nodes)
            losses[task] += "lost" in answer and (not nodes or with_nodes[task] > limits.MAX_LOSSES_WITH_NODES)
            if "lost" not in answer or losses[task] == limits.MAX_LOSSES:
                left.remove(task)
                yield give_up(json.loads(task)) if "lost" in answer else _receipt(answer)
            elif nodes:
                place.say(f"lost {nodes}, and with it {_named(task)}: it is done again")
            else:
                place.say(f"a worker died, {losses[task]} of {limits.MAX_LOSSES} times over {_named(task)}")
            if place.is_left():
                return
        untouched = (t for t in tried if t in left and not losses[t] and not (answered and with_nodes[t]))
        if not place.is_left() and (task := next(untouched, None)):
            left.remove(task)
            yield _receipt(work({"task": task}))


def _named(task: str) -> str:
    fields = json.loads(task)
    return f"{fields['unit']['source']}: {Unit(**fields['unit'])}" if "unit" in fields else task


def _receipt(answer: dict[str, str]) -> dict[str, Any]:
    if answer.get("denied"):
        raise storage.StorageDenied(answer["error"])
    if answer["error"]:
        raise DataError(answer["error"])
    if answer["fault"]:
        raise RuntimeError(answer["fault"])
    return json.loads(answer["receipt"])


def _in_ray(work: Work, tasks: list[str], stuck_s: float, place: Workplace) -> Iterator[dict[str, str]]:
    """Yields the answers to tasks, at the end those that were lost; ends early when the cluster has no CPU for them."""
    import ray
    import ray.exceptions
    from ray.data.exceptions import ExecutionTimeoutError

    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus, selector = offer(nodes, place)
        needs = {"num_cpus": 1, "memory": place.task_memory_bytes, "label_selector": selector}
        if cpus < 1:
            place.say("the cluster has no CPU for data beside the training workers: the driver does it")
        elif not _gets_a_cpu(needs, place.is_left):
            place.say(f"no CPU of the cluster was free for data within {PROBE_S:g} s: the driver does it")
        else:
            lost = set(tasks)
            for answer in _mapped(work, tasks, place.num_workers or cpus, needs, stuck_s):
                lost.discard(answer["task"])
                yield answer
            gone = _gone(nodes) if lost else []
            yield from ({"task": task, "lost": "", "nodes": ", ".join(gone)} for task in tasks if task in lost)
    except ExecutionTimeoutError:
        place.say(f"the cluster did nothing for {stuck_s:g} s: the driver does it")
    except ray.exceptions.RayError as error:
        place.say(f"Ray failed: the driver does it ({' '.join(str(error).split())[:200]})")


def _mapped(
    work: Work, tasks: list[str], at_once: int, needs: dict[str, Any], stuck_s: float
) -> Iterator[dict[str, str]]:
    """Yields the answers to tasks as Ray Data gets them, none to those whose worker died.

    Raises:
      ExecutionTimeoutError: there was no answer for long.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    # Tasks rather than actors: the next stage finds their processes running, which take seconds to start.
    compute = ray.data.TaskPoolStrategy(size=min(len(tasks), at_once))
    with warnings.catch_warnings():  # Ray 2.60 calls every way to this option outdated, and has no other yet
        warnings.simplefilter("ignore", DeprecationWarning)
        answers = rows.map(task_memory.within(needs["memory"], work), compute=compute, max_retries=0, **needs)
    answers.context.execution_no_progress_timeout_s = stuck_s
    answers.context.max_errored_blocks = -1
    yield from answers.iter_rows()


def offer(nodes: list[dict[str, Any]], place: Workplace) -> tuple[int, dict[str, str] | None]:
    """Returns how many tasks the cluster has CPUs and memory for, free or not, and on which nodes.

    Nodes whose label says that they are for data are the only ones, if there are any. Else, where some hosts have
    TPUs and others have none, the others are for data; else what the workers leave.

    Args:
      nodes: the living ones, as Ray describes them.
      place: what is reserved for the workers, and what a task needs.
    """

    def room(nodes: list[dict[str, Any]], reserved_cpus: float) -> int:
        cpus = int(sum(node["Resources"].get("CPU", 0) for node in nodes) - reserved_cpus)
        if place.task_memory_bytes is None:
            return cpus
        return min(cpus, sum(int(node["Resources"].get("memory", 0) // place.task_memory_bytes) for node in nodes))

    name, value = DATA_LABEL
    if labelled := [node for node in nodes if node["Labels"].get(name) == value]:
        return room(labelled, 0), {name: value}
    without_tpu = [node for node in nodes if "TPU" not in node["Resources"]]
    if len(without_tpu) < len(nodes) and any(node["Resources"].get("CPU", 0) >= 1 for node in without_tpu):
        from ray.util import accelerators

        tpus = [name for key, name in vars(accelerators).items() if key.startswith("GOOGLE_TPU_")]
        # Without spaces: Ray 2.60 takes them for part of the names, and would then refuse no host.
        return room(without_tpu, 0), {"ray.io/accelerator-type": f"!in({','.join(tpus)})"}
    return room(nodes, place.reserved_cpus), None


def _gone(nodes: list[dict[str, Any]]) -> list[str]:
    """Returns the addresses of nodes that were alive and are not.

    A worker's end is known at once, a node's only after some time. So each node is given a task that it alone can
    do: where it is alive that is done, and where it is not, its end is known when Ray gives up.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probe = ray.remote(lambda: None).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        asked.append(probe.remote())
    ray.wait(asked, num_returns=len(asked), timeout=PROBE_S)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [f"node {node['NodeManagerAddress']}" for node in nodes if node["NodeID"] not in alive]


def _gets_a_cpu(needs: dict[str, Any], is_left: Callable[[], bool]) -> bool:
    """Returns whether a task gets a CPU now."""
    import ray

    probe = ray.remote(lambda: None).options(**needs).remote()
    deadline_s, started = time.monotonic() + PROBE_S, []
    while not started and time.monotonic() < deadline_s and not is_left():
        started, _ = ray.wait([probe], timeout=0.2)
    if not started and not is_left():
        ray.cancel(probe)
    return bool(started)
