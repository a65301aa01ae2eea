import os
import sys

import pytest

from openmoe.clusters import processes, provider, ray_start, twin, twin_start, twin_state
from openmoe.clusters.provider import Instance
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.twin import HostStatus
from openmoe.clusters.twin_state import TwinError

SPEC = ClusterSpec(name="small", provider="twin", accelerator="v4", topology="2x2x2", slices=2)


def host(instance="RUNNING", *, alive=True):
    return HostStatus(name="", worker_id=0, ip="", alive=alive, instance=instance, since_s=0.0, pid=None)


@pytest.mark.parametrize(
    ("hosts", "head_alive", "state"),
    [
        ([host(), host()], True, "ready"),
        ([host(), host(alive=False)], True, "broken"),
        ([host(alive=False), host(alive=False)], True, "broken"),
        ([host(), host()], False, "broken"),
        ([host("PREEMPTED"), host()], True, "preempted"),
        ([host("PREEMPTED", alive=False), host("STOPPED", alive=False)], True, "preempted"),
        ([host("STOPPED", alive=False), host("STOPPED", alive=False)], True, "stopped"),
        ([host("STOPPED"), host("STOPPED", alive=False)], True, "stopped"),
    ],
)
def test_a_slice_is_ready_only_as_a_whole(hosts, head_alive, state):
    assert twin.slice_state(hosts, head_alive=head_alive) == state


def test_hosts_have_names_by_slice_and_addresses_of_their_own():
    planned = ray_start.planned(SPEC, "127.71.3")
    assert [(i.name, i.slice, i.worker_id, i.ip, i.state) for i in planned] == [
        ("slice-a-0", "slice-a", 0, "127.71.3.10", "STOPPED"),
        ("slice-a-1", "slice-a", 1, "127.71.3.11", "STOPPED"),
        ("slice-b-0", "slice-b", 0, "127.71.3.12", "STOPPED"),
        ("slice-b-1", "slice-b", 1, "127.71.3.13", "STOPPED"),
    ]
    assert [ray_start.slice_name(n) for n in (0, 25, 26, 51, 52)] == [
        "slice-a",
        "slice-z",
        "slice-aa",
        "slice-az",
        "slice-ba",
    ]


def test_a_host_s_environment_says_tpu_and_nothing_of_where_it_was_started(tmp_path):
    inherited = {
        "HOME": "/h",
        "PATH": "/bin",
        "RAY_ADDRESS": "elsewhere",
        "RAY_AUTH_TOKEN": "secret",
        "TPU_NAME": "other",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": "/cache",
    }
    [instance] = [i for i in ray_start.planned(SPEC, "127.71.3") if i.name == "slice-b-1"]
    environment = ray_start.environment(inherited, tmp_path / "token") | ray_start.host_environment(SPEC, instance)
    tpu = {name: value for name, value in environment.items() if name.startswith(("TPU_", "JAX_", "XLA_"))}
    assert tpu == {
        "TPU_NAME": "slice-b",
        "TPU_WORKER_ID": "1",
        "TPU_ACCELERATOR_TYPE": "v4-16",
        "TPU_TOPOLOGY": "2x2x2",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COMPILATION_CACHE_DIR": "/cache",
    }
    assert environment["HOME"] == "/h"
    assert environment["PATH"].endswith(f"{os.pathsep}/bin")
    assert not environment.keys() & {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")


def test_two_clusters_of_one_name_have_different_addresses(tmp_path):
    homes = [tmp_path / str(n) / "clusters" / "local" for n in range(20)]
    assert len({(ray_start.subnet(each), ray_start.first_port(each)) for each in homes}) == 20
    assert all(ray_start.first_port(each) in ray_start.PORTS for each in homes)


@pytest.mark.parametrize(
    ("settings", "system", "message"),
    [
        ({}, "darwin", "provider twin: needs Linux, this is darwin; provider local (plain local Ray) runs here"),
        ({"slices": 101}, "linux", "slices: 202 hosts are more than a twin's 200 addresses; take fewer slices"),
        (
            {"provider": "kuberay", "image": "a/b:1", "storage": "gs://bucket/x"},
            "linux",
            "provider kuberay: started by its own tools; `openmoe cluster render FILE` writes what they take",
        ),
    ],
)
def test_what_this_machine_cannot_be_is_refused_in_one_line(monkeypatch, tmp_path, settings, system, message):
    monkeypatch.setattr(sys, "platform", system)
    spec = ClusterSpec(**{**SPEC.model_dump(exclude_unset=True), **settings})
    with pytest.raises(TwinError) as caught:
        twin.up(spec, tmp_path / "clusters" / "small", print)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="object stores are in shared memory on Linux only")
def test_object_stores_that_do_not_fit_are_refused_before_anything_starts():
    with pytest.raises(TwinError, match="cluster small: the object stores of 1000000 Ray nodes take 200,000,000,000,0"):
        twin_start.check_shared_memory(SPEC, 1_000_000)


def test_a_cluster_that_was_never_up_has_no_instances_no_connection_and_is_easily_taken_down(tmp_path):
    state_dir, said = tmp_path / "clusters" / "small", []
    assert twin.instances(state_dir) == []
    assert twin.status(state_dir).connection is None
    twin.down(state_dir, said.append)
    assert said == ["cluster small is not up"]
    with pytest.raises(TwinError, match="cluster small: not up; `openmoe cluster up FILE` starts it"):
        twin.connection(state_dir)
    with pytest.raises(TwinError, match="not up"):
        twin.preempt(state_dir, "slice-a", 0, said.append)


def test_a_cluster_is_read_back_as_it_was_written(cluster):
    assert twin_state.load(cluster.state_dir) == cluster
    assert twin.settings(cluster.state_dir) == SPEC


def test_what_is_left_after_a_reboot_is_shown_and_taken_down(cluster):
    names = [instance.name for instance in twin.instances(cluster.state_dir)]
    gone = processes.Process(pid=os.getpid(), started="an-earlier-boot/1")  # the id is somebody else's now
    for name in ("head", *names):
        cluster.save_node(twin_state.Node(name=name, mark="", node_id="ab", processes=(gone,)))
    provider.set_state(cluster.state_dir, twin.instances(cluster.state_dir), "RUNNING", 5.0)
    found = twin.status(cluster.state_dir)
    assert not found.head_alive
    assert [(each.name, each.state) for each in found.slices] == [("slice-a", "broken"), ("slice-b", "broken")]
    with pytest.raises(TwinError, match="its head is dead; `openmoe cluster up small` starts it"):
        twin.connection(cluster.state_dir)
    said = []
    twin.down(cluster.state_dir, said.append)
    assert said == ["cluster small is down: 0 of 5 nodes were alive, 0 processes ended"]
    assert not cluster.temp_dir.exists()
    assert not cluster.state_dir.exists()


def test_an_unknown_slice_is_refused_with_the_names_of_those_there_are(cluster):
    with pytest.raises(TwinError) as caught:
        twin.preempt(cluster.state_dir, "slice-c", 0, print)
    assert str(caught.value) == "cluster small: no slice 'slice-c'; it has slice-a, slice-b"


def test_a_record_that_is_not_ours_is_named(cluster):
    (cluster.state_dir / "cluster.json").write_text("{}")
    with pytest.raises(TwinError, match=r"cluster\.json: not what this version writes"):
        twin.status(cluster.state_dir)
    cluster.save()
    (cluster.state_dir / "nodes" / "head.json").write_text('{"processes": [{"pid": 1, "created_s": 5.0}]}')
    with pytest.raises(TwinError, match=r"head\.json: not what this version writes; end its processes and remove /"):
        twin.status(cluster.state_dir)


def test_two_commands_never_change_one_cluster_together(cluster):
    with (
        twin_state.locked(cluster.state_dir, "up"),
        pytest.raises(TwinError, match=rf"`openmoe cluster up` \(process {os.getpid()}\) is changing it; wait"),
    ):
        twin.down(cluster.state_dir, print)
    twin.down(cluster.state_dir, print)


def test_the_provider_s_record_keeps_the_time_of_the_first_change(tmp_path):
    first = Instance(name="s-0", slice="s", worker_id=0, ip="127.71.3.10", state="RUNNING", since_s=1.0)
    provider.write(tmp_path, [first])
    provider.set_state(tmp_path, [first], "PREEMPTED", 2.0)
    [taken] = provider.read_all(tmp_path)
    assert (taken.state, taken.since_s) == ("PREEMPTED", 2.0)
    assert provider.set_state(tmp_path, [taken], "PREEMPTED", 3.0) == []
    assert provider.read_all(tmp_path) == [taken]
