"""Ray's job client as we use it never waits long for a cluster that does not answer, and asks nobody else."""

import http.server
import json
import socket
import threading

import pytest

from openmoe.platform.jobs.ray_jobs import ClusterUnreachable, RayJobs


@pytest.fixture
def silent():
    """The address of something that takes connections and says nothing, as a frozen head does."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def serve():
    """Returns a function that serves pages, given by path: (address, what was asked for with which token)."""
    servers = []

    def start(pages):
        asked = []

        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.path, self.headers["Authorization"]))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(pages[self.path])

            def log_message(self, *arguments):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_frozen_head_is_unreachable_after_the_timeout(silent):
    with pytest.raises(ClusterUnreachable, match=r"http://127\.0\.0\.1:\d+: no answer from the cluster"):
        RayJobs(silent, "token", timeout_s=0.5)  # without one it would wait for ever


def test_a_head_that_is_gone_is_unreachable_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ClusterUnreachable, match="no answer"):
        RayJobs(address, "token")


def test_what_is_no_ray_is_unreachable_and_the_environment_does_not_lead_elsewhere(serve, silent, monkeypatch):
    address, asked = serve({"/api/version": b"<html>hello</html>"})
    monkeypatch.setenv("RAY_ADDRESS", silent)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", silent)
    with pytest.raises(ClusterUnreachable, match="no answer"):
        RayJobs(address, "secret")
    assert asked == [("/api/version", "Bearer secret")]


# As Ray 2.60.0 answers, abridged.
VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "b7f4259e", "session_name": "session_2026-11-24"}
LISTED = [
    {"type": "SUBMISSION", "submission_id": "night-ab12-1", "status": "RUNNING", "entrypoint": "sleep 100"},
    {"type": "SUBMISSION", "submission_id": "raysubmit_x7f2", "status": "PENDING", "entrypoint": "sleep 100"},
    {"type": "SUBMISSION", "submission_id": "night-ab12-2", "status": "SUCCEEDED", "entrypoint": "true"},
    {"type": "SUBMISSION", "submission_id": "night-ab12-3", "status": "STOPPED", "entrypoint": "true"},
    {"type": "SUBMISSION", "submission_id": "night-ab12-4", "status": "FAILED", "entrypoint": "false"},
    {"type": "DRIVER", "job_id": "01000000", "submission_id": None, "status": "RUNNING", "entrypoint": "python"},
]


def test_the_submissions_that_live_are_those_that_have_not_ended_whoever_submitted_them(serve):
    address, asked = serve({"/api/version": json.dumps(VERSION).encode(), "/api/jobs/": json.dumps(LISTED).encode()})
    assert RayJobs(address, "token").alive() == {"night-ab12-1": "RUNNING", "raysubmit_x7f2": "PENDING"}
    assert asked[-1] == ("/api/jobs/", "Bearer token")
