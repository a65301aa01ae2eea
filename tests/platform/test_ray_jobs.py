"""Ray's job client as we use it never waits long for a cluster that does not answer, and asks nobody else."""

import http.server
import socket
import threading
import time

import pytest

from openmoe.platform.ray_jobs import ClusterUnreachable, RayJobs


@pytest.fixture
def silent():
    """The address of something that takes connections and says nothing, as a frozen head does."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def somebody_else():
    """The address of a web server that is no Ray, and what it was asked for."""
    asked = []

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_a_frozen_head_is_unreachable_after_the_timeout(silent):
    began_s = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=r"http://127\.0\.0\.1:\d+: no answer from the cluster"):
        RayJobs(silent, "token", timeout_s=0.5)
    assert time.monotonic() - began_s < 5


def test_a_head_that_is_gone_is_unreachable_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ClusterUnreachable, match="no answer"):
        RayJobs(address, "token")


def test_what_is_no_ray_is_unreachable_and_the_environment_does_not_lead_elsewhere(somebody_else, silent, monkeypatch):
    address, asked = somebody_else
    monkeypatch.setenv("RAY_ADDRESS", silent)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", silent)
    with pytest.raises(ClusterUnreachable, match="no answer"):
        RayJobs(address, "secret")
    assert asked == [("/api/version", "Bearer secret")]
