"""A data build and a run in one Ray on one machine: what the build takes is its own affair."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from openmoe.pipelines import build as builder
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's limit on data is Linux's"),
]


def workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_a_build_at_its_memory_limit_ends_its_own_unit_by_name_and_the_trainer_beside_it_goes_on(
    ray_local, trainer, tmp_path
):
    one_worker = ("cluster.num_workers=1", "cluster.devices_per_worker=4", "cluster.data_cpus=1")
    run = trainer("run", *one_worker, "train.steps=1000")
    shared = {"RAY_ADDRESS": ray_local.get_runtime_context().gcs_address}
    run.process = subprocess.Popen(
        run.entrypoint(sys.executable), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | shared,
    )  # fmt: skip
    run.wait_for_acceptance(1)
    [worker] = workers()

    (tmp_path / "small.jsonl").write_text(json.dumps({"text": "some words " * 200}) + "\n")
    (tmp_path / "huge.jsonl").write_text(json.dumps({"text": "some words " * 2_000_000}) + "\n")
    source = SourceConfig(name="texts", format="redpajama", paths=(f"{tmp_path}/*.jsonl",), weight=1.0)
    config = DataConfig(tokenizer="builtin:small_8192", sources=(source,), seq_len=128, seed=0)
    said: list[str] = []
    place = builder.Workplace(num_workers=1, task_memory_bytes=64 * 2**20, reserved_cpus=1, say=said.append)
    message = r"^sources\.texts: \S+/huge\.jsonl \[0, 22000013\) killed its worker 3 times, as out of memory does; "
    with pytest.raises(DataError, match=f"{message}.*give tasks more memory"):
        builder.build(config, str(tmp_path / "data"), min_rows=1, place=place)
    assert [line.split(" times over ")[0] for line in said] == ["a worker died, 1 of 3", "a worker died, 2 of 3"]

    accepted = len(run.run.acceptances())
    run.wait_for_acceptance(accepted + 1)
    assert workers() == [worker]
    assert [claim.incarnation for claim in run.run.claims()] == [1]
    run.process.send_signal(signal.SIGTERM)
    output, _ = run.process.communicate(timeout=60)
    assert "incarnation 1 ended, stop: " in output
