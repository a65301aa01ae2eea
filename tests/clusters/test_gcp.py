"""Ray launcher YAML for TPU VMs, given to Ray's own checks and to Google's API definitions; no cloud is reached.

The definitions (discovery documents) come with google-api-python-client.
"""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from unittest.mock import MagicMock

import jsonschema
import pytest
from ray.autoscaler._private.gcp import config as ray_gcp
from ray.autoscaler._private.gcp.node import GCPTPU, GCPCompute, GCPNodeType
from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider
from ray.autoscaler._private.util import hash_runtime_conf, prepare_config, validate_config, with_envs

from openmoe.clusters import gcp
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.versions import Versions
from openmoe.platform.jobs import cluster_file

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = Versions(python="3.11", ray="2.60.0", jax="0.10.2")
ACCOUNT = "openmoe@my-project-123.iam.gserviceaccount.com"
SPEC = ClusterSpec(
    name="v4-128-spot",
    provider="gcp",
    project="my-project-123",
    zone="us-central2-b",
    accelerator="v4",
    topology="4x4x4",
    slices=2,
    spot=True,
    service_account=ACCOUNT,
    storage="gs://bucket/runs",
    host_cpus=8,
    setup=("echo ready",),
)


def spec_with(**changes):
    return ClusterSpec.model_validate(SPEC.model_dump(exclude_unset=True) | changes)


SHAPES = [
    {},
    {"spot": False, "service_account": None, "setup": (), "slices": 1},
    {"accelerator": "v5p", "topology": "2x2x1", "zone": "us-east5-a"},
    {"accelerator": "v5e", "topology": "4x8", "zone": "us-west4-a"},
    {"accelerator": "v6e", "topology": "16x16", "zone": "us-east5-b"},
    {"head": {"cpus": 22, "machine_type": "c3-standard-22"}},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_rays_launcher_accepts_it(changes):
    spec = spec_with(**changes)
    config = prepare_config(gcp.render(spec, VERSIONS))
    validate_config(config)
    types = {name: ray_gcp.get_node_type(node["node_config"]) for name, node in config["available_node_types"].items()}
    assert types == {"head": GCPNodeType.COMPUTE, f"{spec.accelerator}-{spec.topology}": GCPNodeType.TPU}


def test_rays_launcher_accepts_the_shipped_example():
    validate_config(prepare_config(gcp.render(cluster_file.load("gcp-tpu-v4-128-spot"), VERSIONS)))


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_ray_takes_the_slice_for_the_same_pod_type(changes):
    spec = spec_with(**changes)
    filled = GCPNodeProvider.fillout_available_node_types_resources(gcp.render(spec, VERSIONS))
    assert filled["available_node_types"][f"{spec.accelerator}-{spec.topology}"]["resources"] == {
        "CPU": 8,
        "TPU": spec.chips_per_host,
        f"TPU-{spec.pod_type}-head": 1,
    }


@functools.cache
def api_message(api, name):
    """Checks a message of a Google API; unknown fields are refused."""
    file = resources.files("googleapiclient.discovery_cache") / "documents" / f"{api}.json"

    def strict(node):
        if not isinstance(node, dict):
            return node
        result = {key: strict(value) for key, value in node.items()}
        if isinstance(node.get("$ref"), str):
            result["$ref"] = f"#/$defs/{node['$ref']}"
        if isinstance(node.get("properties"), dict) and node.get("type") == "object":
            result["additionalProperties"] = False
        if node.get("format") in ("int64", "uint64"):
            result["type"] = ["string", "integer"]
        return result

    definitions = json.loads(file.read_text())["schemas"]
    schema = {"$defs": {key: strict(value) for key, value in definitions.items()}, "$ref": f"#/$defs/{name}"}
    return jsonschema.Draft202012Validator(schema)


def request_body(spec, node_type):
    """What Ray's provider sends to the API to create a node."""
    api = MagicMock()  # records the request in the cloud's place
    node_config = gcp.render(spec, VERSIONS)["available_node_types"][node_type]["node_config"]
    resource = GCPCompute if node_type == "head" else GCPTPU
    provider = resource(api, spec.project, spec.zone, spec.name)
    provider.create_instance(node_config, {"ray-node-name": f"ray-{spec.name}-worker"}, wait_for_operation=False)
    call = api.instances().insert if node_type == "head" else api.projects().locations().nodes().create
    return call.call_args.kwargs["body"]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_googles_definitions_accept_what_ray_asks_for(changes):
    spec = spec_with(**changes)
    for api in ("tpu.v2", "tpu.v2alpha1"):
        api_message(api, "Node").validate(request_body(spec, f"{spec.accelerator}-{spec.topology}"))
    api_message("compute.v1", "Instance").validate(request_body(spec, "head"))


def test_googles_definitions_refuse_what_is_misspelt():
    body = request_body(SPEC, "v4-4x4x4")
    with pytest.raises(jsonschema.ValidationError, match="'spott' was unexpected"):
        api_message("tpu.v2", "Node").validate(body | {"schedulingConfig": {"spott": True}})
    with pytest.raises(jsonschema.ValidationError, match="'V7X' is not one of"):
        api_message("tpu.v2", "Node").validate(body | {"acceleratorConfig": {"type": "V7X"}})


def test_ray_refuses_a_type_it_does_not_know():
    config = gcp.render(SPEC, VERSIONS)
    node = config["available_node_types"]["v4-4x4x4"]["node_config"]
    node["acceleratorConfig"]["type"] = "TPU7X"
    with pytest.raises(ValueError, match="type should match V"):
        ray_gcp.get_node_type(node)


def test_slices_are_spot_and_the_head_is_not():
    types = gcp.render(SPEC, VERSIONS)["available_node_types"]
    assert types["v4-4x4x4"] == {
        "min_workers": 2,
        "max_workers": 2,
        "resources": {"CPU": 8, "TPU": 4},
        "node_config": {
            "acceleratorConfig": {"type": "V4", "topology": "4x4x4"},
            "runtimeVersion": "tpu-ubuntu2204-base",
            "schedulingConfig": {"spot": True},
            "serviceAccounts": [{"email": ACCOUNT, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}],
        },
    }
    assert types["head"]["node_config"]["machineType"] == "n2-standard-2"
    assert types["head"]["resources"] == {"CPU": 2}
    assert "scheduling" not in types["head"]["node_config"]
    on_demand = gcp.render(spec_with(spot=False), VERSIONS)["available_node_types"]["v4-4x4x4"]["node_config"]
    assert "schedulingConfig" not in on_demand


def test_the_launcher_keeps_all_slices_in_the_right_zone():
    config = gcp.render(SPEC, VERSIONS)
    assert config["max_workers"] == 2
    assert config["provider"] == {
        "type": "gcp",
        "project_id": "my-project-123",
        "region": "us-central2",
        "availability_zone": "us-central2-b",
    }


def test_hosts_get_the_locked_packages_of_the_rendering_machine():
    config = prepare_config(gcp.render(SPEC, VERSIONS))
    setup = config["worker_setup_commands"]
    assert "~/.local/bin/uv venv --quiet --allow-existing --python 3.11 ~/openmoe-env" in setup
    install = "~/.local/bin/uv pip install --quiet --python ~/openmoe-env/bin/python"
    assert f"{install} --require-hashes -r ~/requirements.lock" in setup
    assert setup[-2:] == ["echo ready", f"{install} 'jax[tpu]==0.10.2'"]
    assert config["head_setup_commands"] == setup[:-1]


def test_the_lock_file_has_what_the_launcher_needs_on_the_head():
    locked = (ROOT / "requirements.lock").read_text()
    assert re.findall(r"^(ray|google-api-python-client|jax)==", locked, re.MULTILINE) == [
        "google-api-python-client",
        "jax",
        "ray",
    ]


def test_logins_get_the_packages_and_tokens_once(tmp_path):
    (profile,) = [c for c in gcp.render(SPEC, VERSIONS)["setup_commands"] if "~/.bashrc" in c]
    (tmp_path / ".bashrc").touch()
    for _ in range(2):
        subprocess.run(["bash", "-c", profile], env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]}, check=True)
    assert (tmp_path / ".bashrc").read_text() == 'export RAY_AUTH_MODE=token PATH="$HOME/openmoe-env/bin:$PATH"\n'


def test_tokens_are_on_everywhere_and_none_is_in_the_file():
    config = gcp.render(SPEC, VERSIONS)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "RAY_AUTH_TOKEN" not in json.dumps(config)


def test_the_launcher_reads_the_files_to_ship(tmp_path, monkeypatch):
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text("secret")
    (tmp_path / "requirements.lock").write_text("ray==2.60.0")
    (tmp_path / "platform" / "run").mkdir(parents=True)
    (tmp_path / gcp.HOST_AGENT).write_text("print('watches')")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    before = hash_runtime_conf(gcp.render(SPEC, VERSIONS)["file_mounts"], None, {}, True)
    (tmp_path / "requirements.lock").write_text("ray==2.60.1")
    assert hash_runtime_conf(gcp.render(SPEC, VERSIONS)["file_mounts"], None, {}, True) != before


def test_each_host_of_a_slice_gets_the_agent_and_starts_it_in_the_background(tmp_path):
    config = gcp.render(SPEC, VERSIONS)
    assert (ROOT / config["file_mounts"]["~/host_agent.py"]).is_file()
    assert not any("host_agent" in command for command in config["head_start_ray_commands"])
    (tmp_path / "openmoe-env" / "bin").mkdir(parents=True)
    (tmp_path / "openmoe-env" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "host_agent.py").write_text(
        "import os, time; print(os.environ['RAY_AUTH_MODE'], flush=True)\n"
        "while not os.path.exists('end'): time.sleep(0.05)\nprint('ends', flush=True)"
    )
    command = config["worker_start_ray_commands"][-1]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, check=True, timeout=60)
    log = tmp_path / "host_agent.log"
    for said in ("token\n", "token\nends\n"):
        while not log.exists() or log.read_text() != said:
            time.sleep(0.05)
        (tmp_path / "end").touch()


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_start_commands_win_over_rays_own_environment(tmp_path, commands):
    """As a shell runs them, with a `ray` that shows what it was given."""
    fake = tmp_path / "openmoe-env" / "bin"
    fake.mkdir(parents=True)
    (fake / "ray").write_text('#!/bin/sh\necho "$1 v2=$RAY_enable_autoscaler_v2 auth=$RAY_AUTH_MODE $*"\n')
    (fake / "ray").chmod(0o755)
    stop, start, *_ = with_envs(
        gcp.render(SPEC, VERSIONS)[commands], {"RAY_enable_autoscaler_v2": "1", "RAY_HEAD_IP": "10.0.0.2"}
    )
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    shown = [
        subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True).stdout
        for command in (stop, start)
    ]
    v2 = {"head_start_ray_commands": "0", "worker_start_ray_commands": "1"}[commands]
    assert shown[0] == f"stop v2={v2} auth=token stop\n"
    assert shown[1].startswith(f"start v2={v2} auth=token start --")


def test_the_head_gives_up_a_host_that_froze_after_4_answers_of_5_s():
    start = gcp.render(SPEC, VERSIONS)["head_start_ray_commands"][-1]
    for setting in ("period_ms=1000", "timeout_ms=5000", "failure_threshold=4"):
        assert f" RAY_health_check_{setting}" in start


def test_the_dashboard_listens_on_loopback_and_hosts_know_the_head():
    config = gcp.render(SPEC, VERSIONS)
    head = shlex.split(config["head_start_ray_commands"][1])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=2" in head
    host = shlex.split(config["worker_start_ray_commands"][1])
    assert "--address=$RAY_HEAD_IP:6379" in host
    assert "--num-cpus=8" in host


def test_the_notes_give_the_next_command_and_what_ray_does_not_do():
    text = "\n".join(gcp.notes(SPEC, VERSIONS, "tpu.yaml"))
    assert "  ray up tpu.yaml\n" in text
    assert "No cloud was reached" in text
    assert "never deletes the preempted one" in text
    assert "gcloud compute tpus tpu-vm delete NAME --zone us-central2-b --project my-project-123" in text
