"""The agent on a host, against a metadata server that polls long, breaks off, answers slowly and with errors."""

import fcntl
import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

from openmoe.clusters import ray_start
from openmoe.platform.run import host_agent


class Metadata(http.server.ThreadingHTTPServer):
    """Answers like Google's for two values: each waits for a change when it is asked to, and knows versions."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.changed = threading.Condition()
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.version = dict.fromkeys(self.values, 1)
        self.troubles = []
        self.asked, self.waiting = [], []
        self.patience_s = 1.5
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def waits(self, key):
        with self.changed:
            return key in self.waiting

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/computeMetadata/v1"

    def set(self, key, value):
        with self.changed:
            self.values[key] = value
            self.version[key] += 1
            self.changed.notify_all()

    def handle_error(self, request, client_address):
        pass  # broken off by design


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        key = url.path.removeprefix("/computeMetadata/v1/instance/")
        server = self.server
        if self.headers["Metadata-Flavor"] != "Google" or key not in server.values:
            return self.send_error(403)
        server.asked.append(key)
        trouble = server.troubles.pop(0) if key == "preempted" and server.troubles else ""
        if trouble == "error":
            return self.send_error(503)
        if trouble == "reset":
            return self.connection.close()
        if trouble == "slow":
            time.sleep(0.3)
        with server.changed:
            if query.get("wait_for_change") == "true":
                server.waiting.append(key)
                server.changed.wait_for(lambda: f"v{server.version[key]}" != query["last_etag"], server.patience_s)
                server.waiting.remove(key)
            value, etag = server.values[key], f"v{server.version[key]}"
        self.send_response(200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(value)))
        self.end_headers()
        self.wfile.write(value.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def metadata():
    server = Metadata()
    yield server
    server.shutdown()
    server.server_close()


class Agent:
    """The agent in a thread, with a Ray that only writes down what it was told."""

    def __init__(self, url, answers=()):
        self.drained, self.said, self.answers = [], [], list(answers)
        self.thread = threading.Thread(target=host_agent.follow, args=(url, self.drain, self.said.append), daemon=True)
        self.thread.start()

    def drain(self, left_s):
        self.drained.append(left_s)
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return answer


def wait_for(condition, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_preemption_is_heard_by_the_question_that_waits_and_drained_once_whatever_the_server_did_before(metadata):
    metadata.troubles, metadata.patience_s = ["error", "reset", "slow", "error"], 60
    agent = Agent(metadata.url)
    wait_for(lambda: not metadata.troubles and metadata.waits("preempted"))
    asked = metadata.asked.count("preempted")
    metadata.set("preempted", "TRUE")
    agent.thread.join(timeout=30)
    assert not agent.thread.is_alive()
    [left_s] = agent.drained
    assert left_s == pytest.approx(30, abs=10)
    assert metadata.asked.count("preempted") == asked
    assert sum("trying on" in line for line in agent.said) == 3


def test_a_host_that_is_preempted_when_the_agent_starts_is_drained(metadata):
    metadata.set("preempted", "TRUE")
    agent = Agent(metadata.url)
    agent.thread.join(timeout=10)
    assert len(agent.drained) == 1


def test_a_maintenance_drains_with_an_hour_and_a_preemption_after_it_with_its_own_notice(metadata):
    agent = Agent(metadata.url)
    metadata.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    metadata.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    wait_for(lambda: agent.drained)
    metadata.set("preempted", "TRUE")
    agent.thread.join(timeout=10)
    assert agent.drained == [pytest.approx(3600, abs=10), pytest.approx(30, abs=10)]


def test_what_is_not_drained_is_tried_again_until_it_is(metadata):
    agent = Agent(metadata.url, answers=[ConnectionError("the head is busy"), False])
    metadata.set("preempted", "TRUE")
    agent.thread.join(timeout=10)
    assert len(agent.drained) == 3
    assert "not drained (the head is busy); trying again" in agent.said


def test_a_long_poll_that_ends_without_a_change_asks_again_and_drains_nothing(metadata):
    agent = Agent(metadata.url)
    wait_for(lambda: metadata.asked.count("preempted") >= 3)  # the server answers after 1.5 s
    assert (agent.drained, agent.said) == ([], [])


@pytest.mark.parametrize(
    ("key", "value", "left_s"),
    [
        ("preempted", "TRUE\n", 30.0),
        ("preempted", "FALSE", 0.0),
        ("preempted", "", 0.0),
        ("maintenance-event", "NONE", 0.0),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", 0.0),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", 3600.0),
    ],
)
def test_what_the_metadata_server_says_is_so_much_time(key, value, left_s):
    assert host_agent.notice_s(key, value) == left_s


def test_one_agent_watches_a_host_whatever_other_users_lock_in_the_folder_of_temporary_files(metadata, tmp_path):
    metadata.patience_s = 60
    (tmp_path / "home").mkdir()
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-u", host_agent.__file__, "--metadata", metadata.url]
    with (tmp_path / "openmoe-host-agent.lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as agent:
            try:
                assert agent.stdout.readline().endswith(f"host agent: watches {metadata.url}\n")
                second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
            finally:
                agent.kill()
    assert (second.returncode, second.stdout[9:]) == (0, "host agent: another agent watches this host\n")


def test_the_agent_drains_as_the_rest_of_the_platform_does_without_importing_it():
    told = ray_start.drain_command(gcs_address="h:1", node_id="ab", grace_s=29.6, why="preempted by the provider")
    assert host_agent.drain_command("h:1", "ab", 30) == told
