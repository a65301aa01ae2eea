"""Takes the README's pictures of the dashboard: docs/dashboard.png and docs/dashboard-overview.png.

    .venv/bin/python docs/dashboard_pictures.py RUN_DIR [RUN_DIR_OR_FOLDER ...]

The first is the page of RUN_DIR, the second the page of all. Needs chromium-headless-shell; $OPENMOE_HOME says whose
jobs and clusters are shown.
"""

import base64
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect, sync_playwright

from openmoe.platform.dashboard.watch import absolute, key_of

DOCS = Path(__file__).parent
WIDTH = 1280
PIXELS = """async png => {
  const image = await createImageBitmap(await (await fetch("data:image/png;base64," + png)).blob());
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, image.width, image.height);
  let text = "";
  for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.subarray(i, i + 32768));
  return [image.width, image.height, btoa(text)];
}"""


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
        overview = page.screenshot(full_page=True)
        page.goto(f"{address}runs/{key_of(absolute(run_dir))}")
        expect(page.locator("#loss canvas")).to_be_visible(timeout=60_000)
        expect(page.locator("#status")).not_to_contain_text("is being read", timeout=600_000)
        page.wait_for_timeout(1000)
        end = page.locator("#load").bounding_box()
        assert end is not None
        height = round(end["y"] + end["height"] + 16)
        page.set_viewport_size({"width": WIDTH, "height": height})
        page.wait_for_timeout(500)
        of_run = page.screenshot()
        canvas = browser.new_page()
        (DOCS / "dashboard-overview.png").write_bytes(in_few_colours(canvas, overview))
        (DOCS / "dashboard.png").write_bytes(in_few_colours(canvas, of_run))
        browser.close()
        dashboard.terminate()


def in_few_colours(canvas: Page, png: bytes) -> bytes:
    """Returns a picture in 256 of its colours, any other one in the nearest of them: a third of the size."""
    width, height, pixels = canvas.evaluate(PIXELS, base64.b64encode(png).decode())
    rgb = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(-1, 4)[:, :3]
    colours, which, counts = np.unique(rgb, axis=0, return_inverse=True, return_counts=True)
    colours = colours.astype(int)
    palette = list(colours[np.argsort(-counts)[:64]])  # the commonest, then whichever is farthest from all so far
    distances = np.stack([((colours - colour) ** 2).sum(axis=1) for colour in palette])
    while len(palette) < min(256, len(colours)):
        palette.append(colours[distances.min(axis=0).argmax()])
        distances = np.vstack([distances, ((colours - palette[-1]) ** 2).sum(axis=1)])
    nearest = distances.argmin(axis=0).astype(np.uint8)
    rows = np.zeros((height, width + 1), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = nearest[which.reshape(height, width)]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))]
    parts += [
        (b"PLTE", np.asarray(palette, np.uint8).tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    ]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return png[:8] + b"".join(packed)


if __name__ == "__main__":
    main(*sys.argv[1:])
