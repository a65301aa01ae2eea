"""What `openmoe warm` compiles is what an incarnation of that layout needs."""

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: with one device and little optimization compiling takes seconds. JAX forgets in between.
STORY = """
import json, sys
import jax
import numpy as np
from openmoe.model import sharding
from openmoe.pipelines import heldout
from openmoe.pipelines.loader import Loader
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec
from openmoe.platform.train import compile_ahead, compile_cache, evaluation, train_loop

loaded = spec.load("quickstart", [*sys.argv[3:], f"run_dir={sys.argv[1]}/run"])
ahead = compile_ahead.compile_ahead(loaded)["compiled"]
jax.clear_caches()
run = RunDir(loaded.run_dir)
run.create(loaded)
params = train_loop.train(loaded, run, run.claim(), sys.argv[2], lambda record: None).params

evaluates = spec.load("quickstart", [*sys.argv[3:], f"run_dir={sys.argv[1]}/run", "data.validation_share=0.1",
                                     "eval={every_steps: 1}"])
compile_ahead.compile_ahead(evaluates)
jax.clear_caches()
events, mesh = compile_ahead.Counted(), sharding.make_mesh(**evaluates.mesh.model_dump())
held_out = heldout.HeldOut(("wiki",), np.zeros(2, np.int64), tuple(Loader(sys.argv[2]).records(0, 2)), 128)
arrays = heldout.batch(held_out, 0, evaluation.rows_at_once(evaluates))
with compile_cache.used(evaluates, events) as programs:
    batch = sharding.put_batch(mesh, {key: values[None] for key, values in arrays.items()})
    evaluation.eval_step(evaluates, mesh)(params, batch)
    programs.tell()
print(json.dumps([events.newest["compiled"], ahead,
                  *(event for event in run.events() if event["event"] == "compiled")]))
"""
SMALL = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.steps=2", "train.batch_rows=8", "train.checkpoint_every_steps=2"),
    *("train.sample_tokens=0", "mesh.expert=1", "cluster.num_workers=1", "cluster.devices_per_worker=1"),
)


@pytest.mark.timeout(180)
def test_the_first_incarnation_loads_what_was_compiled_ahead_up_to_its_first_step_and_for_evaluations(
    small_data, tmp_path, quickly
):
    environment = os.environ | quickly | {"JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": ""}
    command = [sys.executable, "-c", STORY, str(tmp_path), small_data.path, *SMALL]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    evaluated, ahead, before, after, *_ = json.loads(result.stdout.splitlines()[-1])
    assert (ahead["loaded"], ahead["fetched"], ahead["programs"] > 10) == (0, 0, True)
    assert before["fetched"] > 10
    assert after["programs"] > before["programs"] > 10
    assert after["loaded"] == after["programs"]
    assert evaluated["loaded"] == evaluated["programs"] > 0
