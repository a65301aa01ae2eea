"""The pages in a real browser: drawn, live, by keyboard, narrow, dark, and deaf to what runs write."""

import os
import re
import time

import pytest
from playwright.sync_api import expect

from openmoe.clusters import processes, provider, ray_start
from openmoe.clusters.spec import ClusterSpec
from openmoe.clusters.twin_state import Cluster, Node
from openmoe.platform.dashboard import summary
from openmoe.platform.dashboard.watch import key_of
from openmoe.platform.jobs.cron import Schedule, ScheduleAdded, ScheduleFired, SchedulePaused
from openmoe.platform.jobs.job_events import Admitted, CancelAsked, Submitted
from openmoe.platform.jobs.job_store import JobStore
from openmoe.platform.run_file import spec

INK = """canvas => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3]) colours.add(pixels.slice(i, i + 4).join());
  return colours.size;
}"""
PIXELS = """(canvas, points) => {
  const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return points.map(([x, y]) => [...data.slice(4 * (y * width + x), 4 * (y * width + x) + 3)]);
}"""
HOSTILE = """<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>'"${1}"""


@pytest.fixture
def begin(served):
    """Begins a run that the dashboard shows."""
    return served[2]


@pytest.fixture
def open_run(served, browse):
    """Opens the page of a run, and waits until it is drawn."""

    def open_page(run, **options):
        page = browse(f"{served[0]}/runs/{key_of(run.dir.path)}?token={served[1]}", **options)
        expect(page.locator("#live")).to_have_text("live")
        return page

    return open_page


def test_a_run_is_drawn_as_its_records_say(begin, open_run):
    page = open_run(begin("drawn").with_two_interruptions())
    assert "token" not in page.url
    expect(page.locator("#status")).to_contain_text("60% · 60 of 100 steps")
    expect(page.locator(".tile dd").first).to_have_text("8.400")
    expect(page.locator("#loss .readout")).to_contain_text("step 60 · 8.400 nats")
    expect(page.locator("#loss .plot")).to_have_attribute("data-points", "60")
    assert page.locator("#loss canvas").evaluate(INK) > 20
    for heading in ("How fast?", "Are experts too full?", "Do all routers choose?", "Is it stable?"):
        chart = page.locator(".chart", has=page.get_by_role("heading", name=heading))
        assert chart.locator("canvas").evaluate(INK) > 10
    rows = page.locator("#timeline tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.nth(2)).to_contain_text("1 to 40, 20 trained again")
    expect(rows.nth(2)).to_contain_text("host fault")
    expect(rows.nth(1)).to_contain_text("no verdict")
    expect(page.locator("#story li").last).to_contain_text("incarnation 1 starts from scratch")
    expect(page.locator("#facts")).to_contain_text("4 x cpu, 2 processes")
    expect(page.locator("#account")).to_contain_text("60.0% of held capacity went into steps")
    expect(page.locator("#account .spent i")).to_have_count(4)
    page.get_by_text("each start, until its first new step").click()
    expect(page.locator("#account [data-key=restarts] tr")).to_have_count(3)


def test_each_moe_layer_has_a_heat_map_with_a_row_an_expert_and_a_column_a_step(begin, open_run):
    run = begin("heat")
    run.claim()
    run.train(20)
    page = open_run(run)
    maps = page.locator("#load .load canvas")
    expect(maps).to_have_count(2)
    assert maps.nth(1).evaluate("canvas => [canvas.width, canvas.height]") == [20, 4]
    assert maps.nth(0).evaluate(PIXELS, [[0, 0]]) == [[0xF3, 0xF4, 0xF6]]  # an even share
    assert maps.nth(1).evaluate(PIXELS, [[7, 1], [7, 2]]) == [
        [0x1D, 0x4F, 0x9F],
        [0xB4, 0x53, 0x09],
    ]  # twice that; none
    expect(page.locator("#load .legend")).to_contain_text("nobody asks")


def test_what_happens_appears_without_reloading(begin, open_run):
    run = begin("live")
    run.claim()
    run.train(5)
    page = open_run(run)
    page.evaluate("window.untouched = true")
    expect(page.locator("#loss .plot")).to_have_attribute("data-points", "5")
    run.train(3)
    expect(page.locator("#loss .plot")).to_have_attribute("data-points", "8", timeout=15_000)
    expect(page.locator(".tile dd").first).to_have_text("8.920")
    assert page.locator("#load .load canvas").first.evaluate("canvas => canvas.width") == 8
    run.accept()
    run.end(cause="preemption", reason="slice-a was preempted")
    expect(page.locator("#timeline tbody tr").first).to_contain_text("preemption", timeout=15_000)
    run.claim()
    run.train(2)
    expect(page.locator("#timeline tbody tr")).to_have_count(2, timeout=15_000)
    expect(page.locator("#loss .plot")).to_have_attribute("data-points", "10", timeout=15_000)
    run.finish()
    expect(page.locator("#state")).to_have_text("finished", timeout=15_000)
    expect(page.locator("#loss .readout")).to_contain_text("unigram entropy 6.500")
    assert page.evaluate("window.untouched") is True


def test_marks_tell_their_cause_on_both_axes(begin, open_run):
    page = open_run(begin("marks").with_two_interruptions())
    for axis, share in (("by step", (40 - 1) / (60 - 1)), ("by time", (1040 - 1001) / (1130 - 1001))):
        page.get_by_role("button", name=axis).click()
        over = page.locator("#loss .u-over")
        box = over.bounding_box()
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 60)
        expect(page.locator("#loss .tip")).to_contain_text("host fault: incarnation 1 ended")
        expect(page.locator("#loss .tip")).to_contain_text("the process of rank 1 died")
        page.mouse.move(0, 0)
        expect(page.locator("#loss .tip")).to_be_hidden()
    page.get_by_role("button", name="by step").click()
    box = page.locator("#loss .u-over").bounding_box()
    page.mouse.move(box["x"] + (31 - 1) / (60 - 1) * box["width"], box["y"] + 60)
    expect(page.locator("#loss .tip")).to_contain_text("stage 2 begins")
    expect(page.locator("#loss .tip")).to_contain_text("c4 25%, the_stack 75%")


def test_everything_can_be_reached_by_keyboard(begin, open_run):
    page = open_run(begin("keys").with_two_interruptions())
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.closest('section[id], a[id]')?.id + ' ' + document.activeElement.tagName"
            )
        )
    for stop in ("home A", "loss BUTTON", "loss DIV", "timeline BUTTON", "timeline SUMMARY", "load CANVAS", "story OL",
                 "facts SUMMARY"):  # fmt: skip
        assert stop in reached, reached
    page.locator("#loss .plot").focus()
    page.keyboard.press("Home")
    expect(page.locator("#loss .readout")).to_contain_text("step 1 · 8.990 nats")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#loss .readout")).to_contain_text("step 2 · 8.980 nats")
    page.locator("#load canvas[tabindex]").nth(1).focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#load .load").nth(1)).to_contain_text("expert 1, step 60: 2.00x of an even share, 50.0%")
    page.locator("#timeline .track button").last.focus()
    page.keyboard.press("ArrowLeft")
    assert "its driver was gone" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.get_by_role("button", name="by time").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="by time")).to_have_attribute("aria-pressed", "true")


def hostile(run):
    run.claim()
    run.event("placed", hosts=[HOSTILE])
    run.train(3)
    run.event("raised", error=HOSTILE)
    run.end(reason=HOSTILE, trace=HOSTILE, evidence=(HOSTILE,), cause=HOSTILE)
    run.claim()
    run.train(3)
    run.event("sampled", step=3, samples=[[HOSTILE, HOSTILE]])
    path = run.dir.at("run.json")
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace('"name": "quickstart"', '"name": "' + HOSTILE.replace('"', '\\"') + '"'))
    return run


def assert_harmless(page):
    for part in ("#name", "#timeline", "#story", "#samples"):
        expect(page.locator(part)).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_what_a_run_writes_is_text_and_never_runs(begin, open_run, served):
    page = open_run(hostile(begin("hostile")))
    assert_harmless(page)
    page.locator("#home").click()
    expect(page.locator("#page")).to_contain_text(HOSTILE)
    assert page.evaluate("window.hacked") is None


def test_the_overview_lists_runs_and_leads_to_them(begin, served, browse):
    begin("listed").with_two_interruptions()
    page = browse(f"{served[0]}/?token={served[1]}")
    row = page.locator("tr", has_text=re.compile("/listed"))
    expect(row).to_contain_text("60% · 60 / 100", timeout=15_000)
    expect(page.locator("#page")).to_contain_text("No controller has run on this machine. openmoe up starts")
    row.get_by_role("link").click()
    expect(page.locator("#status")).to_contain_text("60 of 100 steps")


def write_jobs(home, run_dir):
    """Schedules: one started a job, one has hostile words, one a zone that is none; and a hostile job, cancelled."""
    wanted = {"run_dir": run_dir, "run_file": "name: night\n", "cluster": "small", "cluster_file": "", "slots": 1}
    wanted |= {"budgets": {"preemption": 9}}
    clock = {"cron": "30 6 1 1 *", "timezone": "UTC", "run_name": "night"}
    now = {"time_s": time.time()}
    fired = {"fire_s": now["time_s"], **now}
    events = [
        ScheduleAdded(schedule=name, definition=Schedule(name=name, **clock, **wanted), **now)
        for name in ("nightly", HOSTILE)
    ]
    nowhere = Schedule(name="nowhere", **clock | {"timezone": "Mars/Olympus"}, **wanted)
    events.append(ScheduleAdded(schedule="nowhere", definition=nowhere, **now))
    events += [
        ScheduleFired(schedule="nightly", job_id="night-ab12", **fired),
        Submitted(job_id="night-ab12", name="night", schedule="nightly", **wanted, **now),
        Admitted(job_id="night-ab12", **now),
        ScheduleFired(schedule=HOSTILE, skipped=HOSTILE, **fired),
        SchedulePaused(schedule=HOSTILE, **now),
        Submitted(job_id=HOSTILE, name=HOSTILE, **wanted | {"run_dir": f"{run_dir}-2"}, **now),
        CancelAsked(job_id=HOSTILE, why=HOSTILE, **now),
    ]
    home.mkdir()
    store = JobStore(home / "controller.db")
    store.apply_all(events)
    store.close()


def write_clusters(home):
    """A cluster without one of its slices, this process standing for all others of it; and a damaged hostile one."""
    hostile_dir, state_dir = home / "clusters" / HOSTILE.partition("</")[0], home / "clusters" / "small"
    hostile_dir.mkdir(parents=True)
    (hostile_dir / "cluster.json").write_text("{}")
    state_dir.mkdir()
    settings = ClusterSpec(name="small", provider="twin", accelerator="v4", topology="2x2x2", slices=2)
    address = {"ip": "127.71.3.1", "gcs_address": "127.71.3.1:20001", "dashboard_url": "http://127.0.0.1:20002"}
    cluster = Cluster(state_dir=state_dir, spec=settings, temp_dir=home / "openmoe-abc", **address)
    cluster.save()
    hosts = ray_start.planned(settings, "127.71.3")
    provider.write(state_dir, hosts)
    provider.set_state(state_dir, hosts[:2], "RUNNING", 5.0)
    provider.set_state(state_dir, hosts[2:], "PREEMPTED", 5.0)
    for name in ("head", "slice-a-0", "slice-a-1"):
        this = processes.identify(os.getpid())
        cluster.save_node(Node(name=name, mark=cluster.new_mark(name), node_id="ab", processes=(this,)))


def test_jobs_schedules_and_clusters_are_shown(written, start_dashboard, browse, tmp_path):
    run = written("night").with_two_interruptions()
    write_jobs(tmp_path / "home", run.dir.path)
    write_clusters(tmp_path / "home")
    address, token = start_dashboard(tmp_path / "runs", tmp_path / "home")
    page = browse(f"{address}/?token={token}")

    def shows(heading, *rows):
        section = page.locator("section", has=page.get_by_role("heading", name=heading))
        expect(section.locator("tbody tr")).to_have_count(len(rows), timeout=15_000)
        for number, cells in enumerate(rows):
            expect(section.locator("tbody tr").nth(number).locator("td")).to_have_text(cells)

    ago, soon = re.compile("ago|just now"), re.compile(", in ")
    shows(
        "What is asked for?",
        [HOSTILE, "cancelled", "", "", "small", HOSTILE, ago],
        ["night-ab12schedule nightly", "starting", "60 / 100", "1", "small", "", ago],
    )
    shows(
        "What starts by the clock?",
        ["nightly", "night", "30 6 1 1 * (UTC)", soon, "night-ab12"],
        [HOSTILE, "night", "30 6 1 1 * (UTC)", "paused", f"skipped: {HOSTILE}"],
        ["nowhere", "night", "30 6 1 1 * (Mars/Olympus)", re.compile("timezone 'Mars/Olympus': unknown; "), ""],
    )
    shows(
        "Where can it run?",
        [HOSTILE.partition("</")[0], "", re.compile("<img src=x .* not what this version writes"), ""],
        ["small", "twin", "ready", "slice-a (2 hosts) readyslice-b (2 hosts) preempted"],
    )
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None
    page.get_by_role("link", name="night-ab12").click()
    expect(page.locator("#status")).to_contain_text("60 of 100 steps")
    expect(page.locator("#story")).to_contain_text("attempt 1 starts")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_scrolls_down_only_in_light_and_dark(begin, open_run, scheme):
    run = begin(f"narrow-{scheme}").with_two_interruptions()
    page = open_run(run, viewport={"width": 800, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 800
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (max(brightness) < 60) == (scheme == "dark")


def test_without_the_token_the_page_is_one_line(served, chromium):
    page = chromium.new_page()
    page.goto(served[0])
    assert page.locator("body").inner_text().startswith("401: open the address with ?token=...")
    page.close()


def test_a_run_without_steps_says_what_it_waits_for(begin, open_run):
    page = open_run(begin("empty"))
    expect(page.locator("#status")).to_contain_text("its data is being built, or the command has ended")
    expect(page.locator("#loss")).to_contain_text("the first point comes with the first step")
    expect(page.locator("#timeline")).to_contain_text("No worker group has started yet.")


def test_the_summary_page_needs_no_server(written, browse, tmp_path):
    run = hostile(written("summary"))
    page_file = tmp_path / "summary.html"
    lines = ["3 steps", f"  sample {HOSTILE}"]
    page_file.write_text(summary.render(spec.load("quickstart"), run.dir, lines, 6.5))
    page = browse(f"file://{page_file}")
    expect(page.locator("#state")).to_have_text("finished")
    expect(page.locator("#loss .readout")).to_contain_text("step 3 · 8.970 nats")
    expect(page.locator("#loss .readout")).to_contain_text("unigram entropy 6.500")
    assert page.locator("#loss canvas").evaluate(INK) > 20
    expect(page.locator("#load .load canvas")).to_have_count(2)
    expect(page.locator("#facts")).to_contain_text("3 steps")
    assert_harmless(page)
