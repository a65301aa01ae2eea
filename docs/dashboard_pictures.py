"""Takes the README's pictures of the dashboard: docs/dashboard.png and docs/dashboard-overview.png.

    .venv/bin/python docs/dashboard_pictures.py RUN_DIR [RUN_DIR_OR_FOLDER ...]

The first is the page of RUN_DIR, the second the page of all. Needs chromium-headless-shell; $OPENMOE_HOME says whose
jobs and clusters are shown.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from openmoe.platform.dashboard.watch import absolute, key_of

DOCS = Path(__file__).parent
WIDTH = 1180


def main(run_dir: str, *folders: str) -> None:
    """Starts the dashboard and a browser, and writes the pictures."""
    command = [sys.executable, "-m", "openmoe.platform", "dashboard", run_dir, *folders, "--port", "0"]
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
        page.goto(f"{address}runs/{key_of(absolute(run_dir))}")
        expect(page.locator("#loss canvas")).to_be_visible(timeout=60_000)
        expect(page.locator("#status")).not_to_contain_text("is being read", timeout=600_000)
        page.wait_for_timeout(1000)
        end = page.locator("#load").bounding_box()
        assert end is not None
        height = round(end["y"] + end["height"] + 16)
        page.set_viewport_size({"width": WIDTH, "height": height})
        page.wait_for_timeout(500)
        page.screenshot(path=DOCS / "dashboard.png")
        browser.close()
        dashboard.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
