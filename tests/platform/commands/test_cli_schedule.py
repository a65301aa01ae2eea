"""`openmoe schedule`, as a user types it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from openmoe.platform.commands import cli_schedule
from openmoe.platform.jobs import cron
from openmoe.platform.jobs.cron import ScheduleError
from openmoe.platform.jobs.job_events import CancelAsked, JobError
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError

NIGHTLY = ("--cron", "0 20 * * *", "--timezone", "Europe/Berlin")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own; commands run in another folder, which must not matter later."""
    monkeypatch.setenv("OPENMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def schedule(*arguments):
    """What the command prints; errors are raised, as they are before `cli.main` shows them."""
    result = CliRunner().invoke(cli_schedule.app, arguments, catch_exceptions=False, standalone_mode=False)
    return result.stdout


def store(home):
    return JobStore(home / "controller.db")


def test_a_schedule_is_added_with_its_run_resolved_and_its_next_three_firings_shown(home, tmp_path):
    said = schedule("add", "quickstart", "train.steps=200", *NIGHTLY, "--window", "10h").splitlines()
    added = store(home).schedule("quickstart")
    fires = [fire_s for fire_s, _ in zip(cron.firings(added, added.last_fired_s), range(3), strict=False)]
    assert said[0] == "quickstart: run quickstart on cluster local, fires at"
    assert [line.split()[-3:] for line in said[1:4]] == [
        [*f"{datetime.fromtimestamp(fire_s, UTC):%Y-%m-%d %H:%M}".split(), "UTC"] for fire_s in fires
    ]
    assert all(" 20:00 CE" in line for line in said[1:4])
    assert said[4].startswith("no controller runs here, so nothing starts yet; start one: openmoe controller run")
    (tmp_path / "resolved.yaml").write_text(added.run_file)
    run = spec.load(str(tmp_path / "resolved.yaml"))
    assert (run.train.steps, run.run_dir) == (200, f"{tmp_path}/here/openmoe-runs/quickstart")
    assert all(path.startswith("/") for source in run.data.sources for path in source.paths)
    assert (added.cluster, added.slots, added.window_s, added.overlap, added.catch_up) == (
        "local",
        1,
        36_000.0,
        "skip",
        "none",
    )
    assert "provider: twin" in added.cluster_file


def test_a_local_run_directory_of_a_cluster_elsewhere_is_warned_of_as_submit_does(home, tmp_path):
    said = schedule("add", "quickstart", *NIGHTLY, "--cluster", "http://127.0.0.1:1").splitlines()
    assert said[4] == (
        f"run_dir: {tmp_path}/here/openmoe-runs/quickstart must be one folder for all hosts of that cluster, "
        "on a shared disk; or give gs://"
    )


def test_the_environment_and_its_secrets_never_reach_the_database(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush-hush-hush")
    schedule("add", "quickstart", *NIGHTLY, "--cluster", "http://head:8265")
    schedule("run-now", "quickstart")
    with pytest.raises(JobError, match="an address carries no user, password or token; set RAY_AUTH_TOKEN"):
        schedule("add", "quickstart", *NIGHTLY, "--name", "b", "--cluster", "http://me:hush-hush-hush@head:8265")
    for file in home.iterdir():
        assert b"hush-hush-hush" not in file.read_bytes()


def test_the_list_shows_the_next_firing_in_local_time_and_utc(home):
    assert "no schedules; `openmoe schedule add RUN" in schedule("list")
    schedule(
        "add",
        "quickstart",
        "--cron",
        "30 6 1 1 *",
        "--timezone",
        "America/New_York",
        "--name",
        "new-year",
        "--window",
        "90m",
    )
    [listed] = json.loads(schedule("list", "--json"))
    now = datetime.now(UTC)
    year = now.year + (now >= datetime(now.year, 1, 1, 11, 30, tzinfo=UTC))
    assert listed["next"][0]["local"].endswith(f"{year}-01-01 06:30 EST")
    assert listed["next"][0]["utc"] == f"{year}-01-01 11:30 UTC"
    assert listed["next"][0]["unix_s"] == datetime(year, 1, 1, 11, 30, tzinfo=UTC).timestamp()
    assert "run_file" not in listed
    for part in (
        "new-year",
        "30 6 1 1 *",
        "skip, catch up none, 1h30m",
        f"{year}-01-01 06:30 EST",
        f"{year}-01-01 11:30 UTC",
    ):
        assert part in schedule("list")


def test_a_time_zone_that_this_machine_lacks_is_told_of_its_schedule_and_hides_no_other(home):
    schedule("add", "quickstart", *NIGHTLY)
    elsewhere = replace(store(home).schedule("quickstart"), timezone="Mars/Olympus")
    store(home).apply_all([cron.ScheduleAdded(schedule="elsewhere", time_s=1.0, definition=elsewhere)])
    first, second = json.loads(schedule("list", "--json"))
    assert (first["next"], second["problem"], len(second["next"])) == ([], "", 3)
    assert first["problem"].startswith("timezone 'Mars/Olympus': unknown; ")
    assert first["problem"] in schedule("list")


def test_run_now_submits_a_job_and_obeys_the_overlap_policy(home):
    schedule("add", "quickstart", *NIGHTLY, "--window", "1h")
    first = json.loads(schedule("run-now", "quickstart", "--json"))["job"]
    there = store(home).job(first)
    assert (there.state, there.schedule, there.stop_at_s) == ("queued", "quickstart", there.submitted_s + 3_600)
    with pytest.raises(ScheduleError) as caught:
        schedule("run-now", "quickstart")
    assert str(caught.value) == (
        f"schedule quickstart: {first} is still queued, and overlap is skip; `openmoe jobs cancel` it first, or wait"
    )
    store(home).apply(CancelAsked(job_id=first, time_s=there.submitted_s))
    assert "is queued for cluster local" in schedule("run-now", "quickstart")


def test_run_now_replaces_when_the_schedule_says_so(home):
    schedule("add", "quickstart", *NIGHTLY, "--overlap", "replace")
    first = json.loads(schedule("run-now", "quickstart", "--json"))["job"]
    second = json.loads(schedule("run-now", "quickstart", "--json"))
    assert second["replaces"] == [first]
    assert store(home).job(first).reason == f"replaced by {second['job']}, the next firing of schedule quickstart"


def test_a_paused_schedule_says_so_and_a_removed_one_leaves_its_jobs(home):
    schedule("add", "quickstart", *NIGHTLY)
    job_id = json.loads(schedule("run-now", "quickstart", "--json"))["job"]
    assert "quickstart is paused" in schedule("pause", "quickstart")
    assert json.loads(schedule("list", "--json"))[0]["next"] == []
    assert "paused" in schedule("list")
    assert "quickstart fires next at" in schedule("resume", "quickstart")
    assert schedule("remove", "quickstart") == f"quickstart is removed; still there: {job_id}\n"
    assert store(home).schedules() == {}


def test_each_change_prints_the_schedule_as_json(home):
    once_a_year = ("--cron", "30 6 1 1 *", "--timezone", "UTC")
    added = json.loads(schedule("add", "quickstart", *once_a_year, "--window", "1h", "--json"))
    wanted = {"name": "quickstart", "run_name": "quickstart", "cron": "30 6 1 1 *", "timezone": "UTC"}
    wanted |= {"cluster": "local", "slots": 1, "overlap": "skip", "catch_up": "none", "window_s": 3600.0}
    assert {key: added[key] for key in wanted} == wanted
    assert (added["paused"], [fire["utc"][4:] for fire in added["next"]]) == (False, ["-01-01 06:30 UTC"] * 3)
    assert json.loads(schedule("pause", "quickstart", "--json")) == added | {"paused": True, "next": []}
    resumed = json.loads(schedule("resume", "quickstart", "--json"))
    assert resumed == added | {"last_fired_s": store(home).schedule("quickstart").last_fired_s}
    assert [resumed] == json.loads(schedule("list", "--json"))
    job_id = json.loads(schedule("run-now", "quickstart", "--json"))["job"]
    removed = json.loads(schedule("remove", "quickstart", "--json"))
    assert removed == {"removed": "quickstart", "jobs_not_done": [job_id]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["add", "quikstart", *NIGHTLY], SpecError, "quikstart: no run file of this name is shipped; did you mean"),
        (["add", "quickstart", "train.stps=2", *NIGHTLY], SpecError, "override: train.stps: unknown key; did you me"),
        (["add", "quickstart", "--cron", "0 25 * * *", "--timezone", "UTC"], ScheduleError, "cron '0 25 * * *': bad "),
        (["add", "quickstart", "--cron", "0 20 * * *", "--timezone", "Berlin"], ScheduleError, "did you mean `Europe"),
        (["add", "quickstart", *NIGHTLY, "--window", "10"], ScheduleError, "window: expected a duration such as 10h"),
        (["add", "quickstart", *NIGHTLY, "--name", "a b"], ScheduleError, "name 'a b': letters, digits, . _ -"),
        (["add", "quickstart", *NIGHTLY, "--cluster", "gcp-tpu-v4-128-spot"], JobError, "is of provider gcp, which"),
        (["remove", "nightly"], ScheduleError, "schedule 'nightly': there is none of this name; there are none yet"),
        (["run-now", "nightly"], ScheduleError, "schedule 'nightly': there is none of this name"),
        (["pause", "nightly"], ScheduleError, "schedule 'nightly': there is none of this name"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_scheduled(home, arguments, error, message):
    with pytest.raises(error) as caught:
        schedule(*arguments)
    assert message in str(caught.value)
    home.mkdir(exist_ok=True)
    assert store(home).version() == 0


def test_a_run_that_can_never_fit_its_cluster_is_refused_now(home):
    tpu = ["cluster.accelerator=tpu", "cluster.topology=2x2x1", "cluster.accelerator_type=TPU-V4"]
    with pytest.raises(SpecError, match=r"cluster\.topology: '2x2x1' is not what cluster local has; write 2x2x2"):
        schedule("add", "quickstart", *tpu, *NIGHTLY, "--cluster", "local")


def test_the_real_command_ends_in_one_line_and_exit_code_2(home):
    schedule("add", "quickstart", *NIGHTLY)
    command = [sys.executable, "-m", "openmoe.platform", "schedule", "add", "quickstart", *NIGHTLY]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "schedule quickstart: there is one of this name; "
        "`openmoe schedule remove quickstart` first, or choose another --name\n"
    )
