"""Where the tasks of a build run on a cluster of TPU hosts: on the twin, in a driver of its own."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

PROGRAM = """
import json
import ray
from openmoe.pipelines import build

ray.init(log_to_driver=False)

def where(row):
    return {**row, "receipt": json.dumps(ray.get_runtime_context().get_node_id()), "error": "", "fault": ""}

def where_the_driver_does_it(row):
    return {**row, "receipt": '"driver"', "error": "", "fault": ""}

said, build.PROBE_S = [], 120.0
place = build.Workplace(reserved_cpus=8, say=said.append)
used = set(build._run(where, [{"task": n} for n in range(24)], 60.0, place))

@ray.remote(num_cpus=1, label_selector={"ray.io/node-id": next(iter(used))})
class Busy:
    def is_there(self):
        return True

busy, build.PROBE_S = [Busy.remote() for _ in range(2)], 1.0
ray.get([actor.is_there.remote() for actor in busy])
beside = set(build._run(where_the_driver_does_it, [{"task": n} for n in range(2)], 60.0, place))
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
