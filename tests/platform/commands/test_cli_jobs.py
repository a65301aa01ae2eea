"""`openmoe submit` and `openmoe jobs` as a user types them, where no controller runs and no cluster answers."""

import json
import os
import sys
import time

import pytest

from openmoe.clusters.twin_state import TwinError
from openmoe.platform.commands import cli, cli_jobs
from openmoe.platform.jobs import controller_lock, job_logs, up
from openmoe.platform.jobs.job_events import CancelAsked, Submitted
from openmoe.platform.jobs.job_store import JobStore

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def openmoe(tmp_path, monkeypatch, capsys):
    """Returns the function that runs the command in a home and a folder of its own."""
    monkeypatch.setenv("OPENMOE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["openmoe", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert ended.value.code == code, said.out + said.err
        return said.out if code == 0 else said.err

    return run


def test_a_job_is_queued_shown_cancelled_and_queued_again(openmoe, tmp_path):
    said = openmoe("submit", "quickstart", "train.steps=200", "--cluster", NOWHERE)
    job_id = said.split()[0]
    assert said.splitlines()[:3] == [
        f"{job_id} is queued for cluster {NOWHERE}",
        f"run_dir: {tmp_path}/openmoe-runs/quickstart must be one folder for all hosts of that cluster, on a shared "
        "disk; or give gs://",
        "no controller runs here, so nothing happens yet; start one: openmoe controller run   (or: openmoe up)",
    ]
    assert f"openmoe jobs logs -f {job_id}" in said

    [listed] = json.loads(openmoe("jobs", "list", "--json"))
    assert (listed["id"], listed["state"], listed["attempt"]) == (job_id, "queued", 0)
    assert listed["run_dir"] == str(tmp_path / "openmoe-runs" / "quickstart")
    shown = json.loads(openmoe("jobs", "show", "quick", "--json"))  # the beginning of the id is enough
    assert (shown["id"], shown["step"], shown["submission_id"]) == (job_id, 0, None)
    assert f"run_dir: {tmp_path}/openmoe-runs/quickstart" in shown["run_file"]
    assert "steps: 200" in shown["run_file"]

    assert json.loads(openmoe("jobs", "cancel", job_id, "--json"))["state"] == "cancelled"
    assert f"{job_id}: nothing to cancel, it is cancelled" in openmoe("jobs", "cancel", job_id, code=2)
    assert json.loads(openmoe("jobs", "retry", job_id, "--json"))["state"] == "queued"
    story = [s["text"] for s in json.loads(openmoe("jobs", "story", job_id, "--json"))]
    assert story == [
        f"submitted: run quickstart for cluster {NOWHERE}",
        "cancelled before it started: on request",
        "asked to try again, with fresh budgets",
    ]


def submitted(job_id, time_s, cluster=NOWHERE):
    return Submitted(
        job_id=job_id, time_s=time_s, name="night", run_dir=f"/runs/{job_id}", run_file="name: night\n",
        cluster=cluster, cluster_file="", slots=1, budgets={},
    )  # fmt: skip


@pytest.fixture
def four_jobs(tmp_path):
    """Two that were cancelled, the first a week ago, and two that are queued."""
    (tmp_path / "home").mkdir()
    store, now_s = JobStore(tmp_path / "home" / "controller.db"), time.time()
    for job_id, age_s in (("old-ab12", 604_800.0), ("new-cd34", 60.0)):
        store.apply(submitted(job_id, now_s - age_s))
        store.apply(CancelAsked(job_id=job_id, time_s=now_s - age_s))
    for job_id in ("first-ef56", "second-gh78"):
        store.apply(submitted(job_id, now_s, cluster="small"))
    store.close()


def listed(openmoe, *more):
    """(id, reason, what it waits for) as the list's JSON has it, all of which its table must show as well."""
    jobs = [(job["id"], job["reason"], job["waiting"]) for job in json.loads(openmoe("jobs", "list", "--json", *more))]
    rows = [line for line in openmoe("jobs", "list", *more).splitlines() if line.strip()][1:]
    assert [row.split()[0] for row in rows] == [job_id for job_id, _, _ in jobs]
    for row, (_, *said) in zip(rows, jobs, strict=True):
        assert row.rstrip().endswith("; ".join(filter(None, said)))
    return jobs


def test_the_list_and_its_json_show_the_same_jobs_and_why_they_wait(openmoe, four_jobs, tmp_path):
    no_controller = "no controller runs: openmoe controller run"
    recent = [
        ("new-cd34", "on request", None),
        ("first-ef56", "", no_controller),
        ("second-gh78", "", no_controller),
    ]
    assert listed(openmoe) == recent
    assert listed(openmoe, "--all") == [("old-ab12", "on request", None), *recent]
    with controller_lock.only_one(tmp_path / "home"):
        assert listed(openmoe)[1:] == [
            ("first-ef56", "", "needs 1 of small, 0 free"),
            ("second-gh78", "", "behind first-ef56"),
        ]
        shown = json.loads(openmoe("jobs", "show", "second", "--json"))
        assert (shown["reason"], shown["waiting"]) == ("", "behind first-ef56")
        assert "behind first-ef56" in openmoe("jobs", "show", "second")


def test_what_cannot_be_done_is_said_in_one_line(openmoe, tmp_path):
    assert openmoe("jobs", "list") == "no jobs; `openmoe submit RUN` makes one\n"
    assert openmoe("submit", "quickstart", code=2) == (
        "cluster: none is up on this machine; `openmoe up` or `openmoe cluster up local` starts one, "
        "--cluster http://HOST:8265 takes another machine's\n"
    )
    bad = openmoe("submit", "quickstart", "train.stepz=3", code=2)  # before anything about a cluster
    assert bad == "override: train.stepz: unknown key; did you mean `steps`?\n"
    assert openmoe("submit", "quickstrat", code=2).startswith("quickstrat: ")
    assert openmoe("jobs", "list", "--json") == "[]\n"
    assert openmoe("submit", "quickstart", "--cluster", "local", code=2) == (
        "cluster: local was not started on this machine; `openmoe cluster up FILE` starts it\n"
    )
    assert openmoe("submit", "quickstart", "--cluster", "gcp-tpu-v4-128-spot", code=2) == (
        "cluster: v4-128-spot is of provider gcp, which nothing here starts or finds; "
        "give the address of its Ray dashboard: --cluster http://HOST:8265\n"
    )
    for address in ("http://", "http://[::1", "http://head:80000", "https://head:ray"):
        assert openmoe("submit", "quickstart", "--cluster", address, code=2) == (
            f"cluster: {address} is no address of a Ray dashboard, such as http://HOST:8265\n"
        )
    job = json.loads(openmoe("submit", "quickstart", "--cluster", f"{NOWHERE}/", "--json"))
    assert job["cluster"] == NOWHERE
    job_id = job["id"]
    again = openmoe("submit", "quickstart", "--cluster", NOWHERE, code=2)
    assert again == (
        f"run_dir: {tmp_path}/openmoe-runs/quickstart belongs to job {job_id}, which is queued; "
        f"`openmoe jobs cancel {job_id}` first, or choose another run_dir\n"
    )
    assert openmoe("jobs", "show", "nope", code=2).startswith("job 'nope': there is none of this id")
    assert openmoe("jobs", "logs", job_id, code=2) == (f"{job_id}: no attempt 0, there are none yet; it is queued\n")


def test_whoever_follows_a_job_that_is_queued_hears_why_nothing_comes(openmoe, monkeypatch, capsys):
    job_id = openmoe("submit", "quickstart", "--cluster", NOWHERE).split()[0]
    monkeypatch.setattr(job_logs, "follow", lambda *arguments, **named: iter(()))  # else it waits for a controller
    cli_jobs.logs(job_id, follow=True)
    assert capsys.readouterr().err == f"{job_id} is queued: no controller runs: openmoe controller run\n"


def test_a_cluster_that_nothing_here_starts_is_refused_and_not_said_to_be_down(tmp_path):
    said = []
    with pytest.raises(TwinError, match="provider gcp: started by its own tools"):
        up.run("gcp-tpu-v4-128-spot", tmp_path, said.append, dashboard_port=None)
    assert said == []


def test_a_home_that_cannot_be_made_is_said_in_one_line(openmoe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENMOE_HOME", str(tmp_path / "file"))
    assert openmoe("jobs", "list", code=2) == (
        f"{tmp_path}/file: cannot be made, to keep jobs and clusters in (File exists); "
        "set OPENMOE_HOME to a folder of yours\n"
    )


def test_a_second_controller_of_a_home_says_so_in_one_line(openmoe, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    assert not controller_lock.is_running(home)
    with controller_lock.only_one(home):
        assert controller_lock.is_running(home)
        said = openmoe("controller", "run", code=2)
    assert said.count("\n") == 1
    assert said.startswith(f"controller: process {os.getpid()} is one already for {home};")
    assert not controller_lock.is_running(home)
