"""A real run watched in a real browser, from its first step through a killed worker to its end."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

COLOURS = """canvas => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(new Uint32Array(pixels.buffer)).size;
}"""


def test_a_run_is_seen_live_with_its_incident_and_its_end(lost_worker, start_dashboard, browse, tmp_path):
    run = lost_worker.trainer
    address, token = start_dashboard(Path(run.run_dir).parent, tmp_path / "home")
    page = browse(f"{address}/?token={token}")
    assert next(lost_worker.events) == "saved 1"
    row = page.locator("tr", has_text="/watched")
    expect(row).to_contain_text("training", timeout=30_000)
    row.get_by_role("link").click()
    page.evaluate("window.untouched = true")
    expect(page.locator("#state")).to_have_text("training", timeout=30_000)
    points = page.locator("#loss .plot")
    expect(points).to_have_attribute("data-points", re.compile(r"\d\d"), timeout=30_000)
    drawn = int(points.get_attribute("data-points"))
    assert next(lost_worker.events) == "saved 2"
    expect(points).not_to_have_attribute("data-points", str(drawn), timeout=30_000)

    assert next(lost_worker.events) == "killed"
    ended = page.locator("#timeline tbody tr", has_text="host fault")
    expect(ended).to_contain_text("the process of rank", timeout=60_000)
    assert next(lost_worker.events, "finished") == "finished"
    expect(page.locator("#state")).to_have_text("finished", timeout=30_000)

    last = run.run.trace()[-1]
    expect(points).to_have_attribute("data-points", "60")
    expect(page.locator(".tile dd").first).to_have_text(f"{last['text_loss']:.3f}")
    expect(page.locator("#loss .readout")).to_contain_text(f"step 60 · {last['text_loss']:.3f} nats")
    expect(page.locator("#timeline tbody tr")).to_have_count(2)
    assert page.locator("#loss canvas").evaluate(COLOURS) > 20
    maps = page.locator("#load .load canvas")
    expect(maps).to_have_count(len(last["expert_load"]))
    for layer in range(maps.count()):
        assert maps.nth(layer).evaluate("canvas => [canvas.width, canvas.height]") == [60, 8]
        assert maps.nth(layer).evaluate(COLOURS) > 20
    expect(page.locator("#story")).to_contain_text("finished: 60 steps")
    expect(page.locator("#samples pre")).to_have_count(4)
    assert page.evaluate("window.untouched") is True
    expect(page.locator("#live")).to_have_text("live")

    page = browse(f"file://{run.run_dir}/summary.html")
    expect(page.locator("#loss .readout")).to_contain_text(f"step 60 · {last['text_loss']:.3f} nats")
    expect(page.locator("#facts")).to_contain_text("final loss")
