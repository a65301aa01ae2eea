"""Goes back before bad numbers, as the run directory has them: the driver that saw them may have died."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from openmoe.platform.run import journal
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.train import health


def go_back(run: RunDir, say: Callable[[str], None]) -> None:
    """Has the next incarnation begin before the numbers of the newest one went bad, and leave out the rows.

    Nothing is done where a driver has decided to stop: whoever starts the run again has been told why.

    Args:
      run: whose policy is to go back.
      say: told what follows; also if nothing on record says which rows are to blame.
    """
    newest = max((claim.incarnation for claim in run.claims()), default=0)
    if newest in {incident.incarnation for incident in run.incidents()}:
        return
    events = _events_of(run, newest)
    ended = next((event for event in events if event["event"] == "ended"), None)
    if ended and ended["decision"]["action"] == "stop":
        return
    if incident := health.incident_of(events, newest):
        run.add_incident(incident)
    elif ended is None or ended["cause"] != "bad_numbers":
        return
    start = run.newest_accepted()
    step = start.step if start else 0
    if incident:
        say(f"  goes back to step {step}, and leaves out rows [{incident.rows.lo}, {incident.rows.hi})")
    else:
        say(f"  incarnation {newest} has not recorded the rows to blame: goes on from step {step}, and leaves out none")


def _events_of(run: RunDir, incarnation: int) -> list[dict[str, Any]]:
    """Returns the journal's records of the newest incarnation, in time order."""
    records = itertools.takewhile(lambda found: found[0] >= incarnation, journal.newest_first(run.at("journal")))
    return sorted(({"incarnation": n, "process": p, **r} for n, p, r in records), key=lambda event: event["time_s"])
