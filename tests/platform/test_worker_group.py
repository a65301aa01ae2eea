"""A worker group under a real Ray: one JAX process group on CPU, and honest evidence of how it ended."""

import os
import signal

import pytest

from openmoe.platform import spec, verdict

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def run_group(ray_local, tmp_path_factory):
    """Runs a function on 2 workers x 2 virtual devices; functions are defined in tests, so Ray ships them by value."""
    from openmoe.platform import worker_group

    folder = tmp_path_factory.mktemp("group")
    loaded = spec.load("quickstart", [f"run_dir={folder}"])

    def run(worker, **config):
        return worker_group.run_incarnation(worker, config, loaded, name=worker.__name__)

    return run


def test_workers_on_cpu_form_one_process_group_that_exchanges_data(run_group, tmp_path):
    def exchange(config):
        import jax
        import numpy as np
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec as P

        mesh = jax.make_mesh((4,), ("expert",))
        own = jax.make_array_from_callback(
            (4,), NamedSharding(mesh, P("expert")), lambda index: np.arange(4.0, dtype=np.float32)[index]
        )
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))(own)
        with open(f"{config['folder']}/{jax.process_index()}", "w") as file:
            file.write(f"{jax.process_count()} {jax.local_device_count()} {float(total)}")

    assert run_group(exchange, folder=str(tmp_path)) is None
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"0": "2 2 6.0", "1": "2 2 6.0"}


def test_a_killed_worker_is_a_host_fault(run_group):
    def die(config):
        import jax

        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    assert verdict.diagnose(run_group(die)).cause == "host_fault"


def test_an_exception_in_a_worker_is_bad_code_with_its_trace(run_group):
    def fail(config):
        import jax

        if jax.process_index() == 1:
            raise KeyError("no such layer")

    found = verdict.diagnose(run_group(fail))
    assert found.cause == "bad_code"
    assert "no such layer" in found.reason
    assert "in fail" in found.trace
