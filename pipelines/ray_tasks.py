"""Tasks done under Ray Data, whatever becomes of its workers: only tasks and receipts pass through Ray.

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
from dataclasses import dataclass
from typing import Any

from openmoe.pipelines import limits, storage, task_memory
from openmoe.pipelines.config import DataError
from openmoe.pipelines.sources import Unit

GiveUp = Callable[[dict[str, Any]], dict[str, Any]]
Work = Callable[[dict[str, str]], dict[str, str]]

# Nodes that `ray start --labels openmoe.ai/role=data` started do data work, and no others do.
DATA_LABEL = ("openmoe.ai/role", "data")
# A task gets a CPU within this time, or the cluster counts as occupied.
PROBE_S = 30.0


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


ANYWHERE = Workplace()


def answer(row: dict[str, str], work: Callable[[], dict[str, Any]]) -> dict[str, str]:
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


def run(
    work: Work, tasks: list[dict[str, Any]], stuck_s: float, place: Workplace, give_up: GiveUp = _give_up
) -> Iterator[dict[str, Any]]:
    """Yields the receipts of tasks as they finish, in any order.

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
