"""A real Ray of real raylets: slices live, break, are taken away and come back, and nothing else is touched."""

import json
import subprocess
import sys
import time

import psutil
import pytest

from openmoe.clusters import twin as twin_module
from openmoe.clusters import twin_state

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

LOOK = """
import json, ray
ray.init(log_to_driver=False)
print(json.dumps([[n["Alive"], n["Labels"], n["Resources"]] for n in ray.nodes()]))
"""
# Holds a slice as a worker group does, and says which nodes Ray was told will go, until one of them is gone.
OCCUPY = """
import json, ray, time
from ray._private.state import state
ray.init(log_to_driver=False)

@ray.remote(num_cpus=0, resources={"TPU": 4, "slice-a": 0.1})
class Worker:
    def node(self):
        return ray.get_runtime_context().get_node_id()

workers = [Worker.remote() for _ in range(2)]
held = set(ray.get([worker.node.remote() for worker in workers]))
print(json.dumps(len(held)), flush=True)
seen = {}
while all(node["Alive"] for node in ray.nodes() if node["NodeID"] in held):
    seen |= state.get_draining_nodes()
    time.sleep(0.1)
print(json.dumps([len(held & seen.keys()), min(seen.values()) / 1000]))
"""


@pytest.fixture(scope="module")
def decoy():
    """A process that looks like one of a cluster's, and is not."""
    command = [sys.executable, "-c", "import time; time.sleep(3600)", "raylet", "ray::RayTrainWorker"]
    with subprocess.Popen(command, start_new_session=True) as process:
        yield process
        process.kill()


def wait_for(condition, timeout_s=60):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def records(twin):
    return {each.name: each.state for each in twin_module.instances(twin.state_dir)}


def test_two_slices_are_ready_and_ray_itself_knows_them(twin):
    assert twin.states() == {"slice-a": "ready", "slice-b": "ready"}
    output = subprocess.run([sys.executable, "-c", LOOK], env=twin.environment(), capture_output=True, check=True)
    nodes = [(labels, resources) for alive, labels, resources in json.loads(output.stdout) if alive]
    hosts = {}
    for labels, resources in nodes:
        if "TPU" in resources:
            key = (labels["ray.io/tpu-slice-name"], labels["ray.io/tpu-worker-id"])
            hosts[key] = (resources["TPU"], resources["CPU"], "TPU-v4-16-head" in resources)
            assert labels["ray.io/tpu-topology"] == "2x2x2"
        else:
            assert resources["CPU"] == 2
    assert len(nodes) == 5
    assert hosts == {
        ("slice-a", "0"): (4, 1, True),
        ("slice-a", "1"): (4, 1, False),
        ("slice-b", "0"): (4, 1, True),
        ("slice-b", "1"): (4, 1, False),
    }


def test_the_token_is_in_one_private_file_and_nowhere_else(twin):
    token_file = twin_module.connection(twin.state_dir).token_file
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_text()
    assert len(token) == 64
    for process in twin.processes():
        assert token not in " ".join(process.cmdline())
        assert token not in str(process.environ())
    others = [path for path in twin.state_dir.rglob("*") if path.is_file() and path != token_file]
    assert others
    assert not [path for path in others if token in path.read_text(errors="replace")]


def test_a_killed_raylet_is_a_fault_in_the_record_and_only_its_slice_is_started_again(twin):
    others = {process.pid for process in twin.processes("slice-a") + twin.processes("head")}
    [raylet] = [process for process in twin.processes("slice-b-1") if process.name() == "raylet"]
    raylet.kill()
    wait_for(lambda: twin.states()["slice-b"] == "broken", timeout_s=5)
    assert twin.states()["slice-a"] == "ready"
    assert set(records(twin).values()) == {"RUNNING"}

    assert "slice-a runs" in twin.up()

    assert twin.states() == {"slice-a": "ready", "slice-b": "ready"}
    assert others <= {process.pid for process in twin.processes()}


def test_a_slice_taken_away_with_notice_is_announced_to_ray_before_it_goes(twin):
    command = [sys.executable, "-c", OCCUPY]
    with subprocess.Popen(command, env=twin.environment(), stdout=subprocess.PIPE, text=True) as driver:
        assert json.loads(driver.stdout.readline()) == 2  # both hosts are occupied
        began_s = time.time()
        twin_module.preempt(twin.state_dir, "slice-a", 5, print)
        took_s = time.time() - began_s
        said = driver.communicate(timeout=60)[0].splitlines()  # Ray's own words on dead nodes around it
        [announced, until_s] = next(json.loads(line) for line in said if line.startswith("["))
    assert announced == 2
    assert 5 <= until_s - began_s <= took_s + 1
    assert records(twin) == {
        "slice-a-0": "PREEMPTED",
        "slice-a-1": "PREEMPTED",
        "slice-b-0": "RUNNING",
        "slice-b-1": "RUNNING",
    }
    assert twin.states() == {"slice-a": "preempted", "slice-b": "ready"}
    assert twin.processes("slice-a") == []


def test_a_slice_taken_away_comes_back_with_up(twin):
    twin.up()
    assert twin.states() == {"slice-a": "ready", "slice-b": "ready"}
    assert set(records(twin).values()) == {"RUNNING"}


def test_down_ends_every_process_though_half_are_dead_and_none_of_others(twin, decoy):
    temp_dir = twin_state.load(twin.state_dir).temp_dir
    twin.kill_host("slice-a-0")
    [leader] = [process for process in twin.processes("slice-b-0") if "scripts" in " ".join(process.cmdline())]
    leader.kill()
    ours = twin.processes()

    twin_module.down(twin.state_dir, print)

    assert not [process for process in ours if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert decoy.poll() is None
    assert not twin.state_dir.exists()
    assert not temp_dir.exists()
    assert twin_module.instances(twin.state_dir) == []
