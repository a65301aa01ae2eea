"""The dashboard as an ASGI application: pages, JSON, and server-sent events that go on where a connection broke off.

    /                          /api/overview       /api/overview/events
    /runs/KEY                  /api/runs/KEY       /api/runs/KEY/events?after=CURSOR
    /static/FILE

A snapshot says where it ends ("cursor": the run's layout, and the last step it holds), and so does every event in its
id. A client that comes back with that id gets what is newer, from any server; when the line of truth or the width of
the columns has changed since, it is told to take a new snapshot.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from openmoe.platform.dashboard import views
from openmoe.platform.dashboard.follow import RunFollower
from openmoe.platform.dashboard.gate import LOOPBACK_NAMES, Gate
from openmoe.platform.dashboard.watch import Watch, WatchedRun, digest

STATIC = Path(__file__).parent / "static"
PUSH_EVERY_S = 1.0


def create(watch: Watch, *, token: str | None, port: int, hosts: Iterable[str] = LOOPBACK_NAMES) -> ASGIApp:
    """Returns the application behind its gate.

    Args:
      watch: the runs to show.
      token: what a visitor must know; None for everybody.
      port: it will listen on.
      hosts: names it may be reached by.
    """
    routes = [
        Route("/", overview_page),
        Route("/runs/{key}", run_page),
        Route("/api/overview", overview),
        Route("/api/overview/events", overview_events),
        Route("/api/runs/{key}", run_snapshot),
        Route("/api/runs/{key}/events", run_events),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    app = Starlette(routes=routes)
    app.state.watch = watch
    return Gate(app, token=token, port=port, hosts=hosts)


async def overview_page(request: Request) -> Response:
    """The page of all jobs, clusters and runs."""
    return FileResponse(STATIC / "overview.html")


async def run_page(request: Request) -> Response:
    """The page of one run."""
    found = await _watch(request).run(request.path_params["key"])
    return FileResponse(STATIC / "run.html") if found else _no_such_run()


async def overview(request: Request) -> Response:
    """What the first page shows."""
    return _json({**await _watch(request).overview(), "now_s": time.time()})


async def overview_events(request: Request) -> Response:
    """The first page again whenever it has changed; its id is a digest of what it says."""
    watch = _watch(request)

    async def changes() -> AsyncIterator[ServerSentEvent]:
        seen = request.headers.get("last-event-id", "")
        while True:
            page = await watch.overview()
            if (now := digest(page)) != seen:
                seen = now
                yield ServerSentEvent(_dumps({**page, "now_s": time.time()}), event="update", id=seen)
            await asyncio.sleep(PUSH_EVERY_S)

    return EventSourceResponse(changes())


async def run_snapshot(request: Request) -> Response:
    """All that a run's page shows."""
    watch = _watch(request)
    found = await watch.run(request.path_params["key"])
    return _json(await found.read(snapshot_of(watch, found))) if found else _no_such_run()


async def run_events(request: Request) -> Response:
    """What has become new since the client's cursor."""
    watch = _watch(request)
    found = await watch.run(request.path_params["key"])
    if not found:
        return _no_such_run()
    cursor = request.headers.get("last-event-id") or request.query_params.get("after", "")
    return EventSourceResponse(_run_changes(watch, found, cursor))


async def _run_changes(watch: Watch, found: WatchedRun, cursor: str) -> AsyncIterator[ServerSentEvent]:
    sent: dict[str, Any] = {}
    while True:
        layout, step = _parsed(cursor)
        changed, cursor = await found.read(_changes(watch, found, layout, step, sent))
        if changed is None:
            yield ServerSentEvent("{}", event="reset", id=cursor)
            return
        if changed:
            yield ServerSentEvent(
                _dumps({**changed, "cursor": cursor, "now_s": time.time()}), event="update", id=cursor
            )
        await asyncio.sleep(PUSH_EVERY_S if found.follower.complete else PUSH_EVERY_S / 10)


def snapshot_of(watch: Watch, found: WatchedRun) -> Callable[[RunFollower], dict[str, Any]]:
    """Returns the view of a run that its page starts with."""

    def view(run: RunFollower) -> dict[str, Any]:
        now_s = time.time()
        return {**views.snapshot(run, found.key, now_s, *_of_jobs(watch, run)), "cursor": _cursor(run), "now_s": now_s}

    return view


def _changes(
    watch: Watch, found: WatchedRun, layout: str, step: int, sent: dict[str, Any]
) -> Callable[[RunFollower], tuple[dict[str, Any] | None, str]]:
    """Returns the view of what is new since a cursor; None for a client that must begin anew."""

    def view(run: RunFollower) -> tuple[dict[str, Any] | None, str]:
        cursor = _cursor(run)
        if _parsed(cursor)[0] != layout:
            return None, cursor
        changed: dict[str, Any] = {}
        points = views.newer_points(run, step)
        if points["step"]:
            changed |= {"points": points, "load": views.expert_load(run, step)}
        figures = asdict(views.figures(run, found.key, time.time(), with_period=True))
        if sent.get("figures") != figures:
            changed["figures"] = sent["figures"] = figures
        version = (len(run.events), len(run.claims), run.finished, watch.version())
        if sent.get("version") != version:
            jobs, told = _of_jobs(watch, run)
            changed |= {"history": asdict(views.history(run, told)), "jobs": jobs}
            sent["version"] = version
        return changed, cursor

    return view


def _of_jobs(watch: Watch, run: RunFollower) -> tuple[list[dict[str, Any]], list[Any]]:
    jobs = watch.jobs_of(run.run.path)
    return [asdict(watch.job_view(job)) for job in jobs], watch.story_of_jobs(jobs)


def _cursor(run: RunFollower) -> str:
    """Where a client is that has all that was read: the layout of what it holds, and the last step."""
    claimed = run.claims[-1].incarnation if run.claims else 0
    created = f"{run.record.get('created_s', 0.0):.3f}"
    newest = run.newest()
    step = int(run.steps[newest[0]].at("step", newest[1].stop - 1)) if newest else 0
    return f"{created}-{claimed}-{run.load.width}:{step}"


def _parsed(cursor: str) -> tuple[str, int]:
    layout, _, step = cursor.rpartition(":")
    return layout, int(step) if step.isdecimal() and len(step) < 16 else 0


def _watch(request: Request) -> Watch:
    return request.app.state.watch


def _no_such_run() -> Response:
    return PlainTextResponse("404: no run of this key; the first page lists those there are\n", 404)


def _json(value: Any) -> Response:
    return Response(_dumps(value), media_type="application/json")


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
