"""A cluster file as Ray's cluster launcher wants it: TPU VMs on Google Cloud, the head on an ordinary machine.

To the launcher a slice is one node, however many hosts it has; it runs each command on all of them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from openmoe.clusters.ray_start import HEALTH_CHECK, JOB_STOP
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.versions import Versions

REQUIREMENTS = "requirements.lock"
TOKEN = "~/.ray/auth_token"
HOST_AGENT = "platform/run/host_agent.py"  # beside requirements.lock; it needs Ray alone
# Receipts and metrics pass through it, never token data; Ray would take 30% of a host's memory.
OBJECT_STORE_BYTES = 2_000_000_000
_AGENT = "~/host_agent.py"
_ENVIRONMENT = "~/openmoe-env"
_UV = "~/.local/bin/uv"
_INSTALL = f"{_UV} pip install --quiet --python {_ENVIRONMENT}/bin/python"
_APT = "sudo apt-get -o DPkg::Lock::Timeout=600 --quiet --yes"
# Of the operating system that TPU VMs have.
_HEAD_IMAGE = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2204-lts"
_HEAD_DISK_GB = 200


def render(spec: ClusterSpec, versions: Versions) -> dict[str, Any]:
    """Returns the settings of Ray's cluster launcher.

    Args:
      spec: of provider gcp.
      versions: what the hosts are to have.
    """
    return {
        "cluster_name": spec.name,
        "max_workers": spec.slices,
        "provider": {
            "type": "gcp",
            "project_id": spec.project,
            "region": str(spec.zone).rpartition("-")[0],
            "availability_zone": spec.zone,
        },
        "auth": {"ssh_user": "ubuntu"},
        "head_node_type": "head",
        "available_node_types": {"head": _head(spec), f"{spec.accelerator}-{spec.topology}": _slice(spec)},
        "file_mounts": {TOKEN: TOKEN, f"~/{REQUIREMENTS}": REQUIREMENTS, _AGENT: HOST_AGENT},
        "setup_commands": [*_packages(versions), *spec.setup],
        "head_setup_commands": [],  # Ray's default installs an old google-api-python-client over the locked one
        "worker_setup_commands": [f"{_INSTALL} 'jax[tpu]=={versions.jax}'"],
        "head_start_ray_commands": _start(
            "--head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1",
            cpus=spec.head.cpus,
            # Version 2, the default, takes one node of the launcher for one node of Ray; a slice is several.
            environment={"RAY_enable_autoscaler_v2": "0", **JOB_STOP, **HEALTH_CHECK},
        ),
        "worker_start_ray_commands": [
            *_start("--address=$RAY_HEAD_IP:6379", cpus=spec.host_cpus),
            # One that runs already goes on, and ends this one.
            f"{_prefix({})}setsid nohup python {_AGENT} >> ~/host_agent.log 2>&1 < /dev/null &",
        ],
    }


def notes(spec: ClusterSpec, versions: Versions, file: str) -> list[str]:
    """Returns what a person must know before `ray up`, line by line.

    Args:
      spec: what was rendered.
      versions: with which it was rendered.
      file: where the rendered settings are, as its user types it.
    """
    zone = f"--zone {spec.zone} --project {spec.project}"
    return [
        f"Cluster {spec.name}: {spec.summary}.",
        f"Rendered by `openmoe cluster render` for Ray {versions.ray}, Python {versions.python}, JAX {versions.jax}.",
        "Change the cluster file and render again, rather than this.",
        "",
        "Accepted by this version's own checks of cluster files. No cloud was reached when it was tested: no machine",
        "has been started from it yet.",
        "",
        f"Next, in a folder that has OpenMoE's {REQUIREMENTS} and {HOST_AGENT}:",
        "  gcloud auth application-default login",
        f"  ray get-auth-token --generate > /dev/null   # once: {TOKEN}, which goes to the hosts",
        "  export RAY_AUTH_MODE=token",
        f"  ray up {file}",
        f"  ray dashboard {file}",
        "and while that runs, since the cluster's dashboard is at http://127.0.0.1:8265 then:",
        f"  openmoe submit RUN.yaml --cluster http://127.0.0.1:8265 run_dir={spec.storage}/RUN",
        "  openmoe controller run",
        "at the end:",
        f"  ray down {file}",
        "",
        "What Ray does not do for slices of several hosts:",
        f"- It hears no notice of a preemption. {HOST_AGENT}, which runs beside Ray on each host and writes to",
        "  ~/host_agent.log, watches the metadata server for it and drains the slice: the run saves if that fits, and",
        "  goes on from there once a whole slice is there again. A slice that loses a host without notice costs one of",
        "  the run file's budgets.lost_slice.",
        "- It asks for a new slice (min_workers) but never deletes the preempted one, which keeps its name and quota:",
        f"    gcloud compute tpus tpu-vm list {zone} --filter=state=PREEMPTED",
        f"    gcloud compute tpus tpu-vm delete NAME {zone}",
        "- It does not see that a slice with one dead host is useless as a whole: delete such a slice in the same way.",
        "- It does not autoscale them well, so min_workers = max_workers: slices cost money until `ray down`.",
        "- It does not queue: without capacity a request fails and is made again. Queued resources are not used.",
    ]


def _head(spec: ClusterSpec) -> dict[str, Any]:
    disk = {"diskSizeGb": _HEAD_DISK_GB, "sourceImage": _HEAD_IMAGE}
    return {
        "resources": {"CPU": spec.head.cpus},  # and no TPU: data work
        "node_config": {
            "machineType": spec.head.machine_type or f"n2-standard-{spec.head.cpus}",
            "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        },
    }


def _slice(spec: ClusterSpec) -> dict[str, Any]:
    generation = spec.generation
    node_config: dict[str, Any] = {
        "acceleratorConfig": {"type": generation.gcp_type, "topology": spec.topology},
        "runtimeVersion": generation.gcp_runtime,
    }
    if spec.spot:
        node_config["schedulingConfig"] = {"spot": True}
    if spec.service_account:
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        node_config["serviceAccounts"] = [{"email": spec.service_account, "scopes": scopes}]
    return {
        "min_workers": spec.slices,
        "max_workers": spec.slices,
        "resources": {"CPU": spec.host_cpus, "TPU": spec.chips_per_host},  # of each host
        "node_config": node_config,
    }


def _packages(versions: Versions) -> list[str]:
    """Commands for a bare Ubuntu: the locked packages in an environment of their own, first on the PATH of logins."""
    profile = 'export RAY_AUTH_MODE=token PATH="$HOME/openmoe-env/bin:$PATH"'
    return [
        f"chmod 600 {TOKEN}",
        f"{_APT} update && {_APT} install python3-pip",
        "python3 -m pip install --quiet --user uv",
        f"{_UV} venv --quiet --allow-existing --python {versions.python} {_ENVIRONMENT}",
        f"{_INSTALL} --require-hashes -r ~/{REQUIREMENTS}",
        f"grep -q openmoe-env ~/.bashrc || echo '{profile}' >> ~/.bashrc",
    ]


def _start(options: str, *, cpus: int, environment: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    prefix = _prefix(environment)
    start = f"ray start {options} --num-cpus={cpus} --object-store-memory={OBJECT_STORE_BYTES} --disable-usage-stats"
    return [f"{prefix}ray stop", f"{prefix}ulimit -n 65536; {start}"]


def _prefix(environment: Mapping[str, str]) -> str:
    # Said again here: a host that comes back runs these commands alone, and Ray's own prefix would win otherwise.
    settings = {"RAY_AUTH_MODE": "token", "RAY_raylet_start_wait_time_s": "180", **environment}
    variables = " ".join(f"{name}={value}" for name, value in settings.items())
    return f'export PATH="$HOME/openmoe-env/bin:$PATH" {variables}; '
