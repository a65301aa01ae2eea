"""A cluster file as KubeRay wants it: a RayCluster, or a RayJob that brings its own, on TPU node pools of GKE.

A slice is one replica of the worker group, `numOfHosts` pods that KubeRay makes and removes together.
"""

import re
from typing import Any

from openmoe.clusters.ray_start import HEALTH_CHECK, JOB_STOP
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.versions import Versions

RUN_FILE = "/etc/openmoe/run.yaml"
_GKE = "cloud.google.com"
_MEMORY_GI_PER_CPU = 4
_HOST_MEMORY = "16Gi"
# Receipts and metrics pass through it, never token data; Ray would take 30% of a host's memory.
_OBJECT_STORE_BYTES = 2_000_000_000
# RayJob adds to the name for its cluster and its pods.
_JOB_NAME_LENGTH = 40
# A lost head loses the job; each new one starts a new cluster and goes on from the newest checkpoint.
_BACKOFF_LIMIT = 3
_KEEP_FINISHED_S = 600


def render(spec: ClusterSpec, versions: Versions) -> dict[str, Any]:
    """Returns a RayCluster.

    Args:
      spec: of provider kuberay.
      versions: what the image is expected to have.
    """
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(spec, spec.name),
        "spec": _cluster(spec, versions, head_volumes=[]),
    }


def render_job(spec: ClusterSpec, versions: Versions, *, run_name: str, run_file: str) -> list[dict[str, Any]]:
    """Returns a ConfigMap with a run file and a RayJob that trains it on a cluster of its own.

    Args:
      spec: of provider kuberay.
      versions: what the image is expected to have.
      run_name: name of the run, of which the names of both are made.
      run_file: the resolved run file, YAML.
    """
    name = job_name(run_name)
    volume = {"name": "run", "configMap": {"name": f"{name}-run"}}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(spec, f"{name}-run"),
        "data": {"run.yaml": run_file},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(spec, name),
        "spec": {
            "entrypoint": f"openmoe train {RUN_FILE}",
            "backoffLimit": _BACKOFF_LIMIT,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEEP_FINISHED_S,
            "rayClusterSpec": _cluster(spec, versions, head_volumes=[volume]),
        },
    }
    return [config_map, job]


def job_name(run_name: str) -> str:
    """Returns a run's name as Kubernetes takes it: a small letter, then those, digits and hyphens, at most 40."""
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    return name[:_JOB_NAME_LENGTH].rstrip("-")


def notes(spec: ClusterSpec, versions: Versions, file: str, run_name: str | None) -> list[str]:
    """Returns what a person must know before `kubectl apply`, line by line.

    Args:
      spec: what was rendered.
      versions: with which it was rendered.
      file: where the manifest is, as its user types it.
      run_name: the run of a RayJob; None of a RayCluster.
    """
    kubectl = f"kubectl --namespace {spec.namespace}"
    machines = f"{spec.generation.gke_machines}-{spec.chips_per_host}t"
    return [
        f"Cluster {spec.name}: {spec.summary}.",
        f"Rendered by `openmoe cluster render` for Ray {versions.ray}, Python {versions.python}, JAX {versions.jax}:",
        "the image must have the same. Change the cluster file and render again, rather than this.",
        "",
        "Accepted by KubeRay's own definitions (CRDs). No cloud was reached when it was tested: nothing has been",
        "started from it yet.",
        "",
        "It needs a GKE Standard cluster with KubeRay 1.6 or later and the TPU webhook (or the Ray Operator add-on),",
        f"and {spec.slices} node pool(s) of {spec.hosts_per_slice} {machines} each, topology {spec.topology}"
        f"{', spot' if spec.spot else ''}.",
        "",
        f"Next: {kubectl} apply -f {file}",
        *_after_apply(spec, kubectl, run_name),
        "",
        "What happens to a preempted slice: GKE takes back all nodes of its pool at once, KubeRay replaces the pods of",
        "the whole slice, and they wait until GKE has capacity. OpenMoE goes on from the newest checkpoint then. Pods",
        "get SIGTERM 15 s before, if at all, on which Ray drains its node; that is the only notice.",
    ]


def _after_apply(spec: ClusterSpec, kubectl: str, run_name: str | None) -> list[str]:
    if run_name is not None:
        name = job_name(run_name)
        return [
            f"      {kubectl} get rayjob {name}",
            f"      {kubectl} logs -f job/{name}",
            "It ends its cluster when the run has ended. `openmoe runs` shows the run from its directory at any time.",
        ]
    return [
        f"      {kubectl} port-forward service/{spec.name}-head-svc 8265 &",
        "      export RAY_AUTH_MODE=token",
        f"      export RAY_AUTH_TOKEN=$({kubectl} get secret {spec.name} "
        "-o jsonpath='{.data.auth_token}' | base64 -d)",
        f"      openmoe submit RUN.yaml --cluster http://127.0.0.1:8265 run_dir={spec.storage}/RUN",
        "      openmoe controller run",
    ]


def _metadata(spec: ClusterSpec, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": spec.namespace}


def _cluster(spec: ClusterSpec, versions: Versions, *, head_volumes: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rayVersion": versions.ray,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": _ray_start_params(spec.head.cpus),
            "template": {"spec": _head_pod(spec, head_volumes)},
        },
        "workerGroupSpecs": [
            {
                "groupName": f"{spec.accelerator}-{spec.topology}",
                "replicas": spec.slices,
                "minReplicas": spec.slices,
                "maxReplicas": spec.slices,
                "numOfHosts": spec.hosts_per_slice,
                "rayStartParams": _ray_start_params(spec.host_cpus),
                "template": {"spec": _host_pod(spec)},
            }
        ],
    }


def _ray_start_params(cpus: int) -> dict[str, str]:
    return {"num-cpus": str(cpus), "object-store-memory": str(_OBJECT_STORE_BYTES)}


def _head_pod(spec: ClusterSpec, volumes: list[dict[str, Any]]) -> dict[str, Any]:
    size = {"cpu": str(spec.head.cpus), "memory": f"{spec.head.cpus * _MEMORY_GI_PER_CPU}Gi"}
    container: dict[str, Any] = {
        "name": "ray-head",
        "image": spec.image,
        "env": [{"name": name, "value": value} for name, value in (JOB_STOP | HEALTH_CHECK).items()],
        "resources": {"requests": size, "limits": dict(size)},
        "ports": [
            {"name": "gcs", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "metrics", "containerPort": 8080},
        ],
    }
    pod: dict[str, Any] = {**_identity(spec), "affinity": _NOT_ON_SPOT, "containers": [container]}
    if volumes:
        container["volumeMounts"] = [{"name": "run", "mountPath": RUN_FILE.rpartition("/")[0], "readOnly": True}]
        pod["volumes"] = volumes
    return pod


_NOT_ON_SPOT = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": f"{_GKE}/gke-spot", "operator": "DoesNotExist"}]}]
        }
    }
}


# What Ray announces when a pod gets SIGTERM; else 30 s, of which GKE gives the first 15 to pods, the rest to its own.
_NOTICE = [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "14"}]
# Where libtpu finds its node's control service; in all of KubeRay's samples for v6e, in none for the others.
_V6E_CONTROL = [
    {"name": "NODE_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
    {"name": "VBAR_CONTROL_SERVICE_URL", "value": "$(NODE_IP):8353"},
]


def _host_pod(spec: ClusterSpec) -> dict[str, Any]:
    chips = {"google.com/tpu": str(spec.chips_per_host)}
    container: dict[str, Any] = {
        "name": "ray-worker",
        "image": spec.image,
        "env": _NOTICE + (_V6E_CONTROL if spec.accelerator == "v6e" else []),
        # No limits but the chips: the pod is alone on its node and may use all of it.
        "resources": {"requests": {"cpu": str(spec.host_cpus), "memory": _HOST_MEMORY, **chips}, "limits": chips},
        "ports": [{"name": "metrics", "containerPort": 8080}, {"name": "mxla", "containerPort": 8081}],
    }
    selector = {
        f"{_GKE}/gke-tpu-accelerator": spec.generation.gke_accelerator,
        f"{_GKE}/gke-tpu-topology": str(spec.topology),
    }
    pod: dict[str, Any] = {**_identity(spec), "nodeSelector": selector, "containers": [container]}
    if spec.spot:
        selector[f"{_GKE}/gke-spot"] = "true"
        pod["tolerations"] = [{"key": f"{_GKE}/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    return pod


def _identity(spec: ClusterSpec) -> dict[str, str]:
    return {"serviceAccountName": spec.service_account} if spec.service_account else {}
