"""Takes the README's pictures: docs/dashboard.png, docs/dashboard-overview.png and docs/summary.png.

    .venv/bin/python docs/dashboard_pictures.py LIVE_RUN FINISHED_RUN

The pages of LIVE_RUN and of all runs, as `openmoe dashboard` shows them, and summary.html of FINISHED_RUN. Needs
chromium-headless-shell; $OPENMOE_HOME says whose jobs and clusters are shown.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from openmoe.platform.dashboard.watch import absolute, key_of

DOCS = Path(__file__).parent
WIDTH = 1280


def main(live_run: str, finished_run: str) -> None:
    """Starts the dashboard and a browser, and writes the pictures."""
    command = [sys.executable, "-m", "openmoe.platform", "dashboard", live_run, finished_run, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dashboard, sync_playwright() as playwright:
        assert dashboard.stdout is not None
        address, _, query = dashboard.stdout.readline().split()[1].partition("?")
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium-headless-shell"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 400}, color_scheme="light")
        page.goto(f"{address}?{query}")
        expect(page.locator("tbody tr").first).to_be_visible(timeout=60_000)
        page.wait_for_timeout(2000)
        page.screenshot(path=DOCS / "dashboard-overview.png", full_page=True)
        page.goto(f"{address}runs/{key_of(absolute(live_run))}")
        expect(page.locator("#status")).not_to_contain_text("is being read", timeout=600_000)
        picture_of_run(page, "dashboard.png")
        page.goto(f"file://{absolute(finished_run)}/summary.html")
        picture_of_run(page, "summary.png")
        browser.close()
        dashboard.terminate()


def picture_of_run(page: Page, name: str) -> None:
    """Pictures the page of a run down to its heat maps."""
    expect(page.locator("#loss canvas")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(1000)
    end = page.locator("#load").bounding_box()
    assert end is not None
    page.set_viewport_size({"width": WIDTH, "height": round(end["y"] + end["height"] + 16)})
    page.wait_for_timeout(500)
    page.screenshot(path=DOCS / name)
    page.set_viewport_size({"width": WIDTH, "height": 400})


if __name__ == "__main__":
    main(*sys.argv[1:])
