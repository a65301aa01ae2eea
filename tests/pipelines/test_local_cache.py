import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openmoe.pipelines import local_cache, storage
from openmoe.pipelines.storage import StorageError

SIZE = 1000


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def remote(gcs, tmp_path):
    """Returns a function that makes the n-th object of 1000 bytes: its path and digest."""

    def make(number):
        content = bytes([number]) * SIZE
        path = storage.join(gcs, tmp_path.name, f"{number:05d}.array_record")
        storage.write_durable(path, content)
        return path, hashlib.sha256(content).hexdigest()

    return make


def hold(shard, folder, max_bytes=10 * SIZE):
    return local_cache.hold(shard[0], str(folder), sha256=shard[1], max_bytes=max_bytes)


def kept(folder):
    """The numbers of the objects whose content is kept."""
    return sorted(path.read_bytes()[0] for path in folder.iterdir() if not path.name.startswith("."))


def test_an_object_is_downloaded_once_and_the_copy_is_proven(remote, folder, monkeypatch):
    shard = remote(7)
    with hold(shard, folder) as held:
        assert Path(held.name).read_bytes() == bytes([7]) * SIZE
    monkeypatch.setattr(storage, "read_bytes", None)
    hold(shard, folder).close()


def test_a_copy_that_was_damaged_is_fetched_again(remote, folder):
    shard = remote(1)
    with hold(shard, folder) as held:
        Path(held.name).write_bytes(b"torn")
    with hold(shard, folder) as held:
        assert Path(held.name).read_bytes() == bytes([1]) * SIZE


def test_an_object_that_is_not_what_was_recorded_is_refused_and_not_kept(remote, folder):
    path, _ = remote(1)
    with pytest.raises(
        StorageError, match=r"00001\.array_record: damaged or replaced: sha256 is \w{16}, recorded was "
    ):
        hold((path, "0" * 64), folder)
    assert kept(folder) == []


def test_a_local_shard_is_checked_where_it_is(tmp_path, folder):
    path = tmp_path / "shard"
    path.write_bytes(b"rows")
    shard = (str(path), hashlib.sha256(b"rows").hexdigest())
    assert hold(shard, folder).name == str(path)
    assert not folder.exists()
    path.write_bytes(b"torn")
    with pytest.raises(StorageError, match="shard: damaged or replaced"):
        hold(shard, folder)


def test_users_of_one_machine_keep_their_shards_apart_and_to_themselves(folder):
    shard = "rows/00000.array_record", hashlib.sha256(b"rows").hexdigest()
    local_cache.hold(shard[0], str(folder), sha256=shard[1], max_bytes=SIZE, render=lambda: b"rows").close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert local_cache.default_folder().endswith(f"/openmoe-shards-{os.getuid()}")


def test_what_was_used_least_recently_goes_first_when_it_is_too_much(remote, folder):
    objects = [remote(number) for number in range(4)]
    for age, shard in enumerate(reversed(objects[:3])):
        with hold(shard, folder) as held:
            os.utime(held.name, (time.time() - 60 + age,) * 2)
    hold(objects[2], folder).close()  # the oldest, used again
    hold(objects[3], folder, max_bytes=2 * SIZE).close()
    assert kept(folder) == [2, 3]


def test_what_a_process_holds_is_never_removed(remote, folder):
    objects = [remote(number) for number in range(3)]
    code = (
        "import sys; from openmoe.pipelines import local_cache;"
        "held = local_cache.hold(sys.argv[1], sys.argv[2], sha256=sys.argv[3], max_bytes=10**6);"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, objects[0][0], str(folder), objects[0][1]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for shard in objects[1:]:
            hold(shard, folder, max_bytes=SIZE).close()
        assert kept(folder) == [0, 2]
        other.send_signal(signal.SIGKILL)
    hold(objects[2], folder, max_bytes=SIZE).close()
    assert kept(folder) == [2]


def test_a_temporary_file_of_a_download_that_was_killed_goes_when_it_is_old(remote, folder):
    folder.mkdir()
    for name, age_s in ((".new.ab.tmp", 60), (".old.ab.tmp", 2 * local_cache.STALE_S)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    hold(remote(1), folder).close()
    assert sorted(path.name for path in folder.glob(".*.tmp")) == [".new.ab.tmp"]


def test_many_readers_of_a_cache_that_is_too_small_all_get_what_they_ask_for(remote, folder):
    objects = [remote(number) for number in range(6)]

    def read(at):
        with hold(objects[at % 6], folder, max_bytes=2 * SIZE) as held:
            return Path(held.name).read_bytes() == bytes([at % 6]) * SIZE

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))
    assert len(kept(folder)) <= 3


def test_a_folder_that_cannot_be_used_is_one_line(remote, tmp_path):
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(StorageError, match=r"cache: cannot keep shards: .*; make it writable"):
        hold(remote(1), tmp_path / "cache")


def test_on_a_disk_that_is_full_before_the_cache_is_what_nobody_holds_makes_room(remote, folder, mount_disk):
    folder.mkdir()
    mount_disk(folder, "16k")
    filler = folder / ".filler"
    filler.write_bytes(bytes(4096))
    for number in range(4):
        hold(remote(number), folder, max_bytes=10**9).close()
    assert 3 in kept(folder)
    with hold(remote(3), folder):
        for shard in set(folder.glob("*.array_record")) - set(folder.glob("*00003.array_record")):
            shard.unlink()
        filler.write_bytes(bytes(3 * 4096))
        with pytest.raises(StorageError, match="the disk is full; free some space"):
            hold(remote(5), folder, max_bytes=10**9)
    assert kept(folder) == [3]
