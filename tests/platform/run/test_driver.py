"""The driver judges each incarnation by its evidence, and does what the decision says."""

import pytest

from openmoe.pipelines.config import DataError
from openmoe.platform.commands.progress import ProgressReport
from openmoe.platform.run import driver, hosts, verdict
from openmoe.platform.run.board import Board
from openmoe.platform.run.driver import Attempt
from openmoe.platform.run.journal import Journal, read
from openmoe.platform.run.lineage import Acceptance
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run.stragglers import Pace
from openmoe.platform.run.verdict import Evidence, Failure
from openmoe.platform.run_file import spec

CRASH = Evidence(failures=(Failure(rank=1, kind="raised", text="Traceback at 0x7f00\nKeyError: 'no such layer'"),))
DEATH = Evidence(failures=(Failure(rank=1, kind="process_died", text="actor 0a1b2c3d4e5f60718293 died"),))
EVICTION = Evidence(preempted_ranks=(0, 1))


def crash(address):
    return Evidence(failures=(Failure(rank=1, kind="raised", text=f"Traceback at {address}\nKeyError: 3"),))


@pytest.fixture
def attempt(tmp_path, monkeypatch, capsys):
    """Returns a function that plays an attempt whose incarnations end as told, then what it printed and journalled.

    An end is evidence, None for a finished run, or something that is raised; a number before it is a step that was
    accepted first, a dict an event that is journalled.
    """

    def play(*ends, overrides=()):
        loaded = spec.load("quickstart", [f"run_dir={tmp_path}/run", *overrides])
        run = RunDir(loaded.run_dir)
        run.create(loaded)
        left = list(ends)

        def incarnate(self, claim, journal, check):
            while isinstance(left[0], int | dict):
                step = left.pop(0)
                if isinstance(step, dict):
                    journal.append({"time_s": 1.0, **step})
                    journal.flush()
                    continue
                checkpoint = f"checkpoints/{claim.incarnation:06d}/{step}"
                (tmp_path / "run" / checkpoint).mkdir(parents=True)
                run.accept(Acceptance(
                    number=1, incarnation=claim.incarnation, step=step, next_row=step, checkpoint=checkpoint, digest="",
                    ledger_head="", data_id="",
                ))  # fmt: skip
            end = left.pop(0)
            if isinstance(end, BaseException):
                raise end
            return end

        monkeypatch.setattr(Attempt, "_incarnate", incarnate)
        monkeypatch.setattr(hosts, "drain_broken_slices", lambda hosts, say: None)
        with ProgressReport() as show:
            tried = Attempt(loaded, run, "manifest", show, tuple, "run-abcd-1")
            finished = tried.run(lambda: None)
        assert left == []
        return finished, tried.exit_code, capsys.readouterr().err, [e for e in run.events() if e["event"] == "ended"]

    return play


def test_incarnations_follow_each_other_until_the_run_is_finished(attempt):
    finished, exit_code, said, ended = attempt(EVICTION, DEATH, EVICTION, None)
    assert (finished, exit_code) == (True, 0)
    assert [e["cause"] for e in ended] == ["preemption", "host_fault", "preemption"]
    assert [e["decision"]["reason"].split(":")[0] for e in ended] == [
        "preemption 1 of 1000",
        "host_fault 1 of 10",
        "preemption 2 of 1000",
    ]
    assert {e["attempt"] for e in ended} == {"run-abcd-1"}
    assert "incarnation 4 starts at step 0 of 100" in said
    assert "mesh data=1 x expert=4 on 2 workers with 2 cpu devices each" in said


def test_a_spent_budget_ends_the_attempt_with_exit_code_1_and_the_trace(attempt):
    finished, exit_code, said, ended = attempt(CRASH)
    assert (finished, exit_code) == (False, 1)
    assert ended[0]["decision"]["reason"].startswith("budgets.bad_code is spent (0 of 0): rank 1 raised")
    assert "KeyError: 'no such layer'\n" in said


REWIND = ("health.on_bad_numbers=rewind", "budgets.bad_numbers=1")
SPIKE = {"event": "bad_numbers", "step": 31, "rows": [28, 32], "what": "loss 9.0", "is_spike": True}
SPIKED = Evidence(failures=(Failure(rank=0, kind="bad_numbers", text="LossSpike: step 31, rows 28..31"),))


def test_bad_numbers_are_rewound_within_their_budget_and_the_rows_left_out(attempt, tmp_path):
    finished, _, said, ended = attempt(20, 30, SPIKE, SPIKED, None, overrides=REWIND)
    run = RunDir(f"{tmp_path}/run")
    assert finished
    assert ended[0]["decision"]["action"] == "retry"
    [incident] = run.incidents()
    assert (incident.incarnation, incident.rows, incident.reason) == (1, (28, 32), "step 31: loss 9.0")
    assert run.claims()[-1].resumes == 1
    assert "  goes back to step 20, and leaves out rows [28, 32)" in said


def test_bad_numbers_on_record_are_rewound_though_the_worker_died_before_it_could_tell(attempt, tmp_path):
    _, _, _, ended = attempt(20, 30, SPIKE, DEATH, None, overrides=REWIND)
    assert [e["cause"] for e in ended] == ["host_fault"]
    run = RunDir(f"{tmp_path}/run")
    assert ([i.rows for i in run.incidents()], run.claims()[-1].resumes) == ([(28, 32)], 1)


def test_bad_numbers_are_rewound_by_the_next_driver_when_the_one_that_saw_them_died(attempt, tmp_path):
    class Died(BaseException):
        pass

    with pytest.raises(Died):
        attempt(20, 30, SPIKE, Died(), overrides=REWIND)
    run = RunDir(f"{tmp_path}/run")
    assert run.incidents() == []
    _, _, said, _ = attempt(None, overrides=REWIND)
    assert ([i.rows for i in run.incidents()], run.claims()[-1].resumes) == ([(28, 32)], 1)
    assert "  goes back to step 20, and leaves out rows [28, 32)" in said


def test_a_rewind_without_a_record_of_the_rows_says_so(attempt, tmp_path):
    goes_on = {**SPIKE, "ends": False}  # as under health.on_bad_numbers=skip, which went on
    _, _, said, _ = attempt(20, 30, goes_on, SPIKED, None, overrides=REWIND)
    assert RunDir(f"{tmp_path}/run").incidents() == []
    assert "  incarnation 1 has not recorded the rows to blame: goes on from step 30, and leaves out none" in said


def test_bad_numbers_that_ended_an_attempt_are_not_rewound_by_the_next(attempt, tmp_path):
    later = {**SPIKE, "step": 41, "rows": [36, 44]}
    finished, _, _, ended = attempt(20, SPIKE, SPIKED, 34, later, SPIKED, overrides=REWIND)
    assert (finished, ended[-1]["decision"]["action"]) == (False, "stop")
    _, _, said, _ = attempt(None, overrides=REWIND)
    assert [i.rows for i in RunDir(f"{tmp_path}/run").incidents()] == [(28, 32)]
    assert "incarnation 3 starts at step 34" in said


def test_the_same_crash_without_progress_ends_the_attempt_whatever_the_machines_did_in_between(attempt):
    ends = (20, crash("0x7f01"), EVICTION, DEATH, crash("0x7f02"))
    finished, exit_code, _, ended = attempt(*ends, overrides=["budgets.bad_code=9"])
    assert (finished, exit_code) == (False, 1)
    assert ended[-1]["decision"]["reason"].startswith("the same failure twice without progress")


def test_the_same_crash_further_on_spends_its_budget(attempt):
    ends = (20, crash("0x7f01"), 40, crash("0x7f02"), None)
    finished, _, _, ended = attempt(*ends, overrides=["budgets.bad_code=9"])
    assert finished
    assert [e["decision"]["action"] for e in ended] == ["retry", "retry"]


def test_deaths_of_machines_at_one_step_are_no_proof_of_anything(attempt):
    finished, _, _, ended = attempt(DEATH, DEATH, DEATH, None)
    assert finished
    assert [e["cause"] for e in ended] == ["host_fault"] * 3


def test_a_run_that_goes_on_for_months_outlives_its_budget_of_faults(attempt, monkeypatch):
    monkeypatch.setattr(verdict, "FORGOTTEN_AFTER_S", 0.0)  # a day has passed at once
    ends = [end for step in range(1, 15) for end in (step, DEATH)]
    finished, _, _, ended = attempt(*ends, None)
    assert finished
    assert {e["decision"]["reason"].split(":")[0] for e in ended} == {"host_fault 1 of 10"}


def test_the_end_of_a_stuck_worker_names_the_file_that_says_where_its_threads_stood(attempt, tmp_path):
    (tmp_path / "run" / "stacks").mkdir(parents=True)
    for name in ("000001-00003.txt", "000002-00000.txt"):
        (tmp_path / "run" / "stacks" / name).write_text("thread MainThread")
    hung = Evidence(failures=(Failure(rank=3, kind="hung", text="stuck here: no step for 30 s"),))
    _, _, said, [ended] = attempt(hung, None)
    assert ended["stacks"] == ["stacks/000001-00003.txt"]
    assert f"where all threads stood: {tmp_path}/run/stacks/000001-00003.txt" in said


def test_a_stop_on_request_is_journalled_and_goes_up(attempt, tmp_path):
    with pytest.raises(driver.Stopped):
        attempt(driver.Stopped("SIGTERM"))
    [ended] = [e for e in RunDir(f"{tmp_path}/run").events() if e["event"] == "ended"]
    assert (ended["cause"], ended["decision"]["action"]) == ("operator", "stop")


def test_data_that_cannot_be_built_while_it_trains_is_bad_input(attempt, tmp_path):
    with pytest.raises(DataError):
        attempt(DataError("c4: 9 of 10 documents are unusable"))
    [ended] = [e for e in RunDir(f"{tmp_path}/run").events() if e["event"] == "ended"]
    assert (ended["cause"], ended["decision"]["action"]) == ("bad_input", "stop")


def test_bad_input_found_by_a_worker_is_one_line_and_exit_code_2(attempt):
    line = "/run/checkpoints/000001/20: cannot be written: the disk is full"
    finished, exit_code, said, _ = attempt(Evidence(failures=(Failure(rank=0, kind="bad_input", text=line),)))
    assert (finished, exit_code) == (False, 2)
    assert said.count(line) == 2  # as the reason, and as evidence
    assert "Traceback" not in said


def test_the_groups_that_all_workers_render_are_shown_together():
    board = Board()
    board.rendered()
    assert board.take() is None
    board.rendered()
    board.put({"step": 7})
    assert board.take() == {"step": 7, "rendered_groups": 2}


def test_it_says_once_when_training_got_ahead_of_the_build(tmp_path, capsys):
    with ProgressReport() as show:
        tried = Attempt(spec.load("quickstart"), RunDir(str(tmp_path)), "manifest", show, tuple)
        for step, rendered in ((1, 0), (2, 3), (3, 3), (4, 5)):
            tried._show_newest({"step": step, "loss": 5.0, "step_s": 1.0, "rendered_groups": rendered})
    said = [line for line in capsys.readouterr().err.splitlines() if "ahead" in line]
    assert said == [
        "training got ahead of the build: 3 group(s) of rows rendered on read so far",
        "training got ahead of the build: 5 group(s) of rows rendered on read so far",
    ]
    assert tried.position_steps() == 4


def test_a_worker_that_holds_the_others_up_is_named_once_with_its_host(tmp_path):
    journal, said = Journal(f"{tmp_path}/journal", incarnation=1, process=driver.DRIVER), []
    paces = driver._Paces(journal, said.append)
    assert not paces.are_due()
    slow = {0: Pace(1, 9, 0.1, 0.0, 1.0), 1: Pace(1, 9, 0.7, 0.0, 1.0)}
    for told in ({}, slow, slow, {0: slow[0]}, slow):
        paces.look(told, ["host-a", "host-b"])
    assert [line.partition(" holds")[0] for line in said] == ["rank 1 on host-b"] * 2
    events = [record for _, _, record in read(f"{tmp_path}/journal")]
    assert [(e["event"], e["rank"], e["host"], e["own_s"]) for e in events] == [("straggler", 1, "host-b", 0.7)] * 2
