"""Cluster files: the shipped ones, runs that fit them or not, and the commands that read them."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from openmoe.clusters import versions
from openmoe.platform.jobs import cluster_file
from openmoe.platform.run_file import spec, spec_source

SHIPPED = ("gcp-tpu-v4-128-spot", "kuberay-tpu-v6e", "local")
KUBERAY = """\
name: tpu-1
provider: kuberay
accelerator: v6e
topology: 4x4
image: example/openmoe:0.1.0
storage: gs://bucket/runs
host_cpus: 8
"""
RUN = """\
name: Nano.1
run_dir: runs/nano
model: {preset: openmoe-nano}
data:
  tokenizer: builtin:small_8192
  seq_len: 512
  sources:
    - {name: c4, format: redpajama, paths: ["gs://bucket/c4/*.jsonl"], weight: 1}
train: {steps: 10, batch_rows: 16, checkpoint_every_steps: 5}
mesh: {data: 2, expert: 8}
cluster: {accelerator: tpu, accelerator_type: TPU-V6E, topology: 4x4, num_workers: 4, devices_per_worker: 4}
"""


def openmoe(*arguments, cwd=None):
    command = [sys.executable, "-m", "openmoe.platform", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"COLUMNS": "200"})


def test_every_shipped_cluster_file_is_known_by_its_name():
    assert tuple(spec_source.CLUSTER_FILE.shipped()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_cluster_file_loads_to_the_same_spec(tmp_path, name):
    loaded = cluster_file.load(name)
    file = tmp_path / "resolved.yaml"
    file.write_text(cluster_file.dump(loaded))
    assert cluster_file.load(str(file)) == loaded


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_cluster_file_opens_with_commands_and_hardware(name):
    with open(spec_source.read(name, spec_source.CLUSTER_FILE).where) as file:
        header = re.match(r"(#.*\n)+", file.read())[0]
    assert re.match(rf"# openmoe cluster (up|validate) {name} ", header)
    assert "\n# Hardware " in header


def test_the_shipped_files_are_what_their_names_say():
    spot = cluster_file.load("gcp-tpu-v4-128-spot")
    assert (spot.provider, spot.pod_type, spot.spot) == ("gcp", "v4-128", True)
    assert cluster_file.load("kuberay-tpu-v6e").ray_accelerator_type == "TPU-V6E"
    assert cluster_file.load("local").hosts_per_slice == 2


def test_the_image_of_the_kuberay_example_has_the_installed_versions():
    with open(spec_source.read("kuberay-tpu-v6e", spec_source.CLUSTER_FILE).where) as file:
        text = file.read()
    installed = versions.installed()
    assert f"rayproject/ray:{installed.ray}-py311" in text
    assert f"jax[tpu]=={installed.jax}" in text


def test_overrides_win_over_the_file():
    loaded = cluster_file.load("local", ["slices=3", "head.cpus=4", 'topology="2x2x4"'])
    assert (loaded.slices, loaded.head.cpus, loaded.num_hosts) == (3, 4, 12)


def test_validate_shows_what_follows(run_here):
    code, out, err = run_here("cluster", "validate", "gcp-tpu-v4-128-spot", "slices=4", "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["cluster"] == {
        "name": "v4-128-spot",
        "provider": "gcp",
        "slices": 4,
        "hosts": 64,
        "chips": 256,
        "head_cpus": 16,
    }
    assert shown["slice"]["pod_type"] == "v4-128"
    assert shown["Ray's resources"] == {"CPU": 8, "TPU": 4, "TPU-v4-128-head": 1}
    assert shown["run file"]["cluster.num_workers"] == 16
    assert "64 / 4" in run_here("cluster", "validate", "gcp-tpu-v4-128-spot")[1]


def test_render_writes_a_file_that_names_the_next_command(tmp_path):
    result = openmoe("cluster", "render", "gcp-tpu-v4-128-spot", "-o", "tpu.yaml", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "tpu.yaml is written; its first lines say how to use it\n")
    text = (tmp_path / "tpu.yaml").read_text()
    assert "\n#   ray up tpu.yaml\n" in text
    assert "No cloud was reached" in text
    assert yaml.safe_load(text)["cluster_name"] == "v4-128-spot"


def test_render_prints_a_raycluster(run_here):
    code, out, err = run_here("cluster", "render", "kuberay-tpu-v6e", "slices=3")
    assert (code, err) == (0, "")
    manifest = yaml.safe_load(out)
    assert manifest["kind"] == "RayCluster"
    assert manifest["spec"]["workerGroupSpecs"][0]["replicas"] == 3


def test_render_makes_a_job_of_a_run_and_keeps_it_in_the_clusters_storage(tmp_path, monkeypatch, run_here):
    (tmp_path / "c.yaml").write_text(KUBERAY)
    (tmp_path / "r.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    code, out, err = run_here("cluster", "render", "c.yaml", "--job", "r.yaml")
    assert (code, err) == (0, "")
    config_map, job = yaml.safe_load_all(out)
    assert (config_map["kind"], job["kind"], job["metadata"]["name"]) == ("ConfigMap", "RayJob", "nano-1")
    (tmp_path / "shipped.yaml").write_text(config_map["data"]["run.yaml"])
    run = spec.load("shipped.yaml")
    assert (run.run_dir, run.data_dir) == ("gs://bucket/runs/Nano.1", "gs://bucket/runs/Nano.1/data")


BAD_SLICE = "bad.yaml:4: topology: no v6e slice is '3x3'; write one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16\n"
# arguments of `openmoe cluster`: the end of standard error
BAD_COMMANDS = {
    ("validate", "bad.yaml"): BAD_SLICE,
    ("validate", "lokal"): "lokal: no cluster file of this name is shipped; did you mean `local`?\n",
    ("validate", "local", "slices"): "/local.yaml: override 'slices': expected key.path=value, such as slices=2\n",
    ("render", "missing.yaml"): "missing.yaml: no such file; give its path, or a shipped name "
    "(gcp-tpu-v4-128-spot, kuberay-tpu-v6e, local)\n",
    ("render", "local"): "local: provider: nothing is rendered for provider twin; `openmoe cluster up` starts it\n",
    ("render", "gcp-tpu-v4-128-spot", "--job", "run.yaml"): "v4-128-spot: provider: a RayJob is made for provider "
    "kuberay only; render without --job, then `openmoe submit`\n",
    (
        "render",
        "good.yaml",
        "--job",
        "run.yaml",
    ): "run.yaml: cluster.accelerator_type: 'TPU-V5LITEPOD' is not what "
    "cluster tpu-1 has; write TPU-V6E\n"
    "run.yaml: data.sources.0.paths.0: 'c4/*.jsonl' is on one machine only; the cluster's hosts share nothing but "
    "gs://\n",
    ("render", "good.yaml", "-o", "good.yaml"): "--out good.yaml: is the cluster file itself; give another OUT\n",
    ("render", "good.yaml", "-o", "no/out.yaml"): "--out no/out.yaml: cannot be written: No such file or directory\n",
}


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text(KUBERAY.replace("4x4", "3x3"))
    (tmp_path / "good.yaml").write_text(KUBERAY)
    (tmp_path / "run.yaml").write_text(RUN.replace("gs://bucket/c4", "c4").replace("TPU-V6E", "TPU-V5LITEPOD"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("arguments", BAD_COMMANDS, ids=" ".join)
def test_a_bad_command_ends_in_plain_lines_and_exit_code_2(run_here, arguments):
    code, out, err = run_here("cluster", *arguments)
    assert (code, out) == (2, "")
    assert err.endswith(BAD_COMMANDS[arguments])


@pytest.mark.usefixtures("bad_files")
def test_a_bad_file_ends_a_process_with_plain_lines_and_exit_code_2():
    result = openmoe("cluster", "render", "bad.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == BAD_SLICE
