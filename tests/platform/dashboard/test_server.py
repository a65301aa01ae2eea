"""`openmoe dashboard` as it is run: its address, its refusals, and events that go on where a connection broke off."""

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from openmoe.platform.dashboard import server
from openmoe.platform.dashboard.watch import key_of


class Events:
    """A reader of server-sent events."""

    def __init__(self, response):
        self._lines = response.iter_lines()

    def next(self):
        """Returns (event, id, data) of the next one; comments are skipped."""
        fields = {}
        for line in self._lines:
            if not line and fields:
                return fields["event"], fields["id"], json.loads(fields["data"])
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
        raise AssertionError("the stream ended")

    def next_with(self, part):
        """Returns the next event that brings this part."""
        while part not in (event := self.next())[2]:
            pass
        return event


@pytest.fixture
def listen(served):
    """Opens a stream of events."""
    address, token, _ = served
    client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=30)

    def open_stream(path, **headers):
        request = client.build_request("GET", path, headers=headers)
        return client.send(request, stream=True)

    open_stream.json = lambda path: client.get(path).json()
    yield open_stream
    client.close()


def test_events_bring_what_is_new_and_go_on_after_the_last_one_that_was_seen(served, listen):
    run = served[2]("grows")
    run.claim()
    run.train(3)
    path = f"/api/runs/{key_of(run.dir.path)}"
    snapshot = listen.json(path)
    assert snapshot["cursor"] == "1000.000-1-1:3"
    stream = listen(f"{path}/events?after={snapshot['cursor']}")
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = Events(stream)
    kind, _, first = events.next()
    assert (kind, first["figures"]["step"], "points" in first) == ("update", 3, False)
    run.train(2)
    _, seen, update = events.next_with("points")
    assert (seen, update["points"]["step"]) == ("1000.000-1-1:5", [4, 5])
    assert [column for column, _ in update["load"]["columns"]] == [2, 3, 4]
    stream.close()
    run.train(2)
    stream = listen(f"{path}/events?after={snapshot['cursor']}", **{"Last-Event-ID": seen})
    _, seen, update = Events(stream).next_with("points")
    assert (seen, update["points"]["step"], update["figures"]["step"]) == ("1000.000-1-1:7", [6, 7], 7)
    stream.close()


def test_a_new_worker_group_tells_clients_to_begin_anew(served, listen):
    run = served[2]("restarts")
    run.claim()
    run.train(3)
    path = f"/api/runs/{key_of(run.dir.path)}"
    stream = listen(f"{path}/events?after={listen.json(path)['cursor']}")
    events = Events(stream)
    events.next()
    run.claim()
    assert events.next()[:2] == ("reset", "1000.000-2-1:0")
    stream.close()


def test_the_overview_is_sent_again_only_when_it_changed(served, listen):
    run = served[2]("listed")
    run.claim()
    run.train(3)
    listen.json(f"/api/runs/{key_of(run.dir.path)}")  # so that it is known

    def step_in(overview):
        return next(row["step"] for row in overview["runs"] if row["path"] == run.dir.path)

    stream = listen("/api/overview/events")
    kind, seen, overview = Events(stream).next()
    assert (kind, step_in(overview)) == ("update", 3)
    stream.close()
    stream = listen("/api/overview/events", **{"Last-Event-ID": seen})
    run.train(1)
    _, now, overview = Events(stream).next()
    assert (now != seen, step_in(overview)) == (True, 4)
    stream.close()


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(server.DashboardError) as refused:
            server.listen("127.0.0.1", port)
    remedy = "choose another port, or 0 for any free one"
    assert str(refused.value) == f"--port: cannot listen on 127.0.0.1:{port} (address already in use); {remedy}"


def test_without_a_token_it_listens_on_this_machine_only():
    command = [sys.executable, "-m", "openmoe.platform", "dashboard", "--host", "0.0.0.0", "--no-token"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "--no-token: only on this machine, and --host is 0.0.0.0; leave one of them out\n"


def test_it_may_be_asked_for_by_the_name_that_it_was_told_to_listen_on():
    assert {"trainer.lan", "localhost"} <= server.host_names("Trainer.LAN")
    assert {"0.0.0.0", socket.gethostname().lower()} <= server.host_names("0.0.0.0")


def test_an_address_that_is_not_of_this_machine_is_named():
    with pytest.raises(server.DashboardError, match=r"--host: 192\.0\.2\.77 is no address of this machine"):
        server.listen("192.0.2.77", 0)


def test_ctrl_c_ends_it_although_somebody_is_listening_and_its_token_may_be_chosen(tmp_path):
    environment = os.environ | {"OPENMOE_HOME": str(tmp_path / "home"), server.TOKEN_VARIABLE: "chosen"}
    command = [sys.executable, "-m", "openmoe.platform", "dashboard", str(tmp_path), f"{tmp_path}/later", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        address, _, token = process.stdout.readline().split()[1].partition("/?token=")
        assert token == "chosen"
        shown = process.stdout.readline()
        assert shown == f"runs of    {tmp_path}, {tmp_path}/later (there is no such folder yet)\n"
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.stream("GET", f"{address}/api/overview/events", timeout=30, headers=headers) as stream:
            Events(stream).next()
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        assert "Traceback" not in process.stderr.read()
