"""`openmoe cluster up | status | preempt | down`, as a user types them and as a script reads them."""

import json
import os
import sys

import pytest
from typer.testing import CliRunner

from openmoe.platform.commands import cli_cluster


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENMOE_HOME", str(tmp_path))


def openmoe_cluster(*arguments):
    """What the command prints: (what --json prints, lines beside it)."""
    runner = CliRunner()
    result = runner.invoke(cli_cluster.app, [*arguments, "--json"], catch_exceptions=False, standalone_mode=False)
    return json.loads(result.stdout), result.stderr.splitlines()


def host(name, worker_id, ip):
    return {
        "name": name, "worker_id": worker_id, "ip": ip, "alive": True, "instance": "RUNNING", "since_s": 5.0,
        "pid": os.getpid(),
    }  # fmt: skip


def test_the_status_says_where_a_cluster_is_and_what_lives_of_it(running):
    found, beside = openmoe_cluster("status", "small")
    assert found == {
        "name": "small",
        "provider": "twin",
        "head_alive": True,
        "connection": {
            "gcs_address": "127.71.3.1:20001",
            "dashboard_url": "http://127.0.0.1:20002",
            "token_file": f"{running.state_dir}/token",
            "metrics_sd_file": f"{running.temp_dir}/head/session_latest/prom_metrics_service_discovery.json",
        },
        "slices": [
            {
                "name": "slice-a",
                "state": "ready",
                "hosts": [host("slice-a-0", 0, "127.71.3.10"), host("slice-a-1", 1, "127.71.3.11")],
            },
            {
                "name": "slice-b",
                "state": "ready",
                "hosts": [host("slice-b-0", 0, "127.71.3.12"), host("slice-b-1", 1, "127.71.3.13")],
            },
        ],
    }
    assert beside == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a twin needs Linux")
def test_up_prints_the_status_and_what_it_does_beside_it(running):
    found, beside = openmoe_cluster("up", "small")
    assert found == openmoe_cluster("status", "small")[0]
    assert beside[:-1] == ["head (127.71.3.1:20001) runs", "slice-a runs", "slice-b runs"]
    assert beside[-1].startswith("cluster small is up, ")


def test_a_slice_is_taken_away_and_then_the_cluster(running):
    assert openmoe_cluster("preempt", "small", "slice-a", "--grace", "0") == (
        {"preempted": "slice-a", "cluster": "small", "grace_s": 0.0},
        ["slice-a: the provider's record says PREEMPTED", "slice-a: its 2 hosts are gone (0 processes)"],
    )
    assert [(one["name"], one["state"]) for one in openmoe_cluster("status")[0]["slices"]] == [
        ("slice-a", "preempted"),
        ("slice-b", "ready"),
    ]
    assert openmoe_cluster("down") == (
        {"down": "small", "was_up": True},
        ["cluster small is down: 5 of 5 nodes were alive, 0 processes ended"],
    )
    assert openmoe_cluster("down") == ({"down": "local", "was_up": False}, ["cluster local is not up"])
    assert openmoe_cluster("status")[0] == {
        "name": "local", "provider": "", "head_alive": False, "connection": None, "slices": []
    }  # fmt: skip


def test_without_json_the_lines_are_all_there_is(cluster):
    result = CliRunner().invoke(cli_cluster.app, ["down", "small"], catch_exceptions=False, standalone_mode=False)
    assert result.stdout == "cluster small is down: 0 of 0 nodes were alive, 0 processes ended\n"
    assert result.stderr == ""
