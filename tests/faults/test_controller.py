"""Jobs on one real Ray, through a controller that is killed: everything is done once, and the run goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from openmoe.clusters import twin
from openmoe.clusters.spec import ClusterSpec
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.run.run_dir import RunDir

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# A controller that kills itself, once, where the first argument says.
KILLED_AT = """
import os, signal, sys
from openmoe.platform import home
from openmoe.platform.jobs import attempt_end, controller, ray_jobs

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

submit = ray_jobs.RayJobs.submit

def submit_and_die(*arguments, **options):
    submit(*arguments, **options)
    die()

match sys.argv[1]:
    case "admitted, not submitted":
        ray_jobs.RayJobs.submit = die
    case "submitted, not recorded":
        ray_jobs.RayJobs.submit = submit_and_die
    case "seen to end, not recorded":
        attempt_end.judge = die
controller.run(home.home(), lambda line: print(line, flush=True))
"""


class Place:
    """A plain local Ray in a home of its own, the `openmoe` command there, and controllers that come and go."""

    def __init__(self, home, run_file, settings):
        self.home, self.run, self.name = home, (run_file, *settings), "plain"
        self.environment = {**os.environ, "OPENMOE_HOME": str(home)}
        self.controller = None
        self.log = home / "controller.log"

    @property
    def state_dir(self):
        return self.home / "clusters" / self.name

    def openmoe(self, *arguments, code=0):
        command = [sys.executable, "-m", "openmoe.platform", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        assert result.returncode == code, f"{command}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout if code == 0 else result.stderr

    def start(self, killed_at=None):
        command = [sys.executable, "-m", "openmoe.platform", "controller", "run"]
        if killed_at:
            command = [sys.executable, "-c", KILLED_AT, killed_at]
        with self.log.open("a") as log:
            self.controller = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def wait_until_killed(self, timeout_s=120):
        assert self.controller.wait(timeout_s) == -signal.SIGKILL, self.log.read_text()

    def stop(self):
        if self.controller and self.controller.poll() is None:
            self.controller.terminate()
            assert self.controller.wait(30) == 0

    def submit(self, run_dir, *settings):
        return json.loads(self.openmoe("submit", *self.run, f"run_dir={run_dir}", *settings, "--json"))["id"]

    def job(self, job_id):
        store = JobStore(self.home / "controller.db")
        try:
            return store.job(job_id)
        finally:
            store.close()

    def wait_for(self, what, condition, timeout_s=300):
        deadline_s = time.monotonic() + timeout_s
        while not (answer := condition()):
            assert time.monotonic() < deadline_s, f"not in time: {what}\n{self.log.read_text()}"
            time.sleep(0.2)
        return answer

    def wait_until(self, job_id, *states):
        return self.wait_for(f"{job_id} is {states}", lambda: (j := self.job(job_id)).state in states and j)

    def submissions(self, job_id):
        """What Ray has of a job: (submission id, status), oldest first."""
        connection = twin.connection(self.state_dir)
        headers = {"Authorization": f"Bearer {connection.token_file.read_text()}"}
        request = urllib.request.Request(f"{connection.dashboard_url}/api/jobs/", headers=headers)
        with urllib.request.urlopen(request, timeout=20) as reply:
            found = [(j["submission_id"], j["status"]) for j in json.load(reply) if j["type"] == "SUBMISSION"]
        return sorted(each for each in found if each[0].startswith(job_id))


@pytest.fixture(scope="module")
def place(run_file, small, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    here = Place(home, run_file, small)
    try:
        twin.up(ClusterSpec(name=here.name, provider="local"), here.state_dir, print)
        yield here
    finally:
        with contextlib.suppress(AssertionError):
            here.stop()
        twin.down(here.state_dir, print)


@pytest.fixture
def controller(place):
    """A controller that nobody disturbs."""
    place.start()
    yield place.controller
    place.stop()


def test_a_controller_killed_at_three_points_submits_once_and_the_job_succeeds(place, tmp_path):
    job_id = place.submit(tmp_path / "run")
    place.start("admitted, not submitted")
    place.wait_until_killed()
    assert (place.job(job_id).state, place.submissions(job_id)) == ("starting", [])
    place.start("submitted, not recorded")
    place.wait_until_killed()
    assert not place.job(job_id).accepted
    assert [submission for submission, _ in place.submissions(job_id)] == [f"{job_id}-1"]
    place.start("seen to end, not recorded")
    place.wait_until(job_id, "running")
    place.wait_until_killed(timeout_s=300)
    assert place.job(job_id).state == "running"
    place.start()
    job = place.wait_until(job_id, "succeeded", "failed")
    assert (job.state, job.attempt, job.spent) == ("succeeded", 1, {})
    assert place.submissions(job_id) == [(f"{job_id}-1", "SUCCEEDED")]
    assert RunDir(str(tmp_path / "run")).finished()["steps"] == 60

    shown = json.loads(place.openmoe("jobs", "show", job_id, "--json"))
    assert (shown["state"], shown["submission_id"], shown["step"]) == ("succeeded", f"{job_id}-1", 60)
    [listed] = json.loads(place.openmoe("jobs", "list", "--json"))
    assert (listed["id"], listed["state"]) == (job_id, "succeeded")
    assert "train: 60 of 60 steps" in place.openmoe("jobs", "logs", job_id)
    assert "train: 60 of 60 steps" in place.openmoe("jobs", "logs", "-f", job_id)
    told = [sentence["text"] for sentence in json.loads(place.openmoe("jobs", "story", job_id, "--json"))]
    assert told[:2] == ["submitted: run quickstart for cluster plain", "attempt 1 starts"]
    assert "attempt 1: its driver runs" in told
    assert "checkpoints accepted: steps 10 to 60 (6)" in told
    assert sorted(told[-2:])[0] == "attempt 1 succeeded: the job is done"
    second = place.openmoe("controller", "run", code=2)
    assert f"process {place.controller.pid} is one already for {place.home}" in second
    place.stop()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """The run of the two tests that follow: the first leaves it at work."""
    return RunDir(str(tmp_path_factory.mktemp("long") / "run"))


@pytest.fixture(scope="module")
def long_job(place, long_run):
    return place.submit(long_run.path)


def test_a_controller_that_is_told_to_stop_leaves_the_jobs_at_work_and_says_so(place, long_job):
    place.start()
    place.wait_until(long_job, "running")
    place.stop()
    last = place.log.read_text().splitlines()[-1]
    assert last.endswith(f"controller: stopped; these runs go on, on their clusters: {long_job}")
    assert place.submissions(long_job) == [(f"{long_job}-1", "RUNNING")]


def test_a_cancelled_job_leaves_a_run_that_goes_on_when_retried_and_survives_the_death_of_its_driver(
    place, controller, driver_of, long_run, long_job
):
    run, job_id = long_run, long_job
    place.wait_for("a checkpoint", lambda: run.acceptances())
    place.openmoe("jobs", "cancel", job_id)
    assert place.wait_until(job_id, "cancelled").reason == "on request"
    assert place.submissions(job_id) == [(f"{job_id}-1", "STOPPED")]
    assert run.finished() is None

    place.openmoe("jobs", "retry", job_id)
    place.wait_for("the next checkpoint", lambda: run.newest_accepted().incarnation == 2)
    driver_of(place.home).kill()
    job = place.wait_until(job_id, "succeeded", "failed")
    assert (job.state, job.attempt, job.spent) == ("succeeded", 3, {"host_fault": 1})
    assert [status for _, status in place.submissions(job_id)] == ["STOPPED", "FAILED", "SUCCEEDED"]
    assert [claim.incarnation for claim in run.claims()] == [1, 2, 3]
    assert all(claim.resumes for claim in run.claims()[1:])
    assert [record["rows"] for record in run.trace()] == [[4 * n, 4 * n + 4] for n in range(60)]
    told = place.openmoe("jobs", "story", job_id)
    assert "attempt 1 is over" in told
    assert "host_fault 1 of 10: the driver was killed by SIGKILL; another one in 5 s" in told


def test_a_run_that_cannot_be_trained_fails_with_the_driver_s_own_line(place, controller, tmp_path):
    job_id = place.submit(tmp_path / "run", "data.sources.0.paths=[/nowhere/*.jsonl]", f"data_dir={tmp_path}/data")
    job = place.wait_until(job_id, "succeeded", "failed")
    assert (job.state, job.attempt) == ("failed", 1)
    assert "/nowhere/*.jsonl" in job.reason
    assert "/nowhere/*.jsonl" in place.openmoe("jobs", "list")
    assert "/nowhere/*.jsonl" in place.openmoe("jobs", "logs", job_id)


def test_no_token_is_in_the_database_the_logs_or_what_ray_shows(place):
    token = twin.connection(place.state_dir).token_file.read_text()
    connection = twin.connection(place.state_dir)
    request = urllib.request.Request(
        f"{connection.dashboard_url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        shown = reply.read()
    assert b"openmoe.platform train run.yaml" in shown
    files = [p for p in place.home.glob("controller.*") if p.is_file()]
    assert {"controller.db", "controller.log"} <= {p.name for p in files}
    for content in [shown, *(p.read_bytes() for p in files)]:
        assert token.encode() not in content


def test_up_starts_cluster_controller_and_dashboard_and_ctrl_c_ends_all(place, tmp_path):
    (tmp_path / "second.yaml").write_text("name: second\nprovider: local\n")
    home = tmp_path / "home"
    command = [sys.executable, "-m", "openmoe.platform", "up", str(tmp_path / "second.yaml"), "--port=0"]
    with (tmp_path / "log").open("w") as log:
        environment = {**place.environment, "OPENMOE_HOME": str(home)}
        everything = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=tmp_path, env=environment, start_new_session=True
        )
    log = tmp_path / "log"
    place.wait_for("all is up", lambda: "dashboard  http://127.0.0.1:" in log.read_text() or everything.poll())
    place.wait_for("the controller runs", lambda: "controller: no jobs yet" in log.read_text() or everything.poll())
    assert everything.poll() is None, log.read_text()
    assert "openmoe submit quickstart" in log.read_text()
    mark = json.loads((home / "clusters" / "second" / "cluster.json").read_text())["temp_dir"]
    started = [p for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or ())]
    started += psutil.Process(everything.pid).children()  # the dashboard
    assert len(started) > 3
    os.killpg(everything.pid, signal.SIGINT)  # as a terminal does
    assert everything.wait(60) == 0, log.read_text()
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert not (home / "clusters" / "second").exists()
    assert "cluster second is down" in log.read_text()
    assert "Traceback" not in log.read_text()
