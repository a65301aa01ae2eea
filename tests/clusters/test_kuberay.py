"""KubeRay manifests, checked as the API server would: strictly, after nulls are dropped and defaults filled in.

kuberay_crds.json.gz holds {kind: openAPIV3Schema of version v1} from ray-project/kuberay (Apache-2.0), folder
ray-operator/config/crd/bases, commit feeaf72facab4881ba2b179248bb67315634e229; without its descriptions.
"""

import copy
import gzip
import json
from pathlib import Path

import jsonschema
import pytest
from ray._private import ray_constants

from openmoe.clusters import kuberay
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.versions import Versions
from openmoe.platform.jobs import cluster_file

VERSIONS = Versions(python="3.11", ray="2.60.0", jax="0.10.2")
SPEC = ClusterSpec(
    name="v6e-16",
    provider="kuberay",
    namespace="training",
    accelerator="v6e",
    topology="4x4",
    slices=2,
    spot=True,
    image="registry.example/openmoe:0.1.0",
    service_account="openmoe",
    storage="gs://bucket/runs",
    host_cpus=8,
)


@pytest.fixture(scope="module")
def definitions():
    file = Path(__file__).parent / "kuberay_crds.json.gz"
    return json.loads(gzip.decompress(file.read_bytes()))


def strict(schema):
    """JSON Schema of a structural schema of Kubernetes; keys that are not listed are refused, not pruned."""
    if not isinstance(schema, dict):
        return schema
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "nullable"}
    for key in ("items", "additionalProperties"):
        if key in result:
            result[key] = strict(result[key])
    if "properties" in result:
        result["properties"] = {key: strict(value) for key, value in result["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def with_defaults(schema, value):
    """The value as the API server stores it: without nulls, with the schema's defaults."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    other = schema.get("additionalProperties")
    other = other if isinstance(other, dict) else {}
    given = {key: item for key, item in value.items() if item is not None or known.get(key, {}).get("nullable")}
    given |= {key: copy.deepcopy(s["default"]) for key, s in known.items() if "default" in s and key not in given}
    return {key: with_defaults(known.get(key, other), item) for key, item in given.items()}


def problems(definitions, manifest):
    schema = copy.deepcopy(definitions[manifest["kind"]])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft202012Validator(strict(schema))
    errors = validator.iter_errors(with_defaults(schema, manifest))
    return sorted(f"{error.json_path}: {error.message}" for error in errors)


def spec_with(**changes):
    return ClusterSpec.model_validate(SPEC.model_dump(exclude_unset=True) | changes)


def job(spec=SPEC):
    return kuberay.render_job(spec, VERSIONS, run_name="Nano.1", run_file="name: Nano.1\n")[1]


SHAPES = [
    {},
    {"spot": False, "service_account": None},
    {"accelerator": "v4", "topology": "4x4x4"},
    {"accelerator": "v5p", "topology": "2x2x1"},
    {"accelerator": "v5e", "topology": "2x4", "slices": 1},
    {"accelerator": "v7x", "topology": "2x2x2"},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_clusters_and_jobs_are_accepted_by_kuberays_definitions(definitions, changes):
    spec = spec_with(**changes)
    assert problems(definitions, kuberay.render(spec, VERSIONS)) == []
    assert problems(definitions, job(spec)) == []


def test_the_shipped_example_is_accepted(definitions):
    assert problems(definitions, kuberay.render(cluster_file.load("kuberay-tpu-v6e"), VERSIONS)) == []


def test_a_misspelt_key_is_reported(definitions):
    manifest = kuberay.render(SPEC, VERSIONS)
    group = manifest["spec"]["workerGroupSpecs"][0]
    group["numOfHost"] = group.pop("numOfHosts")
    (problem,) = problems(definitions, manifest)
    assert problem.startswith("$.spec.workerGroupSpecs[0]: Additional properties are not allowed ('numOfHost' was")


def test_a_list_as_cpu_limit_is_reported(definitions):
    manifest = job()
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["resources"]["limits"]["cpu"] = ["16"]
    assert problems(definitions, manifest) == [
        "$.spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].resources.limits.cpu: "
        "['16'] is not of type 'integer', 'string'"
    ]


def test_a_worker_group_that_is_no_list_and_a_missing_template_are_reported(definitions):
    manifest = kuberay.render(SPEC, VERSIONS)
    group = manifest["spec"]["workerGroupSpecs"][0]
    del group["template"]
    assert problems(definitions, manifest) == ["$.spec.workerGroupSpecs[0]: 'template' is a required property"]
    manifest["spec"]["workerGroupSpecs"] = {}
    assert problems(definitions, manifest) == ["$.spec.workerGroupSpecs: {} is not of type 'array'"]


def test_defaults_and_nulls_are_handled_as_the_api_server_does(definitions):
    manifest = kuberay.render(SPEC, VERSIONS)
    group = manifest["spec"]["workerGroupSpecs"][0]
    del group["maxReplicas"]
    group["template"]["spec"]["priorityClassName"] = None
    assert problems(definitions, manifest) == []


def test_a_slice_is_a_replica_of_its_hosts_on_the_node_pool_of_its_topology():
    (group,) = kuberay.render(SPEC, VERSIONS)["spec"]["workerGroupSpecs"]
    assert {key: group[key] for key in ("replicas", "minReplicas", "maxReplicas", "numOfHosts")} == {
        "replicas": 2,
        "minReplicas": 2,
        "maxReplicas": 2,
        "numOfHosts": 4,
    }
    pod = group["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"] == {
        "requests": {"cpu": "8", "memory": "16Gi", "google.com/tpu": "4"},
        "limits": {"google.com/tpu": "4"},
    }
    assert group["rayStartParams"]["num-cpus"] == "8"


def test_the_head_has_no_chips_and_no_spot_node():
    head = kuberay.render(spec_with(head={"cpus": 16}), VERSIONS)["spec"]["headGroupSpec"]
    pod = head["template"]["spec"]
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == {"matchExpressions": [{"key": "cloud.google.com/gke-spot", "operator": "DoesNotExist"}]}
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "16", "memory": "64Gi"}
    assert head["rayStartParams"]["num-cpus"] == "16"


def test_the_head_gives_up_a_host_that_froze_after_4_answers_of_5_s():
    pod = kuberay.render(spec_with(), VERSIONS)["spec"]["headGroupSpec"]["template"]["spec"]
    given = {each["name"]: each["value"] for each in pod["containers"][0]["env"] if "health_check" in each["name"]}
    assert given == {
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "4",
    }


@pytest.mark.parametrize("accelerator", ["v5e", "v6e"])
def test_a_host_announces_no_more_time_than_gke_gives_its_pods(accelerator):
    pod = kuberay.render(spec_with(accelerator=accelerator), VERSIONS)["spec"]["workerGroupSpecs"][0]["template"][
        "spec"
    ]
    given = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert given["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "14"
    assert ("VBAR_CONTROL_SERVICE_URL" in given) == (accelerator == "v6e")
    assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S == 30  # of this Ray, which has such a setting


def test_slices_on_demand_ask_for_no_spot_node():
    pod = kuberay.render(spec_with(spot=False), VERSIONS)["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert "tolerations" not in pod


def test_tokens_are_asked_for_and_none_is_in_the_manifest():
    assert kuberay.render(SPEC, VERSIONS)["spec"]["authOptions"] == {"mode": "token"}
    assert job()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_a_job_finds_its_run_file_on_the_head():
    config_map, ray_job = kuberay.render_job(SPEC, VERSIONS, run_name="Nano.1", run_file="name: Nano.1\n")
    assert config_map["metadata"] == {"name": "nano-1-run", "namespace": "training"}
    assert config_map["data"] == {"run.yaml": "name: Nano.1\n"}
    spec = ray_job["spec"]
    assert spec["entrypoint"] == "openmoe train /etc/openmoe/run.yaml"
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["volumes"] == [{"name": "run", "configMap": {"name": "nano-1-run"}}]
    assert head["containers"][0]["volumeMounts"] == [{"name": "run", "mountPath": "/etc/openmoe", "readOnly": True}]
    assert spec["shutdownAfterJobFinishes"] is True


@pytest.mark.parametrize(
    ("run_name", "name"),
    [
        ("openmoe-8b", "openmoe-8b"),
        ("OpenMoE_8B.v2", "openmoe-8b-v2"),
        ("8b", "run-8b"),
        ("x" * 39 + "-y", "x" * 39),
    ],
)
def test_a_run_name_becomes_one_of_kubernetes(run_name, name):
    assert kuberay.job_name(run_name) == name


def test_the_notes_give_the_next_command_and_say_that_no_cloud_was_reached():
    text = "\n".join(kuberay.notes(SPEC, VERSIONS, "tpu.yaml", None))
    assert "kubectl --namespace training apply -f tpu.yaml" in text
    assert "No cloud was reached" in text
    assert "kubectl --namespace training logs -f job/nano" in "\n".join(
        kuberay.notes(SPEC, VERSIONS, "tpu.yaml", "nano")
    )


@pytest.mark.parametrize(
    ("accelerator", "topology", "machines"),
    [
        ("v4", "2x2x2", "2 ct4p-hightpu-4t"),
        ("v5p", "2x2x1", "1 ct5p-hightpu-4t"),
        ("v5e", "1x1", "1 ct5lp-hightpu-1t"),
        ("v5e", "2x4", "1 ct5lp-hightpu-8t"),
        ("v6e", "4x4", "4 ct6e-standard-4t"),
        ("v7x", "2x2x2", "2 tpu7x-standard-4t"),
    ],
)
def test_the_notes_name_the_machines_that_have_so_many_chips_as_a_pod_asks_for(accelerator, topology, machines):
    """GKE makes a 2x4 of two machines of 4 chips too, on which a pod that asks for 8 would wait for ever."""
    spec = spec_with(accelerator=accelerator, topology=topology)
    pod = kuberay.render(spec, VERSIONS)["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert machines.endswith(f"-{pod['containers'][0]['resources']['limits']['google.com/tpu']}t")
    said = f"and 2 node pool(s) of {machines} each, topology {topology}, spot."
    assert said in kuberay.notes(spec, VERSIONS, "tpu.yaml", None)
