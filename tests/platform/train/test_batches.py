"""What each device of a step is given: real JAX processes, meshes whose ranks are not in order, every position."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROWS, POSITIONS = 8, range(40)
FITTING = ("model.group_size=128", "train.checkpoint_every_steps=1")
# Devices 0 to 3 are of process 0, 4 to 7 of process 1. The tensor axis varies fastest: neighbours lie along it.
LAYOUTS = {
    "ranks in order": ({"data": 2, "expert": 2, "tensor": 2}, [0, 1, 2, 3, 4, 5, 6, 7]),
    "tensor over both processes": ({"data": 2, "expert": 2, "tensor": 2}, [0, 4, 1, 5, 2, 6, 3, 7]),
    "ranks permuted": ({"fsdp": 2, "expert": 2, "tensor": 2}, [6, 1, 3, 4, 0, 7, 5, 2]),
    "rows on no more than two hosts": ({"data": 2, "tensor": 4}, [7, 0, 5, 2, 1, 6, 3, 4]),
    "one wide tensor axis": ({"tensor": 8}, [3, 7, 2, 6, 1, 5, 0, 4]),
}


def check(process, port, manifest, expected):
    """Runs in one of two processes: reads what its devices are to have, and compares; prints how much it compared."""
    import jax

    from openmoe.model import sharding
    from openmoe.pipelines.loader import Loader
    from openmoe.platform.run_file import spec
    from openmoe.platform.train import train_loop

    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    of_run = spec.load("quickstart", ["data.seq_len=128", f"train.batch_rows={ROWS}", "train.microbatches=2", *FITTING])
    whole = dict(np.load(expected))
    checked = {}
    for name, (axes, order) in LAYOUTS.items():
        devices = jax.devices()
        mesh = sharding.make_mesh(**axes, devices=[devices[n] for n in order])
        for first in POSITIONS if name == "ranks permuted" else (0, 13):
            batch = train_loop.global_batch(of_run, mesh, Loader(manifest), first_row=first)  # as after a restart
            for key, array in batch.items():
                wanted = whole[key][first : first + ROWS].reshape(2, ROWS // 2, 128)
                for shard in array.addressable_shards:
                    np.testing.assert_array_equal(np.asarray(shard.data), wanted[shard.index], f"{name} {key} {first}")
        along_tensor = mesh.devices.reshape(-1, mesh.shape["tensor"])
        spans = any(len({device.process_index for device in line}) > 1 for line in along_tensor)
        checked[name] = [len(array.addressable_shards), len({str(s.index) for s in array.addressable_shards}), spans]
    print(json.dumps(checked))


def test_every_device_gets_its_rows_whatever_the_order_of_ranks_and_wherever_a_run_goes_on(small_data, tmp_path):
    from openmoe.pipelines.loader import Loader

    np.savez(tmp_path / "expected.npz", **Loader(small_data.path).rows(0, POSITIONS[-1] + ROWS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, __file__]
    arguments = [str(port), small_data.path, str(tmp_path / "expected.npz")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, str(n), *arguments], **pipes) for n in range(2)]
    try:
        found = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], found[0][1] + found[1][1]
    checked = [json.loads(out.splitlines()[-1]) for out, _ in found]
    # Devices of a process, how many different rows they want, and whether a line along tensor crosses processes.
    assert checked[0] == {
        "ranks in order": [4, 2, False],
        "tensor over both processes": [4, 4, True],
        "ranks permuted": [4, 4, True],
        "rows on no more than two hosts": [4, 2, True],
        "one wide tensor axis": [4, 1, True],
    }


@pytest.fixture
def begun(small_data, tmp_path):
    """The manifest of a copy of the data of which one group is missing."""
    from openmoe.pipelines import manifest as manifests
    from openmoe.pipelines.passes import Passes

    shutil.copytree(small_data.data_dir, tmp_path / "data")
    copy = manifests.load(str(tmp_path / "data" / "manifests" / Path(small_data.path).name))
    folder = Path(copy.pass_folder(0, 0))
    for name in ("pass.json", "00001.json", "00001.array_record"):
        (folder / name).unlink()
    assert Passes(copy).rows(0) == []
    return copy


def test_steps_that_are_ahead_of_the_build_render_their_rows_and_say_so(begun, small_data):
    from openmoe.model import sharding
    from openmoe.pipelines.loader import Loader
    from openmoe.platform.run.lineage import Position
    from openmoe.platform.run_file import spec
    from openmoe.platform.train import train_loop

    class Events:
        def __init__(self):
            self.seen = []

        def event(self, kind, **facts):
            self.seen.append((kind, facts))

        def flush(self):
            pass

    of_run = spec.load("quickstart", ["data.seq_len=128", f"train.batch_rows={ROWS}", "train.steps=5", *FITTING])
    recorder, beats, metrics, rendered = Events(), [], [], []
    mesh = sharding.make_mesh(expert=8)
    begins, tell = Position(step=2, next_row=16), lambda: rendered.append(1)
    with train_loop.Batches(of_run, mesh, Loader(begun.path), begins, tell) as coming:
        for first in (16, 24, 32):
            batch, of_step = coming.take(recorder, lambda: beats.append(1))
            metrics.append(of_step)
            wanted = Loader(small_data.path).rows(first, first + ROWS)
            for key in train_loop.BATCH_KEYS:
                np.testing.assert_array_equal(np.asarray(batch[key])[0], wanted[key])
    assert recorder.seen == [("renders_data", {"missing": "group 1 of pass 0 of wiki"})]
    assert len(beats) == len(rendered) == 1
    assert [of_step["rendered_groups"] for of_step in metrics] == [1, 0, 0]
    assert metrics[0]["data_wait_s"] > 0


if __name__ == "__main__":
    check(*sys.argv[1:])
