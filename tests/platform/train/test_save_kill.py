"""kill -9 at any moment of a save leaves the newest accepted checkpoint in force: real processes, the real Saver."""

import json
import os
import subprocess
import sys

import pytest

# The first process counts the file operations of a save below the run directory (Python's audit events, in whatever
# thread). Then, for one after the other of them, a process goes on from the newest accepted checkpoint and is killed
# by SIGKILL right before that operation. All are forks of one that has imported everything, before JAX has started.
STORY = """
import json, os, signal, sys, threading
import jax, numpy as np
from openmoe.model import checkpoint
from openmoe.platform.run_file import spec
from openmoe.platform.train import restore
from openmoe.platform.run.lineage import Position
from openmoe.platform.train.recorder import Recorder
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.train.saver import Saver

loaded = spec.load("quickstart", [f"run_dir={sys.argv[1]}/run", "train.keep_checkpoints=2"])
run = RunDir(loaded.run_dir)
run.create(loaded)
ACCEPTED = -1  # not a number: right after the acceptance
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.link", "os.rmdir", "shutil.rmtree")

def train_on(kill_at):
    # Goes on from the newest accepted checkpoint, takes a step, and saves; returns the file operations of the save.
    claim, seen, lock = run.claim(), [], threading.Lock()
    with Recorder(run, claim, lambda record: None, row_tokens=1) as recorder:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.ShapeDtypeStruct((64, 8), np.float32, sharding=device)
        step, weights = 0, np.zeros((64, 8), np.float32)
        if claim.resumes:
            accepted = next(a for a in run.acceptances() if a.number == claim.resumes)
            state, facts = restore.restored(run, accepted, {"weights": like, "bias": like})
            step, weights = accepted.step, np.asarray(state["weights"])
            assert (weights == step).all(), weights
            assert facts["next_row"] == 4 * step
        recorder.begin(Position(step, 4 * step), "", 0)
        saver = Saver(loaded, run, claim, recorder, data_id="rows")
        state = jax.device_put({"weights": weights + 1, "bias": weights - 1})

        def watch(event, arguments):
            if event in OPERATIONS and arguments and str(arguments[0]).startswith(run.path):
                with lock:
                    if len(seen) + 1 == kill_at or (kill_at == ACCEPTED and "accepted" in seen):
                        os.kill(os.getpid(), signal.SIGKILL)
                    seen.append("accepted" if event == "os.link" and "/accepted/" in arguments[1] else event)

        sys.addaudithook(watch)
        saver.save(state, Position(step + 1, 4 * step + 4))
        saver.wait()
    return len(seen)

def forked(kill_at):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writing, str(train_on(kill_at)).encode())
            os._exit(0)
        except BaseException as error:
            os.write(writing, repr(error).encode())
            os._exit(1)
    os.close(writing)
    said = os.read(reading, 10_000).decode()
    _, status = os.waitpid(child, 0)
    os.close(reading)
    return os.waitstatus_to_exitcode(status), said

code, operations = forked(0)
assert code == 0, operations
told = [[code, int(operations), 0, 1]]
points = [1 + k * int(operations) // int(sys.argv[2]) for k in range(int(sys.argv[2]))] + [ACCEPTED]
for kill_at in points:
    before = run.newest_accepted().step
    code, said = forked(kill_at)
    told.append([code, kill_at, before, run.newest_accepted().step])
    assert code == -9, (kill_at, code, said)
code, said = forked(0)
assert code == 0, said
left = run.stored_checkpoints()
print(json.dumps({"told": told, "steps": [a.step for a in run.acceptances()], "left": left}))
"""
KILLS = 7


@pytest.mark.timeout(240)
def test_killed_at_any_operation_of_a_save_a_run_goes_on_from_its_newest_accepted_checkpoint(tmp_path):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", STORY, str(tmp_path), str(KILLS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    (_, operations, *_), *kills = found["told"]
    assert operations > 30
    assert len(kills) == KILLS + 1
    gained = [after - before for *_, before, after in kills]
    assert (gained[0], gained[-1]) == (0, 1)
    assert set(gained) == {0, 1}  # 1: it was accepted before it was killed
    assert found["steps"] == list(range(1, len(found["steps"]) + 1))
    assert len(found["left"]) == 2  # what the killed ones left unfinished is gone
