import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from openmoe.pipelines import storage
from openmoe.pipelines.storage import StorageError


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    return storage.join(request.getfixturevalue("gcs"), tmp_path.name)


def test_what_was_written_is_read_and_listed(folder):
    storage.write_durable(storage.join(folder, "a", "one.txt"), b"1")
    storage.write_durable(storage.join(folder, "a", "one.txt"), b"2")
    storage.write_durable(storage.join(folder, "a", "c++", "two.txt"), b"")
    assert storage.read_bytes(storage.join(folder, "a", "one.txt")) == b"2"
    assert storage.list_files(storage.join(folder, "a")) == ["one.txt"]
    found = [storage.join(folder, "a", "c++", "two.txt"), storage.join(folder, "a", "one.txt")]
    listed = storage.glob(storage.join(folder, "a", "**", "*.txt"))
    assert [(path, info.size) for path, info in listed.items()] == list(zip(found, (0, 1), strict=True))
    assert list(storage.look_up(found)) == list(listed.values())
    time.sleep(0.02)  # a local time of change is exact to a few milliseconds
    storage.write_durable(found[1], b"3")
    anew = storage.glob(found[1])[found[1]]
    assert (anew.size, anew.fingerprint != listed[found[1]].fingerprint) == (1, True)
    assert storage.exists(storage.join(folder, "a"))
    assert not storage.exists(storage.join(folder, "b"))
    assert storage.list_files(storage.join(folder, "b")) == []
    assert storage.read_if_present(storage.join(folder, "b")) is None


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*/*.jsonl", ["a/1.jsonl", "b/2.jsonl", "link/1.jsonl"]),
        ("**/*.jsonl", ["a/1.jsonl", "a/deep/3.jsonl", "b/2.jsonl", "top.jsonl"]),
        ("a/**", ["a/1.jsonl", "a/deep/3.jsonl"]),
        ("[ab]/?.jsonl", ["a/1.jsonl", "b/2.jsonl"]),
        ("./b//2.jsonl", ["./b//2.jsonl"]),
        ("b/nothing.jsonl", []),
        ("nothing/*.jsonl", []),
        ("top.jsonl/*", []),
        ("*", ["top.jsonl"]),
        ("b", []),
    ],
)
def test_local_patterns_match_as_in_a_shell(tmp_path, monkeypatch, pattern, found):
    for name in ("a/1.jsonl", "a/deep/3.jsonl", "b/2.jsonl", "b/.2.jsonl.tmp", "top.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "b" / "loop").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    assert list(storage.glob(pattern)) == found
    absolute = [f"{tmp_path}/{name}" for name in found]
    assert list(storage.glob(f"{tmp_path}/{pattern}")) == absolute


def test_a_pattern_that_gs_does_not_know_is_one_clear_line(gcs):
    with pytest.raises(
        StorageError, match=r"\*\*\.txt: cannot be listed: Invalid pattern: '\*\*' can only be an entire"
    ):
        storage.glob(storage.join(gcs, "**.txt"))


def test_the_second_creator_is_refused_and_changes_nothing(folder):
    path = storage.join(folder, "claims", "7")
    assert storage.create_if_absent(path, b"first")
    assert not storage.create_if_absent(path, b"second")
    assert storage.read_bytes(path) == b"first"


def test_one_of_eight_racing_creators_wins(folder):
    path = storage.join(folder, "race")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda i: storage.create_if_absent(path, b"%d" % i), range(8)))
    assert created.count(True) == 1
    assert storage.read_bytes(path) == b"%d" % created.index(True)


def test_a_missing_file_is_one_clear_line(folder):
    path = storage.join(folder, "nothing")
    with pytest.raises(StorageError) as error:
        storage.read_bytes(path)
    assert str(error.value).startswith(f"{path}: cannot be read: no such file")
    assert "\n" not in str(error.value)


def test_folders_are_listed_without_the_files_beside_them_and_what_is_deeper(folder):
    for name in ("run.json", "b/run.json", "a/accepted/000001.json"):
        storage.write_durable(storage.join(folder, *name.split("/")), b"{}")
    assert storage.list_folders(folder) == ["a", "b"]
    assert storage.list_folders(f"{folder}/") == ["a", "b"]
    assert storage.list_folders(storage.join(folder, "b")) == []
    assert storage.list_folders(storage.join(folder, "c")) == []


def test_a_folder_is_removed_with_all_that_is_in_it_and_nothing_beside_it(folder):
    for name in ("4/digest", "4/params/0", "40/digest"):
        storage.write_durable(storage.join(folder, *name.split("/")), b"bits")
    assert storage.folder_bytes(storage.join(folder, "4")) == 8
    for _ in range(2):
        storage.remove_folder(storage.join(folder, "4"))
        assert storage.list_folders(folder) == ["40"]
        assert not storage.exists(storage.join(folder, "4"))
    assert storage.read_bytes(storage.join(folder, "40", "digest")) == b"bits"


def test_temporary_files_of_a_killed_writer_are_never_listed(tmp_path):
    (tmp_path / ".receipt.json.0123.tmp").write_bytes(b"half")
    assert storage.list_files(str(tmp_path)) == []
    assert storage.glob(str(tmp_path / "*")) == {}


def test_permission_denied_is_one_clear_line(tmp_path, needs):
    needs(os.geteuid() == 0, "root to become another user")
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    (secret / "file").write_bytes(b"x")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "file").write_bytes(b"x")
    for parent in [tmp_path, *list(tmp_path.parents)[:3]]:
        parent.chmod(parent.stat().st_mode | 0o055)  # /tmp stays everybody's
    os.seteuid(65534)
    try:
        with pytest.raises(StorageError, match="permission denied; change its permissions"):
            storage.read_bytes(str(secret / "file"))
        for pattern in ("*", "file", "sub/*.jsonl", "**/*.jsonl"):
            with pytest.raises(StorageError, match=r"secret.*permission denied"):
                storage.glob(str(secret / pattern))
        for pattern in ("*/file", "**/file", "**"):  # beside a folder that can be read, so that something is found
            with pytest.raises(StorageError, match=r"secret/.*: permission denied"):
                storage.glob(str(tmp_path / pattern))
        with pytest.raises(StorageError, match=r"cannot be written \(1 bytes\): permission denied"):
            storage.write_durable(str(secret / "new"), b"x")
    finally:
        os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path, mount_disk):
    mount_disk(tmp_path, "64k")
    return tmp_path


@pytest.mark.parametrize("write", [storage.write_durable, storage.create_if_absent])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_behind(small_disk, write):
    path = str(small_disk / "shard")
    with pytest.raises(StorageError, match="the disk is full; free some space") as error:
        write(path, bytes(100_000))
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []
