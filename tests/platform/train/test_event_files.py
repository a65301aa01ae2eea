"""TensorBoard's files hold every step's scalars once, whatever was killed; read without the code that wrote."""

import math
import signal
import subprocess
import sys

import pytest

from openmoe.pipelines import storage
from openmoe.platform.run.journal import JournalError
from openmoe.platform.train import event_files as written
from openmoe.platform.train.event_files import EventFiles

RECORD = {
    "step": 7,
    "rows": [24, 28],
    "time_s": 1700000000.25,
    "step_s": 0.5,
    "loss": 2.5,
    "text_loss": 2.25,
    "z_loss": 0.125,
    "total_loss": 3.0,
    "loss_tokens": 100.0,
    "grad_norm": 1.5,
    "learning_rate": 0.25,
    "batch_checksum": [1, 2],
}
OF_EXPERTS = {
    "aux_loss": 1.125,
    "router_z_loss": 0.5,
    "drop_fraction": 0.0625,
    "tokens_left_behind": 0.03125,
    "router_confidence": 0.75,
    "expert_usage": 0.875,
    "expert_load": [[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
    "router_entropy": [0.75, 0.5, 0.25],
}
DENSE = {
    "loss/cross_entropy": 2.5,
    "loss/text_cross_entropy": 2.25,
    "loss/total": 3.0,
    "loss/z": 0.125,
    "optimizer/grad_norm": 1.5,
    "optimizer/learning_rate": 0.25,
    "speed/step_s": 0.5,
    "speed/tokens_per_s": 4096.0,  # 4 rows of 512 in half a second
}
SPARSE = DENSE | {
    "loss/router_balance": 1.125,
    "loss/router_z": 0.5,
    "router/drop_fraction": 0.0625,
    "router/tokens_left_behind": 0.03125,
    "router/confidence": 0.75,
    "router/expert_usage": 0.875,
    "expert_load/layer_0_largest": 0.25,
    "expert_load/layer_0_evenness": 1.0,
    "expert_load/layer_1_largest": 0.5,
    "expert_load/layer_1_evenness": 0.5,
    "expert_load/layer_2_largest": 1.0,
    "expert_load/layer_2_evenness": 0.0,
    "router_entropy/layer_0": 0.75,
    "router_entropy/layer_1": 0.5,
    "router_entropy/layer_2": 0.25,
}


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "tensorboard")
    return storage.join(request.getfixturevalue("gcs"), tmp_path.name, "tensorboard")


def files_of(folder, incarnation, begin, **options):
    files = EventFiles(folder, incarnation=incarnation, row_tokens=512, **options)
    files.begin(begin)
    return files


def step(number, loss=0.0):
    return RECORD | {"step": number, "loss": loss}


@pytest.mark.parametrize(("record", "values"), [(RECORD, DENSE), (RECORD | OF_EXPERTS, SPARSE)])
def test_a_step_is_written_with_these_tags_and_values(folder, event_files, record, values):
    files = files_of(folder, incarnation=3, begin=6)
    files.append(record)
    files.flush()
    [(name, [version, start, event])] = event_files(folder).items()
    assert name == "events.out.tfevents.000003-000000"
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, start.session_log.START)
    assert (event.step, event.wall_time) == (7, 1700000000.25)
    assert {value.tag: value.simple_value for value in event.summary.value} == values


def test_an_event_is_framed_as_tensorboard_s_own_writer_frames_it():
    event = {"step": 5, "file_version": "brain.Event:2"}
    expected = "1100000000000000 9d6db52e 10051a0d627261696e2e4576656e743a32 abf81e9d"
    assert written._framed(event) == bytes.fromhex(expected)


def test_incarnations_make_one_curve_from_which_undone_steps_are_gone(folder, curves):
    first = files_of(folder, incarnation=1, begin=0)
    for number in range(1, 6):
        first.append(step(number, loss=1.0))
        first.flush()
    second = files_of(folder, incarnation=2, begin=3)  # the checkpoint at step 3 was the newest
    second.append(step(4, loss=2.0))
    second.flush()
    files_of(folder, incarnation=3, begin=3).flush()  # ended before its first step
    fourth = files_of(folder, incarnation=4, begin=3)
    for number in range(4, 8):
        fourth.append(step(number, loss=4.0))
    fourth.flush()
    assert curves(folder)["loss/cross_entropy"] == {1: 1.0, 2: 1.0, 3: 1.0, 4: 4.0, 5: 4.0, 6: 4.0, 7: 4.0}
    assert storage.list_files(folder) == [
        *(f"events.out.tfevents.000001-00000{number}" for number in range(5)),
        "events.out.tfevents.000002-000000",
        "events.out.tfevents.000004-000000",
    ]


def test_another_writer_under_the_same_number_is_caught(tmp_path):
    for loss in (1.0, 2.0):
        files = files_of(str(tmp_path), incarnation=1, begin=0)
        files.append(step(1, loss))
        if loss == 2.0:
            with pytest.raises(JournalError, match=r"tfevents\.000001-000000: exists already; two processes write"):
                files.flush()
        else:
            files.flush()


def test_files_stay_few_between_saves_and_nothing_waits_for_more_than_a_hundredth_of_the_run(tmp_path):
    files, counts = files_of(str(tmp_path), incarnation=1, begin=0, flush_s=0), {}
    for number in range(1, 3001):
        files.append(step(number))
        counts[number] = len(list(tmp_path.iterdir()))
    assert (counts[100], counts[1000], counts[3000]) == (100, 292, 398)


def test_an_evaluation_after_the_last_step_is_written_though_that_step_has_closed_its_file(tmp_path, curves):
    files = files_of(str(tmp_path), incarnation=1, begin=0, flush_s=0)
    files.append(step(1, loss=1.0))
    assert len(list(tmp_path.iterdir())) == 1
    files.append_scalars(1, {"eval/loss": 2.0})
    files.flush()
    assert {tag: curves(str(tmp_path))[tag] for tag in ("loss/cross_entropy", "eval/loss")} == {
        "loss/cross_entropy": {1: 1.0},
        "eval/loss": {1: 2.0},
    }


def test_a_loss_that_is_not_finite_is_drawn_as_it_is(tmp_path, curves):
    files = files_of(str(tmp_path), incarnation=1, begin=0)
    files.append(step(1, loss=math.nan))
    files.flush()
    assert math.isnan(curves(str(tmp_path))["loss/cross_entropy"][1])


def test_kill_9_leaves_whole_files_with_all_that_was_flushed(tmp_path, curves):
    code = f"""
from openmoe.platform.train.event_files import EventFiles
files = EventFiles({str(tmp_path)!r}, incarnation=1, row_tokens=512)
files.begin(0)
for number in range(1, 10**6):
    files.append({RECORD!r} | {{"step": number}})
    if number % 3 == 0:
        files.flush()
        print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        flushed = [int(writer.stdout.readline()) for _ in range(20)][-1]
        writer.send_signal(signal.SIGKILL)
        flushed = max([flushed, *map(int, writer.stdout.read().split())])
    drawn = list(curves(str(tmp_path))["loss/cross_entropy"])
    assert drawn == list(range(1, len(drawn) + 1))
    assert len(drawn) - flushed in (0, 3)
