"""summary.html: the page of a run in one file, without a server, made from the run directory alone."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from openmoe.pipelines import storage
from openmoe.platform.dashboard import views
from openmoe.platform.dashboard.follow import RunFollower
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file.spec import RunSpec

STATIC = Path(__file__).parent / "static"
MODULES = ("format.js", "charts.js", "heatmap.js", "run_page.js", "run.js")  # each after those it imports


def write(spec: RunSpec, run: RunDir, facts: list[str], unigram_entropy: float) -> None:
    """Writes the page into the run directory."""
    storage.write_durable(run.at("summary.html"), render(spec, run, facts, unigram_entropy).encode())


def render(spec: RunSpec, run: RunDir, facts: list[str], unigram_entropy: float) -> str:
    """Returns the live page of a finished run with all that it loads, and what it shows, in place.

    Args:
      spec: of the run.
      run: its directory; that it is finished need not be written there yet.
      facts: lines of its report.
      unigram_entropy: nats, to compare the loss with.
    """
    followed, now_s = RunFollower(run), time.time()
    followed.advance()
    steps = views.figures(followed, "", now_s).step
    followed.finished = {"steps": steps, "time_s": now_s, "unigram_entropy": unigram_entropy}
    return _in_one_file(views.snapshot(followed, "", now_s, result=facts))


def _in_one_file(snapshot: dict[str, object]) -> str:
    page = (STATIC / "run.html").read_text()
    for name in ("uPlot.min.css", "dashboard.css"):
        page = _replaced(page, f'<link rel="stylesheet" href="/static/{name}">', f"<style>{_text(name)}</style>")
    script = f"<script>{_text('uPlot.iife.min.js')}</script>"
    page = _replaced(page, '<script src="/static/uPlot.iife.min.js" defer></script>', script)
    # One module in place of several: what they import from each other is above them in the same file.
    modules = "\n".join(re.sub(r"^import .*;\n|^export ", "", _text(name), flags=re.MULTILINE) for name in MODULES)
    data = json.dumps(snapshot, allow_nan=False).replace("<", "\\u003c")
    carried = (
        f'<script type="application/json" id="snapshot">{data}</script>\n<script type="module">\n{modules}</script>'
    )
    page = _replaced(page, '<script type="module" src="/static/run.js"></script>', carried)
    page = _replaced(page, '<link rel="icon" href="/static/icon.svg">', '<link rel="icon" href="data:,">')
    return _replaced(page, '  <a href="/" id="home">OpenMoE</a>\n', "")


def _text(name: str) -> str:
    return (STATIC / name).read_text()


def _replaced(page: str, part: str, by: str) -> str:
    before, found, after = page.partition(part)
    if not found:
        raise AssertionError(f"run.html: no {part}")
    return before + by + after
