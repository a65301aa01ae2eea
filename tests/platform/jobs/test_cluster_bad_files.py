"""Bad cluster files: each ends in one line a problem, with place, dotted path, value and remedy."""

import pytest

from openmoe.platform.jobs import cluster_file
from openmoe.platform.run_file.spec_errors import SpecError

GCP = """\
name: tpu-1
provider: gcp
project: my-project-123
zone: us-central2-b
accelerator: v4
topology: 4x4x4
slices: 2
spot: true
storage: gs://bucket/runs
head: {cpus: 16}
"""
KUBERAY = """\
name: tpu-1
provider: kuberay
accelerator: v6e
topology: 4x4
image: example/openmoe:0.1.0
storage: gs://bucket/runs
host_cpus: 8
"""
TWIN = "name: a\nprovider: twin\naccelerator: v4\ntopology: 2x2x2\n"
V4 = (
    "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x4x12, 4x4x16, 4x8x8, 4x8x12, 4x8x16, 8x8x8, 4x12x12, 4x12x16, "
    "8x8x12, 8x8x16, 8x12x12, 8x12x16, 12x12x12, 12x12x16"
)


def message(tmp_path, text, overrides=()):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        cluster_file.load(str(file), overrides)
    return str(caught.value).replace(f"{file}:", "")


# name: (text in GCP, what stands there instead, the whole message)
BAD_GCP = {
    "boolean of YAML 1.1": (
        "spot: true",
        "spot: yes",
        "8: spot: YAML 1.1 reads yes as true; write true for a boolean, or 'yes' in quotes for text",
    ),
    "exponent": (
        "slices: 2",
        "slices: 1e6",
        "7: slices: '1e6' is text in YAML 1.1; write 1000000, or '1e6' in quotes for text",
    ),
    "octal": (
        "slices: 2",
        "slices: 010",
        "7: slices: 010 is 8 to some YAML readers and 10 to others; write either, or '010' in quotes for text",
    ),
    "key twice": ("slices: 2", "slices: 2\nslices: 4", "8: slices: given twice (lines 7 and 8); keep one"),
    "tab": ("head: {cpus: 16}", "head:\n\tcpus: 16", "11: a tab in the indentation; YAML allows spaces only"),
    "anchor": ("head: {cpus: 16}", "head: &h {cpus: 16}", "10: anchors are not allowed; remove `&h`"),
    "tag": ("slices: 2", "slices: !!int 2", "7: tags are not allowed; remove `tag:yaml.org,2002:int`"),
    "misspelt": ("slices: 2", "slice: 2", "7: slice: unknown key; did you mean `slices`?"),
    "misspelt in the head": ("cpus", "cpu", "10: head.cpu: unknown key; did you mean `cpus`?"),
    "unknown provider": (
        "provider: gcp",
        "provider: gcloud",
        "2: provider: must be one of twin, local, gcp, kuberay; got 'gcloud'",
    ),
    "unknown accelerator": (
        "accelerator: v4",
        "accelerator: v4-128",
        "5: accelerator: must be one of v4, v5p, v5e, v6e, v7x; got 'v4-128'",
    ),
    "accelerator that the launcher cannot make": (
        "accelerator: v4",
        "accelerator: v7x",
        "5: accelerator: Ray's launcher makes no v7x hosts; take provider kuberay",
    ),
    "impossible topology": ("4x4x4", "3x3x3", f"6: topology: no v4 slice is '3x3x3'; write one of {V4}"),
    "topology of another generation": ("4x4x4", "4x4", f"6: topology: no v4 slice is '4x4'; write one of {V4}"),
    "topology in another order": ("4x4x4", "8x4x4", f"6: topology: no v4 slice is '8x4x4'; write one of {V4}"),
    "topology as a number": ("4x4x4", "64", '6: topology: expected text, got 64; write it in quotes: "64"'),
    "no slices": ("slices: 2", "slices: 0", "7: slices: must be >= 1, got 0"),
    "slices as text": ("slices: 2", 'slices: "2"', "7: slices: expected an integer, got '2'; take the quotes off: 2"),
    "half a slice": ("slices: 2", "slices: 2.5", "7: slices: expected an integer, got 2.5"),
    "project": (
        "my-project-123",
        "My Project",
        "3: project: must match ^[a-z][a-z0-9-]{4,28}[a-z0-9]$, got 'My Project'; such as my-project-123",
    ),
    "a region for a zone": (
        "us-central2-b",
        "us-central2",
        r"4: zone: must match ^[a-z]+-[a-z]+\d+-[a-z]$, got 'us-central2'; such as us-central2-b",
    ),
    "storage elsewhere": (
        "gs://bucket/runs",
        "s3://bucket/runs",
        "9: storage: must match ^gs://[a-z0-9][a-z0-9._-]+(/.*)?$, got 's3://bucket/runs'; such as gs://my-bucket/runs",
    ),
    "name with capitals": (
        "name: tpu-1",
        "name: TPU_1",
        "1: name: must match ^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$, got 'TPU_1'; such as tpu-1",
    ),
    "no name": ("name: tpu-1\n", "", " name: missing; add `name:` to the file"),
    "no zone": (
        "zone: us-central2-b\n",
        "",
        " zone: missing; provider gcp needs it, such as `zone: us-central2-b`",
    ),
    "empty zone": (
        "zone: us-central2-b",
        "zone:",
        "4: zone: missing; provider gcp needs it, such as `zone: us-central2-b`",
    ),
    "no storage": (
        "storage: gs://bucket/runs\n",
        "",
        " storage: missing; provider gcp needs it, such as `storage: gs://my-bucket/runs`",
    ),
    "head of no such size": (
        "cpus: 16",
        "cpus: 15",
        "10: head.cpus: no n2-standard machine has 15 CPUs; write one of 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, "
        "or give head.machine_type too",
    ),
    "head without CPUs": (
        "cpus: 16",
        "cpus: 0",
        "10: head.cpus: must be >= 1, got 0",
    ),
    "head as a word": (
        "{cpus: 16}",
        "n2-standard-16",
        "10: head: expected a mapping, got 'n2-standard-16'; indent its keys below it",
    ),
    "account of Kubernetes": (
        "spot: true",
        "service_account: openmoe",
        "8: service_account: openmoe is no account of provider gcp; write its e-mail address, such as "
        "openmoe@my-project-123.iam.gserviceaccount.com",
    ),
    "setup as one text": ("spot: true", "setup: echo", "8: setup: expected a list, got 'echo'; write [echo]"),
    "image": (
        "spot: true",
        "image: a/b:1",
        "8: image: means nothing under provider gcp; remove it (put what the hosts need into `setup`)",
    ),
}
BAD_OTHERS = {
    "zone of a twin": (
        TWIN + "zone: us-central2-b\n",
        "5: zone: means nothing under provider twin; remove it (it is for gcp)",
    ),
    "spot of a twin": (
        TWIN + "spot: true\n",
        "5: spot: means nothing under provider twin; remove it (any slice of a twin can be preempted: "
        "`openmoe cluster preempt`)",
    ),
    "twin of nothing": (
        "name: a\nprovider: twin\n",
        " accelerator: missing; provider twin needs it, such as `accelerator: v4`\n"
        " topology: missing; provider twin needs it, such as `topology: 4x4x4`",
    ),
    "slices of a plain local Ray": (
        "name: a\nprovider: local\nslices: 2\n",
        "3: slices: means nothing under provider local; remove it (it is for twin, gcp, kuberay)",
    ),
    "setup of pods": (
        KUBERAY + "setup: [echo]\n",
        "8: setup: means nothing under provider kuberay; remove it (put what the hosts need into the image)",
    ),
    "machine type of pods": (
        KUBERAY + "head: {cpus: 4, machine_type: n2-standard-4}\n",
        "8: head.machine_type: means nothing under provider kuberay; remove it (it is for gcp)",
    ),
    "pods without an image": (
        KUBERAY.replace("image: example/openmoe:0.1.0\n", ""),
        " image: missing; provider kuberay needs it, such as "
        "`image: us-docker.pkg.dev/my-project/openmoe/openmoe:0.1.0`",
    ),
    "image without a tag": (
        KUBERAY.replace(":0.1.0", ""),
        r"5: image: must match ^[a-z0-9][\w./-]*[:@][\w.:-]+$, got 'example/openmoe'; "
        "such as us-docker.pkg.dev/my-project/openmoe/openmoe:0.1.0",
    ),
    "account of Google Cloud": (
        KUBERAY + "service_account: openmoe@my-project-123.iam.gserviceaccount.com\n",
        "8: service_account: openmoe@my-project-123.iam.gserviceaccount.com is no account of provider kuberay; "
        "write the name of one in the namespace, such as openmoe",
    ),
    "impossible 2D slice": (
        KUBERAY.replace("4x4", "2x8"),
        "4: topology: no v6e slice is '2x8'; write one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    ),
    "a list": ("- a\n", " a cluster file is a mapping of settings, this is a list; start from clusters/local.yaml"),
    "empty": ("", " a cluster file is a mapping of settings, this is nothing; start from clusters/local.yaml"),
    "two documents": ("name: a\n---\nname: b\n", "3: more than one document (`---`); keep one"),
}


@pytest.mark.parametrize("case", BAD_GCP)
def test_a_bad_gcp_file_is_named_with_place_value_and_remedy(tmp_path, case):
    old, new, expected = BAD_GCP[case]
    assert old in GCP
    assert message(tmp_path, GCP.replace(old, new, 1)) == expected


@pytest.mark.parametrize("case", BAD_OTHERS)
def test_a_bad_file_of_another_provider_is_named_with_place_value_and_remedy(tmp_path, case):
    text, expected = BAD_OTHERS[case]
    assert message(tmp_path, text) == expected


def test_all_problems_are_reported_at_once(tmp_path):
    text = GCP.replace("spot: true", "spott: true").replace("4x4x4", "3x3x3").replace("slices: 2", "slices: -1")
    assert message(tmp_path, text + "image: a/b:1\n", ["head.cpus=3"]).splitlines() == [
        "7: slices: must be >= 1, got -1",
        "8: spott: unknown key; did you mean `spot`?",
        "11: image: means nothing under provider gcp; remove it (put what the hosts need into `setup`)",
        f"6: topology: no v4 slice is '3x3x3'; write one of {V4}",
        "override: head.cpus: no n2-standard machine has 3 CPUs; write one of 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, "
        "or give head.machine_type too",
    ]
