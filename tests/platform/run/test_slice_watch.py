"""What lives of a broken slice is drained, however often Ray has to be asked."""

import subprocess
import sys

import pytest
import ray

from openmoe.platform.run import hosts, slice_watch
from openmoe.platform.run.slice_watch import SliceWatch
from openmoe.platform.run.slices import SLICE, TOPOLOGY, WORKER_ID

ANSWERS = {"refuses": "import sys; sys.exit('the raylet did not answer')", "agrees": ""}


def node(worker, *, alive=True):
    labels = {SLICE: "slice-a", WORKER_ID: str(worker), TOPOLOGY: "2x2x2"}
    return {"NodeID": f"node-{worker}", "Alive": alive, "Labels": labels, "Resources": {"TPU": 4.0}}


@pytest.fixture
def cluster(monkeypatch):
    """Puts a table of nodes in the place of Ray's, and a command that answers as told in that of `ray drain-node`."""
    table = {"nodes": [node(0), node(1)], "in_use": set(), "answers": [], "asked": []}

    def drain(node_id):
        table["asked"].append(node_id)
        command = [sys.executable, "-c", ANSWERS[table["answers"].pop(0)]]
        drain = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        drain.wait()
        return drain

    monkeypatch.setattr(ray, "nodes", lambda: table["nodes"])
    monkeypatch.setattr(slice_watch, "_in_use", lambda: table["in_use"])
    monkeypatch.setattr(hosts, "answers", lambda node: node["Alive"])
    monkeypatch.setattr(hosts, "drain", drain)
    monkeypatch.setattr(slice_watch, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(slice_watch, "AGAIN_AFTER_S", 0.0)
    return table


def test_what_ray_refused_to_drain_is_asked_for_again_unless_it_is_in_use_or_gone(cluster):
    said = []
    watch = SliceWatch(said.append)
    assert watch.settled()
    cluster["nodes"] = [node(0), node(1, alive=False)]
    cluster["answers"] = ["refuses", "refuses", "agrees"]
    assert not watch.settled()
    assert cluster["asked"] == ["node-0"]
    cluster["in_use"] = {"node-0"}
    watch.look()
    assert cluster["asked"] == ["node-0"]
    cluster["in_use"] = set()
    for _ in range(4):
        watch.look()
    assert cluster["asked"] == ["node-0"] * 3
    assert said[1:] == ["drain: the raylet did not answer"] * 2
    cluster["nodes"] = [node(0, alive=False), node(1, alive=False)]
    assert watch.settled()


def test_what_is_gone_is_not_asked_for_again(cluster):
    watch = SliceWatch(lambda text: None)
    watch.look()
    cluster["nodes"], cluster["answers"] = [node(0), node(1, alive=False)], ["refuses"]
    watch.look()
    cluster["nodes"] = [node(0, alive=False), node(1, alive=False)]
    assert watch.settled()
    watch.look()
    assert cluster["asked"] == ["node-0"]
