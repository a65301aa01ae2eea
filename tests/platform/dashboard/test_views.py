"""What the pages say about a run, from literal records."""

import json
from dataclasses import asdict

import pytest

from openmoe.platform.dashboard import views
from openmoe.platform.dashboard.follow import RunFollower
from openmoe.platform.dashboard.incidents import Ending, Stage
from openmoe.platform.jobs.cron import Schedule
from openmoe.platform.jobs.job import Job
from openmoe.platform.run import goodput, goodput_records


def follow(run):
    followed = RunFollower(run.dir)
    followed.advance()
    return followed


def test_figures_of_a_training_run(written):
    run = written().with_two_interruptions()
    figures = views.figures(follow(run), "k", now_s=run.now_s + 5, with_period=True)
    assert (figures.state, figures.step, figures.steps, figures.tokens_per_step) == ("training", 60, 100, 1000)
    assert figures.loss == pytest.approx(8.4)
    assert figures.all_loss == pytest.approx(8.5)
    assert (figures.step_s, figures.left_s, figures.updated_s) == (1.0, 40.0, run.now_s)
    assert (figures.incarnations, figures.checkpoint_step, figures.read_all) == (3, 50, True)
    assert asdict(figures.period) == {
        "whole_run": True,
        "steps": 60,
        "undone_steps": 30,
        "training_share": 0.444,  # 60 steps of 1 s; from the first claim at 1,000 s to now it is 135 s
        "endings": {"host_fault": 1, "unseen": 1},
    }


def test_the_last_day_of_a_long_run_leaves_out_what_was_before(written):
    run = written()
    run.claim()
    run.train(20)
    run.accept()
    run.end()
    run.claim(after_s=100_000)
    run.train(10)
    period = views.figures(follow(run), "k", run.now_s, with_period=True).period
    assert (period.whole_run, period.steps, period.endings) == (False, 10, {})


def preparing(run):
    pass


def starting(run):
    run.claim()


def training(run):
    run.claim()
    run.train(5)


def waiting(run):
    training(run)
    run.event("waits_for_data", missing="pass 1 of c4")


def rendering(run):
    training(run)
    run.event("renders_data", missing="group 3 of pass 1 of c4")


def gone_on(run):
    waiting(run)
    run.train(1)


def restarting(run):
    training(run)
    run.end()


def failed(run):
    training(run)
    run.end(cause="bad_code", reason="rank 0 raised: KeyError", action="stop")


def stopped(run):
    training(run)
    run.end(cause="operator", reason="stopped on request", action="stop")


def finished(run):
    training(run)
    run.finish()


def longer(run):
    finished(run)
    run.claim(after_s=50)


@pytest.mark.parametrize(
    ("history", "age_s", "state", "reason"),
    [
        (preparing, 5, "preparing", "no worker group has started yet"),
        (starting, 5, "starting", ""),
        (training, 5, "training", ""),
        (training, 119, "training", ""),
        (training, 121, "silent", "no sign of life; the same command goes on from the checkpoint of step 0"),
        (waiting, 5, "training", "waits for data: pass 1 of c4"),
        (waiting, 999, "silent", "waits for data: pass 1 of c4; since then no sign of life"),
        (rendering, 5, "training", "is ahead of its data and renders it: group 3 of pass 1 of c4"),
        (gone_on, 5, "training", ""),
        (restarting, 5, "restarting", "host_fault 1 of 10: the process of rank 1 died"),
        (failed, 9999, "failed", "rank 0 raised: KeyError"),
        (stopped, 9999, "stopped", "stopped on request"),
        (finished, 9999, "finished", ""),
        (longer, 5, "starting", ""),
    ],
)
def test_the_state_of_a_run_follows_from_its_files_and_the_time(written, history, age_s, state, reason):
    run = written()
    history(run)
    figures = views.figures(follow(run), "k", run.now_s + age_s)
    assert figures.state == state
    assert figures.reason.startswith(reason) if reason else figures.reason == ""


def test_an_incarnation_tells_why_it_ended_and_what_was_undone(written):
    first, second, third = views.history(follow(written().with_two_interruptions())).incarnations
    assert (first.start_step, first.last_step, first.kept_step, first.processes) == (0, 40, 20, 2)
    assert (first.ending.cause, first.ending.action) == ("host_fault", "retry")
    assert first.ending.evidence == ("slice-a-0 is gone",)
    assert first.ending.trace == "Traceback: it died"
    assert (second.start_step, second.last_step, second.kept_step) == (20, 60, 50)
    reason = "its driver was gone before it could say why"
    assert second.ending == Ending(cause="unseen", reason=reason, time_s=1090.0)
    assert third.ending is None


def test_a_run_that_reached_its_end_and_was_made_longer_has_no_incident(written):
    run = written()
    training(run)
    run.accept()
    run.event("sampled", step=5, samples=[["import", " os"]])
    run.finish()
    run.claim(after_s=60)
    run.train(1)
    history = views.history(follow(run))
    assert [view.ending and view.ending.cause for view in history.incarnations] == ["done", None]
    assert history.samples == (("import", " os"),)


def test_evaluations_that_count_are_shown_and_undone_ones_are_not(written):
    run = written()
    run.claim()
    run.train(20)
    run.accept()
    for step, loss in ((20, 5.0), (30, 4.9)):
        run.event("evaluated", step=step, losses={"loss": loss}, samples=[["import", f" at {step}"]])
    run.end()
    run.claim(after_s=60)
    run.event("evaluated", step=30, losses={"loss": float("nan")})
    run.event("alarm", alarm="expert_collapse", begins=True, step=31, value=0.004, layer=1, expert=7)
    run.event("left_out", step=31, rows=[124, 132], incident="incident of incarnation 1: step 31: loss nan")
    run.event("update_skipped", step=33, rows=[140, 144], total_loss="nan", grad_norm="nan")
    for error in ("busy", "not empty"):
        run.event("not_removed", checkpoint="checkpoints/000001/20", error=error)
    history = views.history(follow(run))
    assert [(e.step, e.losses) for e in history.held_out] == [(20, {"loss": 5.0}), (30, {"loss": None})]
    assert history.samples == (("import", " at 30"),)
    assert [s.text for s in history.story if s.kind == "trouble"] == [
        "expert 7 of MoE layer 1 is asked for 0.4% of its even share at step 31",
        "rows [124, 132) are left out: incident of incarnation 1: step 31: loss nan",
        "an old checkpoint was not removed (2 times): not empty",
        "updates that were not finite were skipped: steps 33",
    ]


def test_the_history_tells_the_story_and_the_facts(written):
    run = written().with_two_interruptions()
    history = views.history(follow(run))
    assert [s.text for s in history.story][:2] == ["incarnation 1 starts from scratch", "checkpoint accepted: step 20"]
    assert dict(history.facts)["devices"] == "4 x cpu, 2 processes"
    assert dict(history.facts)["mesh"] == "data 1 x expert 4"
    assert "batch_rows: 4" in history.spec
    assert history.stages == (Stage(number=2, first_step=31, mixture="next_token: c4 25%, the_stack 75%"),)


def test_the_newest_cadence_of_the_newest_worker_group_is_shown_in_words(written):
    run = written()
    run.claim()
    assert views.figures(follow(run), "k", now_s=run.now_s).cadence == ""
    solved = {"interruption_every_s": 10_800.0, "stall_s": 0.1, "step_s": 1.0, "every_s": 46.1}
    run.event("cadence", step=0, every_steps=20, **(solved | dict.fromkeys(("stall_s", "step_s", "every_s"))))
    before = views.figures(follow(run), "k", now_s=run.now_s).cadence
    assert before == "every 20 steps until a save is measured (one interruption per 3 h expected)"
    run.event("cadence", step=20, every_steps=46, **solved)
    shown = views.figures(follow(run), "k", now_s=run.now_s).cadence
    assert shown == "every 46 steps, 0.768 min (one interruption per 3 h expected, a save stalls for 0.1 s)"
    run.claim(after_s=5)
    assert views.figures(follow(run), "k", now_s=run.now_s).cadence == ""


@pytest.mark.parametrize(("every", "shown"), [(1, "every step"), (2000, "every 2,000 steps"), ("auto", "")])
def test_a_cadence_that_the_run_file_sets_is_shown_as_the_newest_worker_group_has_it(written, every, shown):
    run = written()
    run.claim(checkpoint_every_steps=7)
    run.claim(after_s=5, checkpoint_every_steps=every)
    assert views.figures(follow(run), "k", now_s=run.now_s).cadence == shown


def test_the_routers_entropy_is_drawn_of_the_layer_where_it_is_least_and_is_none_of_a_dense_model(written):
    run = written()
    run.claim()
    run.train(1, router_entropy=[0.9, 0.4])
    run.train(1, router_entropy=[0.3, 0.8])
    run.train(1, router_entropy=[])
    run.train(1)
    assert views.run_curves(follow(run))["line"]["router_entropy"]["mean"] == [0.4, 0.3, None, 0.5]


def test_the_account_is_that_of_the_command(written):
    run = written().with_two_interruptions()
    account = views.history(follow(run)).account
    told = [(cause, ms) for cause, ms, _ in account.causes]
    assert told == [("step", 60_000), ("redone", 30_000), ("end", 10_000), ("absent", 30_000)]
    assert (account.of_held, account.of_held_perfect) == (0.6, 1.0)
    found = goodput.fold(goodput_records.read(run.dir))
    assert found.causes == dict(told)
    assert [(number, attempt) for number, attempt, _, _ in account.restarts] == [(1, True), (2, False), (3, True)]
    assert [dict(causes) for _, _, _, causes in account.restarts] == [dict(+resume.causes) for resume in found.resumes]


def test_a_loss_that_is_not_finite_is_shown_as_none_and_the_snapshot_stays_json(written):
    run = written()
    run.claim()
    run.train(2, loss=lambda step: float("nan"))
    followed = follow(run)
    assert views.figures(followed, "k", run.now_s).loss is None
    assert views.run_curves(followed)["line"]["text_loss"]["mean"] == [None, None]
    json.dumps(views.snapshot(followed, "k", run.now_s), allow_nan=False)


def test_points_after_a_step_are_those_that_a_client_lacks(written):
    followed = follow(written().with_two_interruptions())
    points = views.newer_points(followed, 57)
    assert (points["step"], points["incarnation"]) == ([58, 59, 60], [3, 3, 3])
    assert points["tokens_per_s"]["mean"] == [1000.0] * 3
    assert views.newer_points(followed, 60)["step"] == []
    assert [column for column, _ in views.expert_load(followed, 58)["columns"]] == [57, 58, 59]


def test_a_job_is_shown_without_its_files():
    job = Job(
        id="nano-ab12", name="nano", run_dir="/runs/nano", run_file="secret: 1", cluster="local", cluster_file="x: 1",
        slots=1, budgets={}, submitted_s=1.0, changed_s=2.0, state="running", attempt=2, reason="goes on",
    )  # fmt: skip
    view = asdict(views.job_view(job, "key"))
    assert (view["id"], view["run"], view["state"], view["attempt"]) == ("nano-ab12", "key", "running", 2)
    assert "secret" not in json.dumps(view)


def test_a_paused_schedule_has_no_next_firing():
    schedule = Schedule(
        name="nightly", cron="0 20 * * *", timezone="UTC", run_name="nano", run_dir="/r", run_file="", cluster="local",
        cluster_file="", slots=1, budgets={}, paused=True,
    )  # fmt: skip
    assert views.schedule_view(schedule, 5.0).next_s is None
