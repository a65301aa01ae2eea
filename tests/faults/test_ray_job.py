"""`ray job submit` as the README shows it, on a Ray head of its own with token authentication."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # a stale one would go into the wheel
    subprocess.run(build, check=True, cwd=folder, capture_output=True)
    shutil.rmtree(ROOT / "build")
    [path] = folder.glob("openmoe-*.whl")
    return path


class Head:
    """A Ray head with its dashboard, and the command line to talk to it."""

    def __init__(self, folder, wheel):
        self.port, self.dashboard_port, self.metrics_port = free_port(), free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard_port}"
        self.wheel = wheel
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = [
            *(str(RAY), "start", "--head", "--block", f"--port={self.port}", "--num-cpus=2"),
            *("--object-store-memory=150000000", f"--temp-dir={folder}", f"--metrics-export-port={self.metrics_port}"),
            *(
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard_port}",
                f"--ray-client-server-port={free_port()}",
            ),
        ]
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def get(self, path):
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=10) as reply:
            return json.load(reply)

    def wait_until_up(self):
        deadline_s = time.monotonic() + 120
        while True:
            try:
                return self.get("/api/version")
            except OSError:
                assert time.monotonic() < deadline_s, "the head did not start"
                time.sleep(0.5)

    def job(self, *arguments):
        command = [str(RAY), "job", *arguments]
        return subprocess.run(
            command, env={**self.environment, "RAY_ADDRESS": self.address}, cwd=ROOT, capture_output=True, text=True
        )

    def submit(self, name, *entrypoint, wait=True):
        runtime_env = json.dumps({"py_modules": [str(self.wheel)], "working_dir": "."})
        options = ["--submission-id", name, "--runtime-env-json", runtime_env, *([] if wait else ["--no-wait"])]
        return self.job("submit", *options, "--", *entrypoint)

    def details(self, name):
        return self.get(f"/api/jobs/{name}")

    def stop(self):
        everything = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        for process in everything:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def head(tmp_path_factory, wheel):
    started = Head(f"/tmp/openmoe-job-{os.getpid()}", wheel)
    started.wait_until_up()
    yield started
    started.stop()


def test_platform_is_the_standard_module_and_the_code_is_the_wheel_s(head):
    code = "import platform, openmoe.model; print(platform.python_version(), platform.__file__, openmoe.model.__file__)"
    result = head.submit("probe", "python", "-c", code)
    assert head.details("probe")["status"] == "SUCCEEDED", result.stdout + result.stderr
    [line] = [line for line in head.job("logs", "probe").stdout.splitlines() if line.startswith("3.")]
    _, standard, ours = line.split()
    assert standard.endswith("platform.py")
    assert not standard.startswith(str(ROOT))
    assert "py_modules" in ours or "runtime_resources" in ours


def test_a_job_trains_and_shows_in_ray_s_dashboard(head, trainer):
    run = trainer("job")
    result = head.submit("trains", *run.entrypoint())
    assert head.details("trains")["status"] == "SUCCEEDED", result.stdout[-3000:] + result.stderr[-3000:]
    assert "is finished" in result.stdout
    assert run.run.finished()["steps"] == 60
    assert "train: 60 of 60 steps" in head.job("logs", "trains").stdout
    runs = head.get("/api/train/v2/runs/v1")["train_runs"]
    assert [(r["name"], r["status"]) for r in runs] == [("quickstart-000001", "FINISHED")]
    with urllib.request.urlopen(f"http://127.0.0.1:{head.metrics_port}/metrics", timeout=10) as reply:
        assert "ray_openmoe_loss" in reply.read().decode()


def test_a_job_with_a_bad_run_file_fails_with_exit_code_2(head, trainer):
    result = head.submit("bad", *trainer("bad", "train.stepz=3").entrypoint())
    details = head.details("bad")
    assert (details["status"], details["driver_exit_code"]) == ("FAILED", 2)
    assert "train.stepz: unknown key; did you mean `steps`?" in result.stdout + result.stderr


def test_a_stopped_job_is_stopped_and_its_run_goes_on_later(head, trainer):
    run = trainer("stopped", "train.steps=4000")
    head.submit("stops", *run.entrypoint(), wait=False)
    deadline_s = time.monotonic() + 200
    while not run.run.acceptances():
        assert time.monotonic() < deadline_s, head.job("logs", "stops").stdout
        time.sleep(0.2)
    head.job("stop", "stops")
    assert head.details("stops")["status"] == "STOPPED"
    assert run.run.newest_accepted().step >= 10
    assert run.run.finished() is None
