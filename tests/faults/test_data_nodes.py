"""Where the tasks of a build run on a cluster of TPU hosts: on the twin, in a driver of its own."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

PROGRAM = """
import json
import ray
from openmoe.pipelines import ray_tasks

ray.init(log_to_driver=False)

def where(row):
    return {**row, "receipt": json.dumps(ray.get_runtime_context().get_node_id()), "error": "", "fault": ""}

def where_the_driver_does_it(row):
    return {**row, "receipt": '"driver"', "error": "", "fault": ""}

said, ray_tasks.PROBE_S = [], 120.0
place = ray_tasks.Workplace(reserved_cpus=8, say=said.append)
used = set(ray_tasks.run(where, [{"task": n} for n in range(24)], 60.0, place))

@ray.remote(num_cpus=1, label_selector={"ray.io/node-id": next(iter(used))})
class Busy:
    def is_there(self):
        return True

busy, ray_tasks.PROBE_S = [Busy.remote() for _ in range(2)], 1.0
ray.get([actor.is_there.remote() for actor in busy])
beside = set(ray_tasks.run(where_the_driver_does_it, [{"task": n} for n in range(2)], 60.0, place))
tpus = [node["NodeID"] for node in ray.nodes() if "TPU" in node["Resources"]]
print(json.dumps({"used": sorted(used), "tpus": tpus, "said": said, "beside": sorted(beside)}))
"""


def test_data_tasks_leave_tpu_hosts_alone_even_where_those_are_idle_and_the_head_is_busy(twin):
    command = [sys.executable, "-c", PROGRAM]
    driver = subprocess.run(command, env=twin.environment(), capture_output=True, text=True, timeout=300)
    assert driver.returncode == 0, driver.stderr
    seen = json.loads(driver.stdout.splitlines()[-1])
    assert len(seen["tpus"]) == 4
    assert len(seen["used"]) == 1
    assert not set(seen["used"]) & set(seen["tpus"])
    assert seen["beside"] == ["driver"]
    assert seen["said"] == ["no CPU of the cluster was free for data within 1 s: the driver does it"] * 2


LOSING = """
import json
import os
import signal
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from openmoe.pipelines import limits, ray_tasks

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
for _ in range(2):
    cluster.add_node(num_cpus=1, labels=dict([ray_tasks.DATA_LABEL]))
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
begun = Path(sys.argv[1])

def work(row):
    task = json.loads(row["task"])
    if task["dies"] != "never" and not (begun / task["dies"]).exists():
        (begun / task["dies"]).touch()
        os.kill(os.getppid() if task["dies"] == "with its node" else os.getpid(), signal.SIGKILL)
    return {**row, "receipt": json.dumps("done, " + task["dies"]), "error": "", "fault": ""}

said, limits.MAX_LOSSES = [], 1
place = ray_tasks.Workplace(say=said.append)
tasks = [{"dies": how} for how in ("with its node", "alone", "never")]
receipts = list(ray_tasks.run(work, tasks, 60.0, place, lambda task: "given up, " + task["dies"]))
print(json.dumps({"receipts": sorted(receipts), "said": said}))
ray.shutdown()
cluster.shutdown()
"""


def test_what_is_lost_with_its_node_is_done_again_and_not_blamed_as_what_kills_its_worker_alone(tmp_path):
    command = [sys.executable, "-c", LOSING, str(tmp_path)]
    driver = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert driver.returncode == 0, driver.stderr
    seen = json.loads(driver.stdout.splitlines()[-1])
    assert seen["receipts"] == ["done, never", "done, with its node", "given up, alone"]
    [line] = seen["said"]
    assert line.startswith("lost node ")
