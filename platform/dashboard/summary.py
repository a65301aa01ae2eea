"""summary.html: one file that shows a run without a server, made from the run directory alone."""

from __future__ import annotations

import html
import importlib.resources
import json
from string import Template
from typing import Any

from openmoe.pipelines import storage
from openmoe.platform.run_dir import RunDir
from openmoe.platform.spec import RunSpec

MAX_POINTS = 2000


def write(spec: RunSpec, run: RunDir, facts: list[str], unigram_entropy: float) -> None:
    """Writes the page into the run directory."""
    storage.write_durable(run.at("summary.html"), render(spec, run, facts, unigram_entropy).encode())


def render(spec: RunSpec, run: RunDir, facts: list[str], unigram_entropy: float) -> str:
    """Returns the page: result, loss curve with its incarnations, expert load by layer over time, samples."""
    trace = run.trace()
    shown = trace[:: -(-len(trace) // MAX_POINTS)]
    static = importlib.resources.files("openmoe.platform.dashboard") / "static"
    data = {
        "step": [r["step"] for r in shown],
        "loss": [r["text_loss"] for r in shown],
        "unigram": unigram_entropy,
        "load": _load_by_layer(shown),
        "starts": [run.step_of(claim.resumes) for claim in run.claims()],
    }
    return Template((static / "summary.html").read_text()).substitute(
        title=html.escape(spec.name),
        facts="\n".join(f"<li>{html.escape(fact.strip())}</li>" for fact in facts),
        css=(static / "uPlot.min.css").read_text(),
        script=(static / "uPlot.iife.min.js").read_text(),
        page=(static / "summary.js").read_text(),
        data=json.dumps(data).replace("<", "\\u003c"),
    )


def _load_by_layer(trace: list[dict[str, Any]]) -> list[list[list[float]]]:
    """Returns [layer][expert][point]: the share of a layer's choices that asked for an expert."""
    if not trace or "expert_load" not in trace[0]:
        return []  # a dense model
    layers, experts = len(trace[0]["expert_load"]), len(trace[0]["expert_load"][0])
    return [[[r["expert_load"][m][e] for r in trace] for e in range(experts)] for m in range(layers)]
