"""What drivers print, from a head that answers as Ray's does, and `openmoe jobs logs` of it."""

import asyncio
import json
import threading

import pytest
from aiohttp import web
from typer.testing import CliRunner

from openmoe.platform.commands import cli_jobs
from openmoe.platform.jobs import job_logs
from openmoe.platform.jobs.job_events import Admitted, AttemptEnded, JobError, Submitted
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.run.verdict import Verdict

JOB = "night-ab12"
PREEMPTED = Verdict(cause="preemption", reason="slice-a was preempted")


class Head:
    """As much of Ray's dashboard as there is to ask for lines.

    Attributes:
      parts: by submission id, what its driver prints, as it is sent; a head knows no other submissions.
      falls: whether it falls over once it has sent them.
    """

    def __init__(self):
        self.parts, self.falls, self.address = {}, False, ""
        self.application = web.Application()
        paths = {"/api/version": self.version, "/api/jobs/{id}": self.job, "/api/jobs/{id}/logs": self.logs}
        paths |= {"/api/jobs/{id}/logs/tail": self.tail}
        self.application.add_routes([web.get(path, answer) for path, answer in paths.items()])

    async def version(self, request):
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})

    async def job(self, request):
        self.parts_of(request)
        return web.json_response({"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "true"})

    async def logs(self, request):
        return web.json_response({"logs": "".join(self.parts_of(request))})

    async def tail(self, request):
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        for part in self.parts_of(request):
            await answer.send_str(part)
        if self.falls:
            request.transport.abort()
        return answer

    def parts_of(self, request):
        if request.match_info["id"] not in self.parts:
            raise web.HTTPNotFound(text="no such submission")
        return self.parts[request.match_info["id"]]


@pytest.fixture
def head():
    found, loop = Head(), asyncio.new_event_loop()
    runner = web.AppRunner(found.application)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def listen():
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()

    do(listen())
    found.address = "http://127.0.0.1:{1}".format(*runner.addresses[0])
    yield found
    do(runner.cleanup())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENMOE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def store(home, head):
    """One job, whose first attempt is at work."""
    found = JobStore(home / "controller.db")
    found.apply(
        Submitted(
            job_id=JOB, time_s=1.0, name="night", run_dir="/runs/night", run_file="name: night\n",
            cluster=head.address, cluster_file="", slots=1, budgets={"preemption": 9},
        )
    )  # fmt: skip
    found.apply(Admitted(job_id=JOB, time_s=2.0))
    yield found
    found.close()


def end(store, attempt, outcome, verdict=None):
    """Ends an attempt as the controller does."""
    store.apply(
        AttemptEnded(
            job_id=JOB, time_s=3.0, submission_id=f"{JOB}-{attempt}", outcome=outcome, verdict=verdict, step=40
        )
    )


def openmoe(*arguments):
    """What `openmoe jobs` prints."""
    return CliRunner().invoke(cli_jobs.app, arguments, catch_exceptions=False, standalone_mode=False).stdout


def test_a_job_is_followed_attempt_after_attempt_until_it_is_done(store, head, home):
    head.parts = {f"{JOB}-1": ["step 1\n", "step 2\nstep 3\n"]}
    told = job_logs.follow(store, JOB, home, attempt=None, period_s=0.01)
    assert [next(told), next(told)] == ["step 1\n", "step 2\nstep 3\n"]
    end(store, 1, "failed", PREEMPTED)
    store.apply(Admitted(job_id=JOB, time_s=4.0))
    head.parts[f"{JOB}-2"] = ["step 2\n"]
    assert next(told) == "step 2\n"
    end(store, 2, "succeeded")
    assert list(told) == []
    assert list(job_logs.follow(store, JOB, home, attempt=1, period_s=0.01)) == ["step 1\n", "step 2\nstep 3\n"]


def test_the_command_prints_lines_as_they_are_and_as_json(store, head):
    head.parts = {f"{JOB}-1": ["step 1\n", "step 2 \u2713\n"]}
    end(store, 1, "succeeded")
    assert openmoe("logs", JOB) == openmoe("logs", "-f", JOB) == "step 1\nstep 2 \u2713\n"
    assert json.loads(openmoe("logs", JOB, "--json")) == {"job": JOB, "attempt": 1, "logs": "step 1\nstep 2 \u2713\n"}
    followed = openmoe("logs", "-f", JOB, "--json").splitlines()
    assert [json.loads(line) for line in followed] == [{"text": "step 1\n"}, {"text": "step 2 \u2713\n"}]


def test_a_head_that_falls_over_meanwhile_is_one_line_after_what_it_had_sent(store, head, home):
    head.parts, head.falls = {f"{JOB}-1": ["step 1\n"]}, True
    told = job_logs.follow(store, JOB, home, attempt=None, period_s=0.01)
    assert next(told) == "step 1\n"
    with pytest.raises(JobError) as caught:
        next(told)
    assert str(caught.value) == (
        f"{JOB}: its lines are on its cluster ({head.address}: "
        "WebSocket connection closed unexpectedly with close code 1006); "
        f"what the run directory knows: openmoe jobs story {JOB}"
    )


def test_attempts_that_nobody_knows_are_named(store, head, home):
    job = store.job(JOB)
    with pytest.raises(JobError, match=f"^{JOB}: no attempt 2, there are attempts 1 to 1; it is starting"):
        job_logs.read(job, home, 2)
    with pytest.raises(JobError, match=f"its cluster keeps no lines of attempt 1; .* openmoe jobs story {JOB}$"):
        job_logs.read(job, home, 1)
    end(store, 1, "succeeded")
    assert list(job_logs.follow(store, JOB, home, attempt=None, period_s=0.01)) == []
