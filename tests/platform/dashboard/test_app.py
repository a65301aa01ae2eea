"""The application as programs see it: who gets in, what every answer carries, what the JSON says."""

import asyncio
import json
import math
import subprocess
import sys
import time

import httpx
import pytest

from openmoe.platform.dashboard import app, server
from openmoe.platform.dashboard.follow import RunFollower
from openmoe.platform.dashboard.watch import Watch, WatchedRun, key_of

TOKEN = "a-token"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pytest.fixture
def ask(tmp_path):
    """Returns a function that sends one request to the application over tmp_path/runs."""

    def get(path, method="GET", host="127.0.0.1:8421", **headers):
        hosts = server.host_names("127.0.0.1")
        served = app.create(Watch([str(tmp_path / "runs")], tmp_path / "home"), token=TOKEN, port=8421, hosts=hosts)

        async def send():
            transport = httpx.ASGITransport(served)
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                names = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, headers=names, follow_redirects=False)

        return asyncio.run(send())

    return get


BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "path", ["/", "/runs/x", "/api/overview", "/api/overview/events", "/static/run.js", "/nothing"]
)
@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}, {"cookie": b"openmoe-8421=\xe9"}],
)
def test_without_the_token_there_is_one_line_and_nothing_else(ask, written, path, headers):
    answer = ask(path, **headers)
    assert (answer.status_code, answer.text.count("\n")) == (401, 1)
    assert answer.text.startswith("401: open the address with ?token=... that `openmoe dashboard` printed")


def test_the_token_in_the_address_becomes_a_cookie_that_no_script_reads_and_leaves_the_address(ask, written):
    answer = ask(f"/runs/abc?token={TOKEN}&x=1")
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/abc?x=1")
    cookie = answer.headers["set-cookie"]
    assert cookie == f"openmoe-8421={TOKEN}; HttpOnly; Path=/; SameSite=strict"
    assert ask("/api/overview", cookie=f"openmoe-8421={TOKEN}; other=1").status_code == 200


@pytest.mark.parametrize("query", ["token=wrong", f"token={TOKEN}x", "token=", f"token={TOKEN}&token=wrong"])
def test_a_wrong_token_in_the_address_is_refused_even_with_a_good_cookie(ask, written, query):
    assert ask(f"/?{query}", cookie=f"openmoe-8421={TOKEN}").status_code == 401


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example/", "///evil.example"])
def test_the_redirect_never_leads_elsewhere(ask, written, path):
    location = ask(f"http://127.0.0.1:8421{path}?token={TOKEN}").headers["location"]
    assert location.startswith("/")
    assert location[1] not in "/\\"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8421", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_another_host_name_is_refused_before_anything_else(ask, written, host):
    assert ask("/", host=host, **BEARER).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1:8421", "localhost:9999", "LOCALHOST", "[::1]:8421"])
def test_names_of_this_machine_are_served_on_any_port_since_tunnels_change_it(ask, written, host):
    assert ask("/", host=host, **BEARER).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_reading_is_answered(ask, written, method):
    assert ask("/api/overview", method=method, **BEARER).status_code == 405


@pytest.mark.parametrize(
    "path", ["/", "/api/overview", "/static/run.js", "/runs/unknown", "/missing", f"/?token={TOKEN}"]
)
def test_every_answer_is_guarded(ask, written, path):
    for headers in ({}, BEARER):
        answer = ask(path, **headers).headers
        assert answer["content-security-policy"] == CSP
        assert (answer["x-content-type-options"], answer["referrer-policy"]) == ("nosniff", "no-referrer")
        assert (answer["cache-control"], answer["cross-origin-opener-policy"]) == ("no-store", "same-origin")


TRAVERSALS = [
    "../app.py",
    "..%2fapp.py",
    "%2e%2e/app.py",
    "..%5capp.py",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "static/../../gate.py",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leads_out_of_the_static_files_or_to_a_run(ask, written, path):
    run = written()
    for before in ("/static/", "/runs/", "/api/runs/"):
        answer = ask(f"http://127.0.0.1:8421{before}{path}", **BEARER)
        assert answer.status_code == 404
        assert "root:" not in answer.text
    for name in (run.dir.path, "a", run.dir.path.replace("/", "%2f")):
        assert ask(f"/api/runs/{name}", **BEARER).status_code == 404


def test_runs_are_shown_without_the_jobs_when_the_database_of_jobs_cannot_be_read(ask, written, tmp_path):
    run = written().with_two_interruptions()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "controller.db").write_text("no database")
    overview = ask("/api/overview", **BEARER).json()
    assert [row["step"] for row in overview["runs"]] == [60]
    assert overview["jobs_problem"] == (
        f"{tmp_path}/home/controller.db: the database of jobs cannot be used: file is not a database"
    )
    assert ask(f"/api/runs/{key_of(run.dir.path)}", **BEARER).json()["jobs"] == []


def test_a_run_that_ended_without_a_finite_loss_is_shown_beside_the_others(ask, written):
    for name in ("a", "b"):
        run = written(name)
        run.claim()
        run.train(3)
    run.finish(loss=math.nan, unigram_entropy=math.inf)
    rows = {row["state"]: row for row in ask("/api/overview", **BEARER).json()["runs"]}
    assert (rows["finished"]["final_loss"], rows["finished"]["unigram_entropy"]) == (None, None)
    assert ask(f"/api/runs/{key_of(run.dir.path)}", **BEARER).json()["figures"]["final_loss"] is None


def test_runs_are_listed_and_each_has_its_snapshot(ask, written):
    run = written().with_two_interruptions()
    overview = ask("/api/overview", **BEARER).json()
    [row] = overview["runs"]
    assert (row["name"], row["step"], row["key"], len(row["spark"])) == ("quickstart", 60, key_of(run.dir.path), 60)
    assert (overview["controller"], overview["jobs"], overview["clusters"], overview["unlisted"]) == (False, [], [], {})
    snapshot = ask(f"/api/runs/{row['key']}", **BEARER).json()
    assert snapshot["cursor"] == "1000.000-3-1:60"
    assert snapshot["curves"]["line"]["step"] == list(range(1, 61))
    assert snapshot["curves"]["line"]["text_loss"]["mean"][-1] == pytest.approx(8.4)
    assert snapshot["curves"]["undone"]["step"] == [*range(21, 41), *range(51, 61)]
    assert snapshot["load"]["columns"][0] == [0, [[100, 100, 100, 100], [200, 200, 0, 0]]]
    assert [i["number"] for i in snapshot["history"]["incarnations"]] == [1, 2, 3]


def test_a_visitor_who_leaves_lets_nobody_in_while_files_are_still_being_read(written):
    watched = WatchedRun("key", RunFollower(written().dir))
    inside, most = [], []

    def slow(run):
        inside.append(run)
        most.append(len(inside))
        time.sleep(0.3)
        inside.pop()

    async def leave_and_come():
        first = asyncio.create_task(watched.read(slow))
        while not inside:
            await asyncio.sleep(0.01)
        first.cancel()
        await watched.read(slow)

    asyncio.run(leave_and_come())
    assert most == [1, 1]


def test_an_empty_machine_has_an_empty_overview(ask, written):
    overview = ask("/api/overview", **BEARER).json()
    assert (overview["runs"], overview["jobs"]) == ([], [])


def test_one_damaged_run_is_named_and_hides_no_other(ask, written, tmp_path):
    written("good").claim()
    for name, text in (("torn", "{"), ("of_another_version", '{"format": 9}'), ("a_list", "[]")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "run.json").write_text(text)
    rows = {row["path"].rpartition("/")[2]: row for row in ask("/api/overview", **BEARER).json()["runs"]}
    assert rows["good"]["state"] == "silent"
    assert rows["torn"]["problem"].endswith("the run directory is damaged")
    assert rows["of_another_version"]["problem"].endswith("run.json: not of format 1, which this version reads")
    for row in rows.values():
        assert ask(f"/api/runs/{row['key']}", **BEARER).status_code == 200


def test_the_jobs_of_the_controller_bring_their_runs_along(ask, written, tmp_path):
    from openmoe.platform.jobs.job_events import Admitted, Submitted
    from openmoe.platform.jobs.job_store import JobStore

    run = written("elsewhere")
    moved = tmp_path / "moved"
    (tmp_path / "runs" / "elsewhere").rename(moved)
    (tmp_path / "home").mkdir()
    store = JobStore(tmp_path / "home" / "controller.db")
    facts = {"run_file": "secret: 1", "cluster": "local", "cluster_file": "", "slots": 1, "budgets": {}}
    job_id = store.new_id("quickstart")
    store.apply(Submitted(job_id=job_id, time_s=1.0, name="quickstart", run_dir=str(moved), **facts))
    store.apply(Admitted(job_id=job_id, time_s=2.0))
    overview = ask("/api/overview", **BEARER).json()
    [job], [row] = overview["jobs"], overview["runs"]
    assert (job["id"], job["state"], job["attempt"], job["run"]) == (job_id, "starting", 1, row["key"])
    snapshot = ask(f"/api/runs/{row['key']}", **BEARER).json()
    assert [job["id"] for job in snapshot["jobs"]] == [job_id]
    assert snapshot["history"]["story"][0]["text"] == "submitted: run quickstart for cluster local"
    assert "secret" not in json.dumps([overview, snapshot])
    assert run.dir.path not in json.dumps(overview)


def test_the_server_starts_without_ray_and_jax():
    code = (
        "import sys; from openmoe.platform.commands import cli_dashboard;"
        "from openmoe.platform.dashboard import server, summary;"
        "print([m for m in ('jax', 'ray', 'pyarrow', 'fsspec', 'flax', 'orbax') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
