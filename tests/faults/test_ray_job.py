"""`ray job submit` on a Ray head of its own with token authentication, watched by a real Prometheus."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest

from openmoe.platform.jobs import wheel

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"
MONITORING = ROOT / "docs" / "monitoring"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Head:
    """A Ray head with its dashboard, on this machine only, and the command line to talk to it."""

    def __init__(self, folder, wheel):
        self.folder, self.wheel, dashboard_port = folder, wheel, free_port()
        self.address = f"http://127.0.0.1:{dashboard_port}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"},
            "RAY_metrics_report_interval_ms": "1000",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = [
            *(str(RAY), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=150000000"),
            *("--node-ip-address=127.71.0.1", f"--port={free_port()}", f"--ray-client-server-port={free_port()}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", f"--temp-dir={folder}"),
            f"--metrics-export-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",  # its default is another Ray's of this machine
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

    def wait(self, name, timeout_s=300):
        """Waits until a job has ended; returns its status and its log."""
        deadline_s = time.monotonic() + timeout_s
        while (status := self.details(name)["status"]) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline_s, self.job("logs", name).stdout[-3000:]
            time.sleep(0.5)
        return status, self.job("logs", name).stdout

    def stop(self):
        everything = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        for process in everything:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Prometheus:
    """A Prometheus as docs/monitoring configures it, but for Ray's folder and more frequent looks."""

    def __init__(self, folder, head):
        text = (MONITORING / "prometheus.yml").read_text().replace("/tmp/ray/", f"{head.folder}/").replace("15s", "1s")
        (folder / "prometheus.yml").write_text(text)
        shutil.copy(MONITORING / "alerts.yml", folder)
        self.address = f"http://127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self.process = subprocess.Popen(
            [*command, f"--web.listen-address={self.address.removeprefix('http://')}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def get(self, path, **parameters):
        with urllib.request.urlopen(f"{self.address}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as reply:
            return json.load(reply)["data"]

    def wait_for(self, expression, timeout_s=240):
        """Waits until an expression has values; returns them, each with its labels."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                if found := self.get("/api/v1/query", query=expression)["result"]:
                    return [(series["metric"], float(series["value"][1])) for series in found]
            assert time.monotonic() < deadline_s, f"{expression} has no value: {self.get('/api/v1/targets')}"
            time.sleep(0.5)

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    started = Head(f"/tmp/openmoe-job-{os.getpid()}", wheel.built_wheel(tmp_path_factory.mktemp("wheel")))
    try:
        started.wait_until_up()
        yield started
    finally:
        started.stop()


@pytest.fixture
def prometheus(tmp_path, head, needs):
    needs(shutil.which("prometheus"), "prometheus, to scrape the metrics: apt-get install prometheus")
    started = Prometheus(tmp_path, head)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def stopped_and_resumed(head, new_trainer, tmp_path_factory):
    """A run that `ray job stop` ended, submitted again for 60 steps more than were saved: the job "resumes"."""
    trainer = new_trainer(str(tmp_path_factory.mktemp("job") / "run"), ("train.steps=4000",))
    submitted = head.submit("stops", *trainer.entrypoint(), wait=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    deadline_s = time.monotonic() + 240
    while not trainer.run.acceptances():
        assert head.details("stops")["status"] in ("PENDING", "RUNNING"), head.job("logs", "stops").stdout
        assert time.monotonic() < deadline_s, head.job("logs", "stops").stdout
        time.sleep(0.1)
    head.job("stop", "stops")
    assert head.details("stops")["status"] == "STOPPED"
    trainer.overrides = (f"train.steps={trainer.run.newest_accepted().step + 60}",)
    head.submit("resumes", *trainer.entrypoint(), wait=False)
    return trainer.run


def test_platform_is_the_standard_module_and_the_code_is_the_wheel_s(head):
    code = "import platform, openmoe.model; print(platform.python_version(), platform.__file__, openmoe.model.__file__)"
    result = head.submit("probe", "python", "-c", code)
    assert head.details("probe")["status"] == "SUCCEEDED", result.stdout + result.stderr
    [line] = [line for line in head.job("logs", "probe").stdout.splitlines() if line.startswith("3.")]
    _, standard, ours = line.split()
    assert standard.endswith("platform.py")
    assert not standard.startswith(str(ROOT))
    assert "py_modules" in ours or "runtime_resources" in ours


def test_a_job_with_a_bad_run_file_fails_with_exit_code_2(head, trainer):
    result = head.submit("bad", *trainer("bad", "train.stepz=3").entrypoint())
    details = head.details("bad")
    assert (details["status"], details["driver_exit_code"]) == ("FAILED", 2)
    assert "train.stepz: unknown key; did you mean `steps`?" in result.stdout + result.stderr


def test_a_job_whose_run_fails_is_failed_with_exit_code_1_and_its_cause(head, trainer):
    run = trainer("wrong", "name=diverges", "optimizer.learning_rate=1.0e+30", "optimizer.warmup_steps=1")
    head.submit("diverges", *run.entrypoint())
    details = head.details("diverges")
    assert (details["status"], details["driver_exit_code"]) == ("FAILED", 1)
    log = head.job("logs", "diverges").stdout
    assert "incarnation 1 ended, stop: budgets.bad_numbers is spent (0 of 0): the loss is not finite" in log
    assert [e["cause"] for e in run.run.events() if e["event"] == "ended"] == ["bad_numbers"]


def test_prometheus_sees_a_job_train(stopped_and_resumed, prometheus):
    [(labels, loss), *_] = prometheus.wait_for('ray_openmoe_loss{run="quickstart"}')
    assert (labels["run"], labels["job"]) == ("quickstart", "ray")
    assert 4 < loss < 10
    assert prometheus.wait_for("max by (run) (ray_openmoe_incarnation) == 2") == [({"run": "quickstart"}, 2)]
    steps = stopped_and_resumed.newest_accepted().step
    [(_, last_step)] = prometheus.wait_for("max by (run) (ray_openmoe_last_step) < 4000")
    assert steps <= last_step <= steps + 60
    assert len(prometheus.wait_for("sum by (layer, expert) (ray_openmoe_expert_load)")) == 8
    for panel in json.loads((MONITORING / "grafana.json").read_text())["panels"]:
        for target in panel["targets"]:
            for labels, _ in prometheus.wait_for(target["expr"], timeout_s=30):
                assert labels["run"] == "quickstart"
    rules = [rule["name"] for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert rules == ["OpenMoENoProgress", "OpenMoERestartsOften"]


def test_a_stopped_job_submitted_again_goes_on_and_shows_in_ray_s_dashboard(head, stopped_and_resumed, undisturbed):
    run = stopped_and_resumed
    log = head.job("logs", "stops").stdout
    assert "Traceback" not in log
    assert f"stopped on request; the same command goes on from the last checkpoint in {run.path}" in log
    [(cause, decision)] = [(e["cause"], e["decision"]) for e in run.events() if e["event"] == "ended"]
    assert (cause, decision["action"]) == ("operator", "stop")
    status, log = head.wait("resumes")
    assert status == "SUCCEEDED", log[-3000:]
    steps = run.finished()["steps"]
    assert f"incarnation 2 starts at step {steps - 60} of {steps}" in log
    assert f"train: {steps} of {steps} steps" in log
    assert "is finished" in log
    assert [r["step"] for r in run.trace()] == list(range(1, steps + 1))
    assert [r["loss"].hex() for r in run.trace()[:60]] == [r["loss"].hex() for r in undisturbed.trace()]
    trains = {each["name"]: each["status"] for each in head.get("/api/train/v2/runs/v1")["train_runs"]}
    assert {name: status for name, status in trains.items() if name.startswith("quickstart-")} == {
        "quickstart-000001": "ABORTED",
        "quickstart-000002": "FINISHED",
    }
