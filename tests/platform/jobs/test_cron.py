"""When schedules fire, on the days on which clocks change too, and what comes of it."""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.platform.jobs import cron
from openmoe.platform.jobs.cron import (
    Fire,
    Schedule,
    ScheduleAdded,
    ScheduleError,
    ScheduleFired,
    SchedulePaused,
    ScheduleRemoved,
    ScheduleResumed,
    Skip,
)
from openmoe.platform.jobs.job import Job
from openmoe.platform.jobs.job_events import CancelAsked, Submitted


def schedule(expression="0 20 * * *", timezone="Europe/Berlin", **fields):
    values = {
        "name": "nightly", "run_name": "night", "run_dir": "/runs/night", "run_file": "name: night\n",
        "cluster": "local", "cluster_file": "name: local\n", "slots": 2, "budgets": {"host_fault": 2},
    }  # fmt: skip
    return Schedule(cron=expression, timezone=timezone, **values | fields)


def at(text):
    """Unix time of "2026-03-29 01:00" in UTC."""
    return datetime.strptime(text, "%Y-%m-%d %H:%M").replace(tzinfo=UTC).timestamp()


def utc(time_s):
    return f"{datetime.fromtimestamp(time_s, UTC):%m-%d %H:%M}"


@pytest.mark.parametrize(
    ("expression", "timezone", "after", "fires"),
    [
        # Berlin, 2026-03-29: 02:00 CET becomes 03:00 CEST (01:00 UTC). A fixed time in the gap fires right after it.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28 00:00", ["03-28 01:30", "03-29 01:00", "03-30 00:30"]),
        ("0,30 2 * * *", "Europe/Berlin", "2026-03-28 12:00", ["03-29 01:00", "03-30 00:00", "03-30 00:30"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-03-29 00:15", ["03-29 00:30", "03-29 01:00", "03-29 01:30"]),
        # Berlin, 2026-10-25: 03:00 CEST becomes 02:00 CET (01:00 UTC). A fixed time fires the first time only.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24 00:00", ["10-24 00:30", "10-25 00:30", "10-26 01:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25 01:10", ["10-26 01:30", "10-27 01:30"]),
        ("0 * * * *", "Europe/Berlin", "2026-10-24 23:30", ["10-25 00:00", "10-25 01:00", "10-25 02:00"]),
        # New York, 2026-03-08 and 2026-11-01.
        ("30 2 * * *", "America/New_York", "2026-03-07 12:00", ["03-08 07:00", "03-09 06:30"]),
        ("30 1 * * *", "America/New_York", "2026-10-31 12:00", ["11-01 05:30", "11-02 06:30"]),
        ("0 20 * * 1-5", "America/New_York", "2026-11-06 12:00", ["11-07 01:00", "11-10 01:00"]),
        # UTC knows no such days.
        ("30 2 * * *", "UTC", "2026-03-28 12:00", ["03-29 02:30", "03-30 02:30"]),
        ("30 2 * * *", "UTC", "2026-10-24 12:00", ["10-25 02:30", "10-26 02:30"]),
        ("0 0 29 2 *", "UTC", "2026-01-01 00:00", ["02-29 00:00"]),
        ("0 6 L * *", "UTC", "2026-11-01 00:00", ["11-30 06:00", "12-31 06:00"]),
    ],
)
def test_a_schedule_fires_at(expression, timezone, after, fires):
    times = [utc(time_s) for time_s in islice(cron.firings(schedule(expression, timezone), at(after)), len(fires))]
    assert times == fires


def test_the_next_firing_is_after_now_never_now():
    assert cron.next_fire(schedule(timezone="UTC"), at("2026-11-24 19:59")) == at("2026-11-24 20:00")
    assert cron.next_fire(schedule(timezone="UTC"), at("2026-11-24 20:00")) == at("2026-11-25 20:00")


@settings(deadline=None)
@given(
    st.sampled_from(["30 2 * * *", "*/20 1-3 * * *", "15 */2 * * *", "0 20 * * 1"]),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"]),
    st.integers(int(at("2026-01-01 00:00")), int(at("2027-01-01 00:00"))),
    st.lists(st.integers(0, 200_000), max_size=8),
)
def test_however_often_one_looks_each_firing_is_seen_once(expression, timezone, start_s, waits_s):
    each = schedule(expression, timezone)
    seen, last_s, now_s = [], start_s, start_s
    for wait_s in waits_s:
        now_s += wait_s
        fires = cron.due(each, last_s, now_s)
        seen += fires
        last_s = max([last_s, *fires])
    assert seen == cron.due(each, start_s, now_s)
    assert seen == sorted(set(seen))
    assert all(start_s < time_s <= now_s for time_s in seen)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"expression": "0 25 * * *"},
            "cron '0 25 * * *': bad hour; write five: minute hour day-of-month month day-of",
        ),
        ({"expression": "0 20 * *"}, "cron '0 20 * *': 4 fields; write five: "),
        ({"expression": "0 0 20 * * *"}, "cron '0 0 20 * * *': 6 fields; write five: "),
        ({"expression": "@daily"}, "cron '@daily': 1 fields; write five: "),
        ({"expression": ""}, "cron '': 0 fields; write five: "),
        ({"expression": "0 0 30 2 *"}, "cron '0 0 30 2 *': bad day-of-month; "),
        ({"timezone": "Berlin"}, "timezone 'Berlin': unknown; did you mean `Europe/Berlin`?"),
        ({"timezone": "Europe/Berln"}, "timezone 'Europe/Berln': unknown; did you mean `Europe/Berlin`?"),
        ({"timezone": "new york"}, "timezone 'new york': unknown; did you mean `America/New_York`?"),
        ({"timezone": "Europe"}, "timezone 'Europe': unknown; "),
        ({"timezone": ""}, "timezone '': unknown; write an IANA name such as Europe/Berlin, America/New_York or UTC"),
        ({"timezone": "../../etc/passwd"}, "timezone '../../etc/passwd': unknown; write an IANA name such as "),
    ],
)
def test_what_never_fires_is_refused_in_one_line(fields, message):
    with pytest.raises(ScheduleError) as caught:
        cron.check(schedule(**fields))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10h", 36_000), ("90m", 5_400), ("2h30m", 9_000), ("1d", 86_400), ("45s", 45)]
)
def test_windows_are_durations(text, seconds):
    assert cron.window_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "h", "0h", "-1h", "1.5h", "10 h", "1h1h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ScheduleError, match="window: expected a duration such as 10h, 90m, 2h30m or 1d, got "):
        cron.window_seconds(text)


def job(state, name="night-ab12", of="nightly", until=None):
    return Job(
        id=name, name="night", run_dir="/runs/night", run_file="", cluster="local", cluster_file="", slots=1,
        budgets={}, submitted_s=0.0, changed_s=0.0, state=state, schedule=of, stop_at_s=until,
    )  # fmt: skip


LAST = at("2026-11-20 19:00")  # 20:00 in Berlin
ON_TIME = at("2026-11-21 19:01")
THREE_DAYS = at("2026-11-23 21:00")  # the firings of 21, 22 and 23, the newest two hours ago


@pytest.mark.parametrize(
    ("fields", "jobs", "now_s", "decision"),
    [
        ({}, [], at("2026-11-21 18:59"), None),
        ({}, [], ON_TIME, Fire(fire_s=at("2026-11-21 19:00"))),
        ({"paused": True}, [], ON_TIME, None),
        # A controller that was off for three days.
        ({"catch_up": "latest"}, [], THREE_DAYS, Fire(fire_s=at("2026-11-23 19:00"), missed=2)),
        (
            {"catch_up": "none"},
            [],
            THREE_DAYS,
            Skip(
                fire_s=at("2026-11-23 19:00"),
                missed=2,
                reason="no controller ran at that time, and catch_up is none",
            ),
        ),
        # Back in time for the newest of them.
        ({"catch_up": "none"}, [], at("2026-11-23 19:04"), Fire(fire_s=at("2026-11-23 19:00"), missed=2)),
        # Its window is still open, or is not.
        (
            {"catch_up": "latest", "window_s": 7_201.0},
            [],
            THREE_DAYS,
            Fire(fire_s=at("2026-11-23 19:00"), missed=2),
        ),
        (
            {"catch_up": "latest", "window_s": 7_200.0},
            [],
            THREE_DAYS,
            Skip(fire_s=at("2026-11-23 19:00"), missed=2, reason="its window was over before a controller ran"),
        ),
        # The last job is still there.
        (
            {"overlap": "skip"},
            [job("running")],
            ON_TIME,
            Skip(fire_s=at("2026-11-21 19:00"), reason="night-ab12 is still running"),
        ),
        (
            {"overlap": "skip"},
            [job("queued")],
            ON_TIME,
            Skip(fire_s=at("2026-11-21 19:00"), reason="night-ab12 is still queued"),
        ),
        ({"overlap": "skip"}, [job("failed"), job("running", of="other")], ON_TIME, Fire(fire_s=ON_TIME - 60)),
        ({"overlap": "queue"}, [job("running")], ON_TIME, Fire(fire_s=ON_TIME - 60)),
        (
            {"overlap": "queue"},
            [job("running"), job("queued", "night-cd34")],
            ON_TIME,
            Skip(fire_s=ON_TIME - 60, reason="night-cd34 is queued already"),
        ),
        (
            {"overlap": "replace"},
            [job("running"), job("queued", "night-cd34"), job("stopping", "night-ef56"), job("cancelled", "x")],
            ON_TIME,
            Fire(fire_s=ON_TIME - 60, replaces=("night-ab12", "night-cd34")),
        ),
        # A window of a whole day closes when the next one opens: the job that is about to stop is not in the way.
        ({"overlap": "skip"}, [job("running", until=ON_TIME - 60)], ON_TIME, Fire(fire_s=ON_TIME - 60)),
        ({"overlap": "queue"}, [job("queued", until=ON_TIME - 60)], ON_TIME, Fire(fire_s=ON_TIME - 60)),
        ({"overlap": "replace"}, [job("stopping", until=ON_TIME - 60)], ON_TIME, Fire(fire_s=ON_TIME - 60)),
        (
            {"overlap": "skip"},
            [job("running", until=ON_TIME - 59)],
            ON_TIME,
            Skip(fire_s=ON_TIME - 60, reason="night-ab12 is still running"),
        ),
        ({"overlap": "replace"}, [], ON_TIME, Fire(fire_s=ON_TIME - 60)),
    ],
)
def test_what_comes_of_a_firing(fields, jobs, now_s, decision):
    assert cron.decide(schedule(last_fired_s=LAST, **fields), jobs, now_s) == decision


def test_a_firing_becomes_a_job_of_the_schedule_with_its_window():
    each = schedule(window_s=36_000.0)
    fired, submitted = cron.events(each, Fire(fire_s=100.0, missed=2), "night-ab12", 130.0)
    assert fired == ScheduleFired(schedule="nightly", time_s=130.0, fire_s=100.0, missed=2, job_id="night-ab12")
    assert submitted == Submitted(
        job_id="night-ab12",
        time_s=130.0,
        name="night",
        run_dir="/runs/night",
        run_file="name: night\n",
        cluster="local",
        cluster_file="name: local\n",
        slots=2,
        budgets={"host_fault": 2},
        schedule="nightly",
        stop_at_s=36_100.0,
    )
    assert cron.events(schedule(), Fire(fire_s=100.0), "night-ab12", 130.0)[1].stop_at_s is None


def test_a_replaced_job_is_cancelled_first_and_told_why():
    cancelled, *_ = cron.events(schedule(), Fire(fire_s=100.0, replaces=("night-ab12",)), "night-cd34", 130.0)
    why = "replaced by night-cd34, the next firing of schedule nightly"
    assert cancelled == CancelAsked(job_id="night-ab12", time_s=130.0, why=why)


def test_a_skipped_firing_is_recorded_with_its_reason():
    [fired] = cron.events(schedule(), Skip(fire_s=100.0, missed=1, reason="so"), "night-ab12", 130.0)
    assert fired == ScheduleFired(schedule="nightly", time_s=130.0, fire_s=100.0, missed=1, skipped="so")


ADDED = ScheduleAdded(schedule="nightly", time_s=LAST, definition=schedule())


def fold(*events):
    each = None
    for event in events:
        each = cron.changed(each, event)
    return each


def test_a_firing_is_dealt_with_once():
    each = fold(ADDED)
    assert each == schedule(last_fired_s=LAST)
    for now_s in (ON_TIME, ON_TIME + 60, THREE_DAYS, THREE_DAYS + 60):
        decision = cron.decide(each, [], now_s)
        assert (decision is None) == (now_s in (ON_TIME + 60, THREE_DAYS + 60))
        for event in cron.events(each, decision, "night-ab12", now_s) if decision else []:
            each = cron.changed(each, event) if isinstance(event, ScheduleFired) else each
    assert each.last_fired_s == at("2026-11-23 19:00")
    assert each.last_result == "skipped: no controller ran at that time, and catch_up is none"


def test_a_firing_by_hand_leaves_the_next_one_due():
    by_hand = ScheduleFired(schedule="nightly", time_s=ON_TIME, fire_s=ON_TIME, job_id="night-ab12", by_hand=True)
    each = fold(ADDED, by_hand)
    assert (each.last_fired_s, each.last_result) == (LAST, "night-ab12")
    assert cron.due(each, each.last_fired_s, ON_TIME) == [at("2026-11-21 19:00")]


def test_nothing_is_caught_up_for_a_pause():
    paused = fold(ADDED, SchedulePaused(schedule="nightly", time_s=LAST + 1))
    assert (paused.paused, cron.decide(paused, [], THREE_DAYS)) == (True, None)
    resumed = cron.changed(paused, ScheduleResumed(schedule="nightly", time_s=THREE_DAYS))
    assert cron.decide(resumed, [], THREE_DAYS + 60) is None
    assert cron.decide(resumed, [], at("2026-11-24 19:00")) == Fire(fire_s=at("2026-11-24 19:00"))
    assert cron.changed(resumed, ScheduleResumed(schedule="nightly", time_s=THREE_DAYS + 9)) is resumed


def test_a_name_belongs_to_one_schedule_at_a_time():
    with pytest.raises(ScheduleError, match="schedule nightly: there is one of this name; `openmoe schedule remove n"):
        fold(ADDED, ADDED)
    removed = ScheduleRemoved(schedule="nightly", time_s=LAST)
    assert fold(ADDED, removed) is None
    assert fold(ADDED, removed, ADDED) == schedule(last_fired_s=LAST)
    for event in (removed, SchedulePaused(schedule="nightly", time_s=LAST)):
        with pytest.raises(ScheduleError, match="schedule nightly: there is none of this name"):
            fold(event)


def test_what_a_definition_brings_along_of_another_life_is_forgotten():
    definition = schedule(name="old", last_fired_s=1.0, paused=True, last_result="x")
    assert fold(replace(ADDED, definition=definition)) == schedule(last_fired_s=LAST)
