"""Storage that refuses, fails, is slow or cuts connections: a proxy in front of the real emulator, over HTTP."""

import asyncio
import contextlib
import hashlib
import http.client
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from openmoe.pipelines import local_cache, sources, storage
from openmoe.pipelines.config import SourceConfig
from openmoe.pipelines.storage import StorageDenied, StorageUnavailable


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the emulator; `faults` are taken one by one by requests of their method.

    A fault is (method, kind): "denied" answers 403, "refused" 503 before the request is passed on, "lost" after it,
    "cut" closes the connection in the middle of the answer, "slow" waits half a second.
    """

    daemon_threads = True

    def __init__(self, emulator):
        super().__init__(("127.0.0.1", 0), Handler)
        self.emulator, self.faults, self.requests = emulator, [], []
        self.lock = threading.Lock()

    def fault(self, method):
        with self.lock:
            found = next((fault for fault in self.faults if fault[0] == method), (method, ""))
            with contextlib.suppress(ValueError):
                self.faults.remove(found)
            return found[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, body, dict(self.headers.items())))
        fault = self.server.fault(self.command)
        if fault == "denied":
            return self.answer(403, [], b"you may read")
        if fault == "refused":
            return self.answer(503, [], b"try later")
        if fault == "slow":
            time.sleep(0.5)
        connection = http.client.HTTPConnection(self.server.emulator)
        headers = {name: value for name, value in self.headers.items() if name not in ("Host", "Accept-Encoding")}
        connection.request(self.command, self.path, body, headers)
        got = connection.getresponse()
        content = got.read()
        connection.close()
        if fault == "lost":
            return self.answer(503, [], b"try later")
        headers = [h for h in got.getheaders() if h[0] not in ("Content-Length", "Transfer-Encoding", "Connection")]
        return self.answer(got.status, headers, content, cut=fault == "cut")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET  # noqa: N815

    def answer(self, status, headers, content, *, cut=False):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def proxy(gcs, monkeypatch):
    """The proxy, through which `storage` reaches gs:// in this test."""
    import os

    server = Proxy(urllib.parse.urlsplit(os.environ["STORAGE_EMULATOR_HOST"]).netloc)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    client = storage._client(endpoint_url=url, token="anon", skip_instance_cache=True)
    monkeypatch.setattr(storage, "_gcs", lambda: client)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(gcs, tmp_path):
    return storage.join(gcs, tmp_path.name)


def test_the_emulator_refuses_the_second_creator_in_the_way_our_code_asks(proxy, folder):
    path = storage.join(folder, "claim")
    assert storage.create_if_absent(path, b"first")
    [asked] = [request for request in proxy.requests if request[0] == "POST"]
    assert "ifGenerationMatch=0" in asked[1]

    def ask_again():
        connection = http.client.HTTPConnection(proxy.emulator)
        connection.request(*asked)
        return connection.getresponse().status

    assert ask_again() == 412
    storage.remove_files([path])
    assert [ask_again(), ask_again()] == [200, 412]
    assert storage.read_bytes(path) == b"first"


def test_an_inventory_of_texts_is_one_listing_with_the_sizes_that_each_file_gives_of_itself(proxy, folder):
    paths = [storage.join(folder, name) for name in ("a/1.txt", "a/b/2.txt", "a/b/3.txt", "c/4.txt")]
    for path in paths:
        storage.write_durable(path, path.encode())
    proxy.requests.clear()
    config = SourceConfig(name="s", format="text", paths=(storage.join(folder, "**", "*.txt"),), weight=1.0)
    [unit] = sources.inventory(config, 2**20)
    assert [request[0] for request in proxy.requests] == ["GET"]
    entries = [storage._gcs().info(path) for path in paths]  # as earlier builds asked for them
    assert [*unit.files] == [
        (p, f"{e['size']}:{e['crc32c']}/{e['generation']}") for p, e in zip(paths, entries, strict=True)
    ]


def test_who_may_not_write_is_told_so_at_once(proxy, folder):
    proxy.faults.append(("POST", "denied"))
    with pytest.raises(StorageDenied, match=r"a: cannot be written \(1 bytes\): Forbidden: .* you may read"):
        storage.write_durable(storage.join(folder, "a"), b"1")


def test_a_file_that_may_be_replaced_is_asked_for_without_a_condition(proxy, folder):
    for content in (b"first", b"second"):
        storage.write_durable(storage.join(folder, "shard"), content)
    assert [path for _, path, *_ in proxy.requests if "ifGenerationMatch" in path] == []
    assert storage.read_bytes(storage.join(folder, "shard")) == b"second"


@pytest.mark.parametrize("kind", ["refused", "slow", "cut"])
def test_a_read_gets_the_whole_content_after_a_fault(proxy, folder, kind):
    content = bytes(range(256)) * 2000
    storage.write_durable(storage.join(folder, "shard"), content)
    proxy.faults += [("GET", kind)]
    assert storage.read_bytes(storage.join(folder, "shard")) == content
    assert proxy.faults == []


@pytest.mark.parametrize("kind", ["refused", "lost", "slow", "cut"])
def test_a_write_is_whole_after_a_fault(proxy, folder, kind):
    proxy.faults += [("POST", kind)]
    storage.write_durable(storage.join(folder, "shard"), b"rows" * 1000)
    assert storage.read_bytes(storage.join(folder, "shard")) == b"rows" * 1000
    assert proxy.faults == []


@pytest.mark.parametrize(("kind", "created"), [("refused", True), ("slow", True), ("lost", False)])
def test_a_claim_is_made_once_whatever_becomes_of_the_answer(proxy, folder, kind, created):
    proxy.faults += [("POST", kind)]
    assert storage.create_if_absent(storage.join(folder, "claim"), b"mine") == created
    assert not storage.create_if_absent(storage.join(folder, "claim"), b"another")
    assert storage.read_bytes(storage.join(folder, "claim")) == b"mine"


def test_a_shard_whose_download_is_cut_is_never_half_in_the_cache(proxy, folder, tmp_path):
    content = bytes(range(256)) * 2000
    storage.write_durable(storage.join(folder, "shard"), content)
    proxy.faults += [("GET", "cut"), ("GET", "refused")]
    sha256 = hashlib.sha256(content).hexdigest()
    with local_cache.hold(storage.join(folder, "shard"), str(tmp_path), sha256=sha256, max_bytes=10**6) as held:
        assert held.read(0) == b""
    [kept] = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert kept.read_bytes() == content


def test_storage_that_refuses_for_ever_is_one_line(proxy, folder, monkeypatch, caplog):
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda delay_s, *result: sleep(min(delay_s, 0.01), *result))
    proxy.faults += [("GET", "refused")] * 20
    with pytest.raises(StorageUnavailable, match=r"shard: cannot be read: .*503") as error:
        storage.read_bytes(storage.join(folder, "shard"))
    assert "\n" not in str(error.value)
    assert "out of retries" in caplog.text
    assert "Traceback" not in caplog.text
