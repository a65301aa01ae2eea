"""One run on two fake TPU slices meets every fault there is, and ends with the bits of an undisturbed one.

The tests of this file are the chapters of that one run, in order. Each brings its fault about as the world does, waits
until the run trains again, and claims what was said about the cause. The last ones compare the whole.
"""

import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from openmoe.clusters import twin as twin_module
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.run.run_dir import RunDir

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# The small run of conftest.py on one slice of 2 hosts with 4 chips each; every device holds one row.
SLICE = (
    "model.num_layers=2",
    "model.d_model=64",
    "model.d_ff=64",
    "model.group_size=128",
    "data.seq_len=128",
    "train.steps=100000",  # never reached: the last chapter stops the run and says where it ends
    "train.batch_rows=8",
    "train.checkpoint_every_steps=5",
    "train.sample_tokens=0",
    "mesh.expert=8",
    "cluster.num_workers=2",
    "cluster.devices_per_worker=4",
)
TPU = ("cluster.accelerator=tpu", "cluster.topology=2x2x2", "cluster.accelerator_type=TPU-V4")
# Says of which hosts of slices Ray may still place something.
USABLE = """
import json, ray
from ray._private.state import state
ray.init(log_to_driver=False)
hosts = [(node["NodeID"], node["Labels"]) for node in ray.nodes() if node["Alive"] and "TPU" in node["Resources"]]
names = {node_id: labels["ray.io/tpu-slice-name"] + "-" + labels["ray.io/tpu-worker-id"] for node_id, labels in hosts}
print(json.dumps([name for node_id, name in names.items() if node_id not in state.get_draining_nodes()]))
"""


def openmoe(*arguments, check=True, **environment):
    """Runs the command as a user does; returns what it printed."""
    command = [sys.executable, "-m", "openmoe.platform", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def wait_for(what, condition, timeout_s=400.0):
    """Returns the first true answer of `condition`."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)
    return answer


class Preempted(http.server.BaseHTTPRequestHandler):
    """The metadata server of a host that is being taken away."""

    def do_GET(self):
        value = b"TRUE" if "/instance/preempted?" in self.path else b"NONE"
        time.sleep(0.2)
        self.send_response(200)
        self.send_header("ETag", "1")
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value)


class Story:
    """The run, its job, the controller, and the hands that break things."""

    def __init__(self, twin, folder, run_file):
        self.twin, self.run = twin, RunDir(f"{folder}/run")
        self.environment = {"OPENMOE_HOME": str(twin.home)}
        self.log = (folder / "controller.log").open("w")
        seed = int(os.environ.get("OPENMOE_TEST_SEED", "0")) or time.time_ns()
        print(f"OPENMOE_TEST_SEED={seed}")
        self.random = random.Random(seed)
        self.run_file, self.controller, self.repairs = run_file, None, []
        self.start_controller()
        self.job_id = self.submit()

    def submit(self, *overrides):
        settings = (*SLICE, *TPU, f"run_dir={self.run.path}", *overrides)
        said = self.openmoe("submit", self.run_file, *settings, "--cluster", self.twin.name, "--json")
        return json.loads(said)["id"]

    def openmoe(self, *arguments):
        return openmoe(*arguments, **self.environment)

    def job(self):
        """The job, read in this process: one that shows it takes a second of CPU each time that it is asked for."""
        store = JobStore(self.twin.home / "controller.db")
        try:
            return store.job(self.job_id)
        finally:
            store.close()

    def repair(self):
        """Brings back what was broken, while the run goes on."""
        command = [sys.executable, "-m", "openmoe.platform", "cluster", "up", self.twin.name]
        self.repairs.append(subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=self.log))

    def wait_until_repaired(self):
        for repair in self.repairs:
            assert repair.wait(timeout=400) == 0
        self.repairs.clear()

    def start_controller(self):
        command = [sys.executable, "-m", "openmoe.platform", "controller", "run"]
        self.controller = subprocess.Popen(
            command, env={**os.environ, **self.environment}, stdout=self.log, stderr=subprocess.STDOUT
        )

    def kill_controller(self):
        self.controller.send_signal(signal.SIGKILL)
        self.controller.wait()

    def usable(self):
        """The hosts on which Ray may place something."""
        command = [sys.executable, "-c", USABLE]
        said = subprocess.run(command, env=self.twin.environment(), capture_output=True, text=True, check=True).stdout
        # Ray's own words on dead nodes may stand around it.
        return sorted(json.loads(next(line for line in said.splitlines() if line.startswith("["))))

    def said(self):
        return Path(self.log.name).read_text()

    def incarnation(self):
        return max((claim.incarnation for claim in self.run.claims()), default=0)

    def hosts(self):
        """The hosts of the newest incarnation, by rank; None until its workers have all said so."""
        placed = [e for e in self.run.events() if e["event"] == "placed" and e["incarnation"] == self.incarnation()]
        return placed[-1]["hosts"] if placed else None

    def slice(self):
        return wait_for("workers are placed", self.hosts)[0].rpartition("-")[0]

    def wait_until_it_trains(self, after, repaired=True):
        """Waits until an incarnation after `after` has saved and all is repaired, and for a random moment more."""
        wait_for(f"incarnation {after + 1}", lambda: self.incarnation() > after)

        def has_saved():
            return any(accepted.incarnation == self.incarnation() for accepted in self.run.acceptances())

        wait_for(f"incarnation {self.incarnation()} saves", has_saved)
        if repaired:
            self.wait_until_repaired()
        time.sleep(self.random.uniform(0, 3))

    def verdict(self, incarnation):
        """The driver's verdict on an incarnation."""

        def ended():
            events = (e for e in self.run.events() if e["event"] == "ended" and e["incarnation"] == incarnation)
            return next(events, None)

        return wait_for(f"verdict on incarnation {incarnation}", ended)

    def answer(self, incarnation):
        """What the processes of an incarnation made of a notice; None if they have made nothing of any."""
        events = (e for e in self.run.events() if e["event"] == "notice" and e["incarnation"] == incarnation)
        return next(events, None)

    def saves_begun(self, incarnation):
        """The steps at which processes of an incarnation began to save."""
        events = (e for e in self.run.events() if e["incarnation"] == incarnation)
        return {event["step"] for event in events if event["event"] == "save_started"}

    def resumes_at(self, incarnation):
        [claim] = [claim for claim in self.run.claims() if claim.incarnation == incarnation]
        return self.run.step_of(claim.resumes)

    def start_agent(self, slice_name, grace_s):
        """The host agent of a host, beside a metadata server which says that the host goes."""
        metadata = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Preempted)
        threading.Thread(target=metadata.serve_forever, daemon=True).start()
        environment = self.twin.environment() | {"TMPDIR": str(self.twin.home)}
        command = [sys.executable, "-m", "openmoe.platform", "host-agent", "--slice", slice_name]
        command += ["--address", environment["RAY_ADDRESS"], "--grace", str(grace_s)]
        command += ["--metadata", f"http://127.0.0.1:{metadata.server_port}/computeMetadata/v1"]
        return subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def end(self):
        for repair in self.repairs:  # it holds the cluster's lock
            repair.kill()
            repair.wait()
        self.kill_controller()
        self.log.close()


@pytest.fixture(scope="module")
def story(twin, run_file, tmp_path_factory, request, failed_before):
    told = Story(twin, tmp_path_factory.mktemp("preemption"), run_file)
    try:
        told.wait_until_it_trains(after=0)
        yield told
    finally:
        told.end()
        if request.session.testsfailed > failed_before:
            print(openmoe("jobs", "logs", told.job_id, check=False, **told.environment))
            twin_module.down(twin.state_dir, print)  # what still runs of the story is not there for other tests


@pytest.fixture(autouse=True, scope="module")
def failed_before(request):
    return request.session.testsfailed


@pytest.fixture(autouse=True)
def chapter(request, failed_before):
    """A chapter after one that failed could only wait for what will not come."""
    if request.session.testsfailed > failed_before:
        pytest.skip("a chapter before this one failed")


def test_a_slice_taken_without_notice_is_a_preemption_named_from_the_provider_s_record(story):
    taken = story.slice()
    story.openmoe("cluster", "preempt", story.twin.name, taken)
    verdict = story.verdict(1)
    assert verdict["cause"] == "preemption", verdict
    assert verdict["reason"] == f"{taken} was preempted (ranks 0, 1)"
    assert f"{taken}-0 " in str(verdict["evidence"])
    assert "the provider's record says PREEMPTED" in str(verdict["evidence"])
    assert verdict["decision"]["action"] == "retry"
    assert story.answer(1) is None
    assert wait_for("the other slice", lambda: story.incarnation() > 1 and story.slice()) != taken
    story.repair()
    story.wait_until_it_trains(after=1)


def test_a_slice_taken_with_30_s_of_notice_is_a_preemption_announced_by_ray_and_all_is_saved_before_it_goes(story):
    before, taken = story.incarnation(), story.slice()
    story.openmoe("cluster", "preempt", story.twin.name, taken, "--grace", 30)
    verdict, answer = story.verdict(before), story.answer(before)
    assert verdict["cause"] == "preemption", verdict
    assert verdict["evidence"][0] == "Ray announced the preemption of ranks 0, 1"
    assert answer["saves"] is True, answer
    assert 0 < answer["save_s"] < answer["grace_s"] < 30
    assert wait_for("the other slice", lambda: story.incarnation() > before and story.slice()) != taken
    assert story.resumes_at(before + 1) >= answer["step"]
    story.repair()
    story.wait_until_it_trains(after=before)
    assert story.job().spent == {}


def test_of_10_s_of_notice_that_the_host_s_agent_hears_it_begins_a_save_if_it_fits_and_what_is_accepted_counts(story):
    before, taken = story.incarnation(), story.slice()
    agent = story.start_agent(taken, grace_s=10)
    answer = wait_for("the notice is answered", lambda: story.answer(before))
    assert answer["grace_s"] < 10
    assert answer["saves"] is (0 < answer["save_s"] <= answer["grace_s"]), answer
    assert agent.wait(timeout=60) == 0
    story.openmoe("cluster", "preempt", story.twin.name, taken)
    verdict = story.verdict(before)
    assert verdict["cause"] == "preemption", verdict
    assert wait_for("the other slice", lambda: story.incarnation() > before and story.slice()) != taken
    if answer["saves"]:  # whether it is done in time is the machine's affair: it may take longer than those before
        assert answer["step"] in story.saves_begun(before)
    accepted = [each.step for each in story.run.acceptances() if each.incarnation == before]
    assert story.resumes_at(before + 1) == max(accepted)
    story.repair()
    story.wait_until_it_trains(after=before)
    assert story.job().spent == {}


def test_a_host_that_dies_by_itself_is_a_lost_slice_whose_rest_is_drained(story):
    before, broken = story.incarnation(), story.slice()
    rank = story.hosts().index(f"{broken}-1")
    story.twin.kill_host(f"{broken}-1")
    verdict = story.verdict(before)
    assert verdict["cause"] == "lost_slice", verdict
    assert verdict["reason"] == f"{broken} was lost without notice: {broken}-1 is gone (ranks {rank})"
    assert "the provider's record says RUNNING" in str(verdict["evidence"])
    assert verdict["decision"]["reason"].startswith("lost_slice 1 of 100: ")  # three preemptions have spent none of it
    # What still lives of the slice is drained, so that Ray does not reserve its head again.
    wait_for("the rest of the slice goes", lambda: not story.twin.processes(f"{broken}-0", "raylet/raylet"))
    assert wait_for("the other slice", lambda: story.incarnation() > before and story.slice()) != broken
    story.repair()
    story.wait_until_it_trains(after=before)


def test_a_machine_that_freezes_as_a_whole_is_a_lost_slice_too(story):
    before, broken = story.incarnation(), story.slice()
    host = f"{broken}-{story.random.choice((0, 1))}"
    rank = story.hosts().index(host)
    story.twin.freeze_host(host)
    frozen_s = time.time()
    verdict = story.verdict(before)
    print(f"froze {host}: the group ended after {verdict['time_s'] - frozen_s:.1f} s")
    assert verdict["cause"] == "lost_slice", verdict
    assert verdict["reason"] == f"{broken} was lost without notice: {host} is gone (ranks {rank})"
    assert wait_for("the other slice", lambda: story.incarnation() > before and story.slice()) != broken
    story.repair()
    story.wait_until_it_trains(after=before, repaired=False)  # the next chapter needs no spare slice


def test_a_worker_that_is_stopped_ends_its_group_and_is_named_with_its_host(story):
    before, host = story.incarnation(), f"{story.slice()}-{story.random.choice((0, 1))}"
    rank = story.hosts().index(host)
    [worker] = story.twin.processes(host, "RayTrainWorker")
    worker.send_signal(signal.SIGSTOP)
    stopped_s = time.time()
    verdict = story.verdict(before)  # nobody lets it go on
    assert verdict["cause"] == "host_fault", verdict
    assert verdict["reason"].startswith(f"rank {rank} froze: process {worker.pid} on {host} is stopped, "), verdict
    print(f"stopped {host}: the group ended after {verdict['time_s'] - stopped_s:.1f} s")
    assert not worker.is_running()
    story.wait_until_it_trains(after=before)


def test_a_spare_slice_that_loses_a_host_is_drained_whole_while_the_run_goes_on(story):
    story.wait_until_repaired()
    before, used = story.incarnation(), story.slice()
    [spare] = story.twin.states().keys() - {used}
    story.twin.kill_host(f"{spare}-1")
    given_up = wait_for(
        "the spare is given up", lambda: [e for e in story.run.events() if e["event"] == "slice_given_up"]
    )
    text = f"{spare} is broken, 1 of its 2 hosts live and no run is on it"
    assert [(e["slice"], e["left"], e["text"]) for e in given_up] == [(spare, [f"{spare}-0"], text)]
    # It goes at once, unless Ray has put an actor of its own there: then when that ends, and unused until then.
    wait_for("nothing is placed there", lambda: story.usable() == [f"{used}-0", f"{used}-1"])
    assert (story.incarnation(), story.slice()) == (before, used)
    story.repair()


def test_a_controller_that_is_killed_changes_nothing(story):
    before, attempt = story.incarnation(), story.job().attempt
    story.kill_controller()
    story.start_controller()
    wait_for("it looks after the job again", lambda: story.said().count("controller: 1 running") == 1)
    accepted = len(story.run.acceptances())
    wait_for("the run saves on", lambda: len(story.run.acceptances()) > accepted)
    assert (story.incarnation(), story.job().attempt, story.job().state) == (before, attempt, "running")


def test_a_driver_that_is_killed_is_replaced_by_the_controller(story, driver_of):
    before, attempt = story.incarnation(), story.job().attempt
    driver_of(story.twin.home).kill()
    story.wait_until_it_trains(after=before)
    assert story.job().attempt == attempt + 1
    assert story.job().spent == {"host_fault": 1}


def test_a_lost_head_is_a_lost_cluster_and_the_run_goes_on_when_it_is_back(story):
    before, attempt = story.incarnation(), story.job().attempt
    story.twin.kill_host("head")
    wait_for("the controller sees the cluster lost", lambda: story.job().cluster_lost)
    assert story.job().state == "running"  # the cluster is lost, the run has not failed
    story.openmoe("cluster", "up", story.twin.name)
    story.wait_until_it_trains(after=before)
    job = story.job()
    assert (job.attempt, job.cluster_lost) == (attempt + 1, False)
    assert job.spent == {"host_fault": 1, "cluster_lost": 1}


def test_the_run_is_cancelled_and_ends_where_it_is_told_to_and_its_story_names_every_cause(story):
    story.openmoe("jobs", "cancel", story.job_id)
    wait_for("the job is cancelled", lambda: story.job().state == "cancelled")
    told = story.openmoe("jobs", "story", story.job_id)
    for word in ("preemption", "lost_slice", "host_fault", "cluster_lost"):
        assert word in told.replace(" ", "_"), told
    causes = [e["cause"] for e in story.run.events() if e["event"] == "ended"]
    assert causes == ["preemption"] * 3 + ["lost_slice"] * 2 + ["host_fault", "operator"]

    story.job_id = story.submit(f"train.steps={story.run.newest_accepted().step + 5}")
    wait_for("the job succeeds", lambda: story.job().state == "succeeded")


def test_every_row_was_trained_on_once_and_every_bit_is_that_of_an_undisturbed_run(story, trainer):
    here = story.run.trace()
    steps = (f"train.steps={len(here)}", f"train.checkpoint_every_steps={len(here)}")
    undisturbed = trainer("undisturbed", *SLICE, *steps)
    undisturbed.start()
    undisturbed.finish(timeout_s=800)
    there = undisturbed.run.trace()
    assert [r["rows"] for r in here] == [[8 * n, 8 * n + 8] for n in range(len(here))]
    exact = ("step", "rows", "total_loss", "loss", "text_loss", "grad_norm", "batch_checksum", "expert_load")
    assert [[r[k] for k in exact] for r in here] == [[r[k] for k in exact] for r in there]
