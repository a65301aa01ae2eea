"""Every millisecond of a run is charged to one cause."""

import json
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from openmoe.pipelines import storage
from openmoe.platform.commands import cli
from openmoe.platform.run import attempt_log, goodput, journal
from openmoe.platform.run.attempt_log import AttemptLog
from openmoe.platform.run.goodput import Driver, Mark, Records, Span, Steps
from openmoe.platform.run.lineage import Acceptance, Claim
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError

spans = st.builds(Span, st.integers(-5, 40), st.integers(-5, 40), st.sampled_from("abc"))


@given(st.integers(0, 10), st.integers(0, 30), st.lists(spans, max_size=8))
def test_paint_charges_each_millisecond_to_the_last_span_that_covers_it(begin, length, given_spans):
    covered = goodput.paint(begin, begin + length, given_spans)
    drawn = [span.cause for span in covered for _ in range(span.begin_ms, span.end_ms)]
    expected = []
    for ms in range(begin, begin + length):
        causes = [span.cause for span in given_spans if span.begin_ms <= ms < span.end_ms]
        expected.append(causes[-1] if causes else "unrecorded")
    assert drawn == expected
    assert all(a.end_ms == b.begin_ms and a.cause != b.cause for a, b in pairwise(covered))


@st.composite
def histories(draw):
    """Records of any run whose clocks go wrong, whose records are lost, and whose drivers die at any moment."""
    moments = st.floats(0, 500, allow_nan=False)
    claims, events, steps, drivers, n = [], {}, {}, [], 0
    for _ in range(draw(st.integers(1, 4))):
        began_s = draw(moments)
        marks = [Mark(began_s, "start")]
        for _ in range(draw(st.integers(0, 3))):
            n += 1
            at_s = max(marks[-1].time_s, draw(moments))
            claims.append(Claim(incarnation=n, resumes=0, time_s=at_s + draw(st.floats(-1, 1))))
            marks += [Mark(at_s, "capacity"), Mark(at_s, "idle", n)]
            times = sorted(draw(st.lists(moments, min_size=4, max_size=4)))
            if draw(st.booleans()):
                steps[n] = Steps(times[0], times[1], draw(st.sampled_from(times)), times[3], draw(moments), 7)
            told = [{"event": "started", "time_s": draw(moments)}]
            told += [{"event": "charged", "cause": "save", "time_s": draw(moments), "seconds": draw(moments)}]
            end = {"event": "ended", "time_s": draw(moments), "cause": "hang", "step": 8, "step_time_s": draw(moments)}
            told += draw(st.sampled_from(([], [{**end, "decision": {"action": "retry"}}])))
            events[n] = sorted(told, key=lambda event: event["time_s"])
        if draw(st.booleans()):
            marks.append(
                Mark(max(marks[-1].time_s, draw(moments)), "over", outcome=draw(st.sampled_from(["stopped", ""])))
            )
        if draw(st.booleans()):
            drivers.append(Driver("", marks))  # else a version that logged nothing
    return Records(claims=claims, events=events, steps=steps, drivers=sorted(drivers, key=lambda d: d.marks[0].time_s))


@given(histories())
def test_all_causes_sum_to_the_wall_time_exactly_and_no_run_beats_a_perfect_controller(records):
    found = goodput.fold(records)
    assert found.causes.total() == found.wall_ms
    assert min([0, *found.causes.values()]) == 0
    for attempt in found.attempts:
        assert attempt.causes.total() == attempt.end_ms - attempt.begin_ms
        assert goodput.summed(attempt.spans).total() == attempt.end_ms - attempt.begin_ms
    assert sum(Decimal(ms) for ms in found.causes.values()) == found.wall_ms
    held, perfect = found.of_held()
    assert 0 <= held <= perfect <= 1


def test_a_killed_worker_and_what_it_cost():
    marks = [Mark(0, "start"), Mark(10, "build"), Mark(15, "capacity"), Mark(20, "idle", 1), Mark(100, "end")]
    marks += [Mark(101, "capacity"), Mark(104, "idle", 2), Mark(150, "end"), Mark(152, "over", outcome="finished")]
    ended = {"event": "ended", "time_s": 99.5, "cause": "host_fault", "decision": {"action": "retry"}}
    first = [
        {"event": "started", "time_s": 30, "join_s": 26},
        {"event": "charged", "cause": "compile", "time_s": 42, "seconds": 8},
        {"event": "charged", "cause": "save", "time_s": 61, "seconds": 1},
        {**ended, "step": 55, "step_time_s": 92},
    ]
    second = [
        {"event": "started", "time_s": 110, "join_s": 108},
        {"event": "restored", "time_s": 113, "seconds": 2},
        {"event": "charged", "cause": "compile", "time_s": 116, "seconds": 1},
        {"event": "charged", "cause": "sample", "time_s": 149, "seconds": 3},
    ]
    records = Records(
        claims=[Claim(incarnation=1, resumes=0, time_s=20), Claim(incarnation=2, resumes=1, time_s=104)],
        events={1: first, 2: second},
        steps={1: Steps(33, 43, 60, 90, 2.5, 50), 2: Steps(113, 117, 145, 145, 0.5, 80)},
        drivers=[Driver("a", marks)],
    )
    found = goodput.fold(records)
    assert found.causes == {
        "start": 10_000 + 6_000 + 4_000,
        "build": 5_000,
        "capacity": 5_000 + 3_000,
        "init": 8_000 + 5_000 - 2_000 + 2_000,
        "compile": 8_000 + 1_000,
        "step": 18_000 + 29_000 - 3_000,
        "data_wait": 3_000,
        "redone": 32_000 - 1_000,  # up to second 92, of which nothing was recorded after 90
        "save": 1_000,
        "idle": 8_000 + 1_000 + 1_000,
        "restore": 2_000,
        "sample": 3_000,
        "end": 1_000 + 2_000,
    }
    assert found.wall_ms == 152_000
    assert found.of_held() == (44 / 144, (144 - 2 * 12) / 144)
    assert [(r.incarnation, r.attempt, r.causes.total()) for r in found.resumes] == [
        (1, True, 43_000),
        (2, False, 25_000),
    ]
    assert found.resumes[1].causes == {
        **{"idle": 8_000, "end": 1_000, "capacity": 3_000, "start": 4_000, "init": 5_000, "restore": 2_000},
        **{"compile": 1_000, "step": 1_000},
    }
    enough = [(0, 1), (50, 0), (60, 1), (70, 2), (100, 0), (140, 1)]
    assert found.of_wall(enough, 1) == (44 / 152, ((50 - 12) + (40 - 12) + 0) / 152)
    assert found.of_wall(enough, 2) == (44 / 152, (30 - 12) / 152)


def test_between_attempts_nobody_ran_it_or_nobody_wanted_it():
    marks = [[Mark(0, "start")], [Mark(50, "start"), Mark(60, "over", outcome="stopped")], [Mark(90, "start")]]
    found = goodput.fold(Records(drivers=[Driver("", each) for each in marks]))
    assert found.between == (Span(0, 50_000, "absent"), Span(60_000, 90_000, "stopped"))
    assert (found.wall_ms, found.held_ms, found.wanted_ms) == (90_000, 10_000, 60_000)


def test_a_run_from_before_drivers_were_logged_has_an_attempt_for_each_end_that_was_not_retried():
    ended = [{"event": "ended", "time_s": 9, "cause": "hang", "decision": {"action": "retry"}}]
    claims = [Claim(incarnation=n, resumes=0, time_s=10 * n - 10) for n in (1, 2, 3)]
    steps = {2: Steps(12, 13, 15, 15, 0, 3), 3: Steps(22, 23, 25, 25, 0, 3)}
    found = goodput.fold(Records(claims=claims, events={1: ended}, steps=steps))
    assert [attempt.incarnations for attempt in found.attempts] == [(1, 2), (3,)]
    assert found.causes == {"start": 9_000 + 2_000 + 2_000, "end": 1_000, "step": 6_000, "absent": 5_000}


def write(run, folder, owner, *records):
    written = journal.Journal(run.at(folder), incarnation=owner, process=0)
    for record in records:
        written.append(record)
    written.flush()


@pytest.fixture
def run(tmp_path):
    """A run directory as a driver and one worker leave it: from second 1000 on, five steps, the third of them twice."""
    run = RunDir(f"{tmp_path}/run")
    run.create(spec.load("quickstart", [f"run_dir={run.path}"]))
    marks = [(1000, "start", 0), (1001, "capacity", 0), (1002, "idle", 1), (1008, "idle", 2)]
    told = [{"time_s": at, "phase": phase, "incarnation": n} for at, phase, n in marks]
    write(run, "attempts", 1, *told, {"time_s": 1015, "phase": "over", "outcome": "finished"})
    for n, claimed_s, first in ((1, 1002, 1), (2, 1008, 3)):
        claim = {"incarnation": n, "resumes": n - 1, "time_s": claimed_s}
        storage.write_durable(run.at("incarnations", f"{n:06d}.json"), json.dumps(claim).encode())
        write(run, "journal", n, {"event": "started", "time_s": claimed_s + 1})
        steps = [{"step": first + i, "time_s": claimed_s + 2 + i, "step_s": 1, "data_wait_s": 0.25} for i in range(3)]
        write(run, "metrics", n, *steps)
    run.accept(Acceptance(
        number=1, incarnation=1, step=2, next_row=8, checkpoint="", digest="", ledger_head="", data_id="",
    ))  # fmt: skip
    late = journal.Journal(run.at("journal"), incarnation=2, process=journal.DRIVER)
    late.append({"event": "charged", "cause": "sample", "time_s": 1014, "seconds": 1})
    late.flush()
    return run


def openmoe(*arguments):
    result = CliRunner().invoke(cli.app, ["goodput", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_log_of_an_attempt_is_read_back_and_the_next_one_takes_the_next_number(tmp_path):
    run = RunDir(str(tmp_path))
    with AttemptLog(run, "first", 123.0) as log:
        log.mark("capacity")
        log.mark("idle", 1)
        log.outcome("finished")
    with pytest.raises(KeyboardInterrupt), AttemptLog(run, "second", None):
        raise KeyboardInterrupt
    first, second = attempt_log.DriversReader(run).read()
    assert [(m.phase, m.incarnation, m.outcome) for m in first.marks] == [
        *(("start", 0, ""), ("capacity", 0, ""), ("idle", 1, ""), ("over", 0, "finished"))
    ]
    assert (first.name, first.marks[0].time_s) == ("first", 123.0)
    assert (second.name, [m.outcome for m in second.marks]) == ("second", ["", "stopped"])


def test_the_command_reads_the_run_directory_alone_and_its_parts_sum_to_the_whole(run, tmp_path):
    moved = tmp_path / "laptop"
    (tmp_path / "run").rename(moved)  # nothing else of the cluster is there
    found = json.loads(openmoe(str(moved), "--json", "--price-per-hour", "3.6"))
    assert found["causes_ms"] == {
        **{"step": 3750, "data_wait": 1250, "redone": 1000, "idle": 4000, "start": 3000, "capacity": 1000},
        "sample": 1000,
    }
    assert (found["wall_ms"], found["held_ms"], Decimal(found["cost"])) == (15_000, 14_000, Decimal("0.014"))
    assert found["of_held"] == {"run": 3.75 / 14, "perfect": 12 / 14}
    shown = openmoe(str(moved), "--price-per-hour", "3600")
    rows = {words[0]: words[1:] for words in map(str.split, shown.splitlines()) if words}
    assert rows["step"][:3] == ["3.750", "25.0%", "3.75"]
    assert rows["capacity"][:2] == ["1.000", "6.7%"]
    assert rows["all"] == ["15.000", "100.0%", "14.00", "1", "attempt(s),", "2", "incarnation(s)"]
    assert rows["2"][0] == "4.0"  # seconds from step 3 of incarnation 1 to that of incarnation 2
    assert "of held capacity  26.8% went into steps; a perfect controller: 85.7%" in shown


def test_a_capacity_trace_gives_the_bound_of_the_wall_clock(run, tmp_path):
    trace = tmp_path / "capacity.csv"
    trace.write_text("time,slices\n1970-01-01T00:00:00Z,1\n\n3e12, 0\n")
    found = json.loads(openmoe(run.path, "--json", "--capacity", str(trace)))
    assert found["of_wall"] == {"run": 3.75 / 15, "perfect": 14 / 15}
    assert json.loads(openmoe(run.path, "--json", "--capacity", str(trace), "--slices", "2"))["of_wall"]["perfect"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\udcff,1\n", "capacity.csv: no text in UTF-8; write lines of time,slices as"),
        ("1,x\n", r"capacity.csv:1: '1,x': .*; write time,slices as 1764115200,2"),
        ("2,1\n1,1\n", r"capacity.csv:2: '1,1': earlier than the line before; sort the lines by time"),
        ("3e12,1\n", r"capacity.csv: says nothing about 1970-01-01T00:16:40\+00:00, when the run began; add a line"),
    ],
)
def test_a_bad_capacity_trace_is_one_line(run, tmp_path, text, message):
    (tmp_path / "capacity.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(RunDirError, match=message):
        openmoe(run.path, "--capacity", str(tmp_path / "capacity.csv"))


def test_a_price_that_is_none_and_a_folder_that_is_no_run_are_one_line(run, tmp_path):
    with pytest.raises(SpecError, match="--price-per-hour much: give a number"):
        openmoe(run.path, "--price-per-hour", "much")
    with pytest.raises(RunDirError, match="nothing: no run is here"):
        openmoe(str(tmp_path / "nothing"))
