"""Segments are merged while they are written and read: no record is missed or met twice, wherever the writer dies."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmoe.pipelines import storage
from openmoe.pipelines.storage import StorageUnavailable
from openmoe.platform.run import journal
from openmoe.platform.run.journal import Journal, JournalError, JournalReader


class Killed(BaseException):
    """The writer is dead from here on."""


@pytest.fixture
def small_merges(monkeypatch):
    monkeypatch.setattr(journal, "MERGED_SEGMENTS", (8, 4, 2))


def write(folder, numbers, **owner):
    written = Journal(folder, **({"incarnation": 1, "process": 0} | owner))
    for number in numbers:
        written.append({"n": number})
        written.flush()
        yield number


def numbers(records):
    return [record["n"] for _, _, record in records]


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "metrics")
    return storage.join(request.getfixturevalue("gcs"), tmp_path.name)


def test_ten_segments_become_one_whose_parts_go_at_the_next_merge(folder):
    reader, seen = JournalReader(folder), []
    for _ in write(folder, range(21)):
        seen += numbers(reader.new())
    assert seen == list(range(21))
    assert numbers(journal.read(folder)) == list(range(21))
    assert storage.list_files(folder) == [
        "000001-00000-000000-000009.jsonl",
        "000001-00000-000010-000019.jsonl",
        *(f"000001-00000-0000{number}.jsonl" for number in range(10, 21)),
    ]


def test_months_of_segments_leave_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "create_if_absent", lambda path, data: files.update({path: data}) is None)
    monkeypatch.setattr(storage, "remove_files", lambda paths: [files.pop(path) for path in paths])
    files = {}
    most = max(len(files) for _ in write("run/metrics", range(8_640)))
    assert most == 45  # among them 8 of 1,000, 9 of 100, 9 of 10
    assert len(files) == 28


def test_a_reader_goes_on_in_the_middle_of_a_merged_segment(tmp_path, small_merges):
    reader, writer = JournalReader(str(tmp_path)), write(str(tmp_path), range(11))
    for _ in range(3):
        next(writer)
    assert numbers(reader.new()) == [0, 1, 2]
    list(writer)
    assert next(path.name for path in sorted(tmp_path.iterdir())) == "000001-00000-000000-000007.jsonl"
    assert not (tmp_path / "000001-00000-000003.jsonl").exists()
    assert numbers(reader.new()) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert numbers(reader.new()) == []


def test_wherever_the_writer_is_killed_every_durable_record_is_read_once(tmp_path, small_merges, monkeypatch):
    create, remove, operations = storage.create_if_absent, storage.remove_files, []

    def operate(operation, *arguments):
        operations.append(operation)
        if len(operations) == dies_at:
            raise Killed
        result = operation(*arguments)
        seen.extend(numbers(reader.new()))
        return result

    monkeypatch.setattr(storage, "create_if_absent", lambda *arguments: operate(create, *arguments))
    monkeypatch.setattr(storage, "remove_files", lambda paths: [operate(remove, [path]) for path in paths])
    dies_at, survived = 0, False
    while not survived:
        dies_at += 1
        folder = str(tmp_path / str(dies_at))
        reader, seen, flushed = JournalReader(folder), [], []
        operations.clear()
        try:
            flushed.extend(write(folder, range(17)))
            survived = True
        except Killed:
            pass
        durable = numbers(journal.read(folder))
        assert durable == seen == list(range(len(durable)))
        assert durable[: len(flushed)] == flushed
        operations.extend([None] * dies_at)
        list(write(folder, [100, 101, 102], incarnation=2))
        assert numbers(journal.read(folder)) == [*durable, 100, 101, 102]
    assert dies_at == 44


@pytest.mark.parametrize("lost", ["the request", "the answer"])
def test_whichever_operation_the_storage_refuses_once_a_writer_that_goes_on_loses_nothing(
    tmp_path, small_merges, monkeypatch, lost
):
    """A writer may go on after such a failure, as a driver does; what it could not close it closes later."""
    create, remove, operations = storage.create_if_absent, storage.remove_files, []

    def operate(operation, *arguments):
        operations.append(operation)
        if len(operations) != fails_at:
            return operation(*arguments)
        if lost == "the answer":
            operation(*arguments)
        raise StorageUnavailable("no answer")

    monkeypatch.setattr(storage, "create_if_absent", lambda *arguments: operate(create, *arguments))
    monkeypatch.setattr(storage, "remove_files", lambda paths: [operate(remove, [path]) for path in paths])
    for fails_at in range(1, 44):
        folder = str(tmp_path / str(fails_at))
        reader, seen, failures = JournalReader(folder), [], 0
        operations.clear()
        written = Journal(folder, incarnation=1, process=0)
        for number in range(17):
            written.append({"n": number})
            try:
                written.flush()
            except StorageUnavailable:
                failures += 1
            seen += numbers(reader.new())
        written.flush()
        seen += numbers(reader.new())
        assert (failures, seen) == (1, list(range(17)))
        assert numbers(journal.read(folder)) == list(range(17))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(0, 60), st.integers(0, 12))
def test_from_its_end_a_journal_is_the_same_while_it_is_written(tmp_path_factory, small_merges, flushes, taken, more):
    folder = str(tmp_path_factory.mktemp("journal"))
    for incarnation, count in enumerate(flushes[:-1], 1):
        list(write(folder, range(count), incarnation=incarnation))
    writer = write(folder, range(flushes[-1] + more), incarnation=len(flushes))
    for _ in range(flushes[-1]):
        next(writer)
    expected = list(journal.read(folder))[::-1]
    records = journal.newest_first(folder)
    found = list(itertools.islice(records, taken))
    list(writer)  # merges what is still to be read, and removes its parts
    assert found + list(records) == expected if taken else list(records) == list(journal.read(folder))[::-1]
    newest = {(n, 0): {"n": count - 1} for n, count in enumerate(flushes[:-1], 1)}
    assert journal.last_records(folder) == newest | {(len(flushes), 0): {"n": flushes[-1] + more - 1}}


def test_the_newest_records_cost_the_newest_files_alone(tmp_path, monkeypatch):
    list(write(str(tmp_path), range(123)))
    real, read = storage.read_if_present, []
    monkeypatch.setattr(storage, "read_if_present", lambda path: read.append(path) or real(path))
    assert numbers(itertools.islice(journal.newest_first(str(tmp_path)), 10)) == list(range(122, 112, -1))
    assert len(read) == 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_slow_reader_with_torn_listings_misses_nothing_and_meets_nothing_twice(tmp_path_factory, small_merges, data):
    folder = str(tmp_path_factory.mktemp("journal"))
    flushes = data.draw(st.integers(1, 40), label="flushes")
    writer, real = write(folder, range(flushes)), storage.list_files

    def torn(path):
        """What a listing may say while the writer goes on: it is sure only of files that were there all the time."""
        nonlocal patience
        patience -= 1
        if patience < 0:
            return real(path)
        before = set(real(path))
        for _ in range(data.draw(st.integers(0, 12), label="flushes during the listing")):
            next(writer, None)
        after = set(real(path))
        unsure = sorted(before ^ after)
        chosen = data.draw(st.sets(st.sampled_from(unsure)) if unsure else st.just(set()), label="seen")
        for _ in range(data.draw(st.integers(0, 5), label="flushes before the files are read")):
            next(writer, None)
        return sorted((before & after) | chosen)

    reader, seen, patience = JournalReader(folder), [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "list_files", torn)
        for _ in range(4):
            patience = 3
            seen += numbers(reader.new())
            assert seen == list(range(len(seen)))
    list(writer)
    seen += numbers(reader.new())
    assert seen == list(range(flushes)) == numbers(journal.read(folder))


def test_a_lost_segment_is_named_and_can_be_given_up(tmp_path):
    list(write(str(tmp_path), range(3)))
    lost = tmp_path / "000001-00000-000001.jsonl"
    lost.unlink()
    for read in (journal.read, journal.newest_first):
        with pytest.raises(JournalError, match=r"00000-000001\.jsonl: is gone, and later ones are there; restore it"):
            list(read(str(tmp_path)))
    lost.touch()
    assert numbers(journal.read(str(tmp_path))) == [0, 2]


def test_what_a_writer_holds_to_merge_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MERGED_BYTES", 100)
    list(write(str(tmp_path), ["x" * 30] * 25))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"000001-00000-{n:06d}.jsonl" for n in range(25)]
    assert len(numbers(journal.read(str(tmp_path)))) == 25
