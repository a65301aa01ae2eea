import base64
import gzip
import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openmoe.pipelines import sources, token_cache, tokenizer
from openmoe.pipelines.config import DataError, SourceConfig

TEXT = tokenizer.load("builtin:small_8192")


def tokenized(folder, pattern, **settings):
    """The receipts of a source's units, tokenized into `folder`."""
    config = SourceConfig(**{"name": "s", "format": "redpajama", "paths": (str(pattern),), "weight": 1.0} | settings)
    return [token_cache.tokenize(unit, TEXT, str(folder)) for unit in sources.inventory(config, 2**20)]


def test_a_unit_is_parquet_with_ids_source_file_offset_and_hash_of_each_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one two"}\n{broken\n{"text": "three \\ud800 four"}\n')
    [receipt] = tokenized(tmp_path / "tokens", tmp_path / "a.jsonl")
    table = pq.read_table(tmp_path / "tokens" / f"{receipt['key']}.parquet")
    assert str(table.schema) == (
        "source: string not null\nfile: string not null\noffset: uint64 not null\n"
        "hash: fixed_size_binary[16] not null\n"
        "tokens: list<element: uint32 not null> not null\n  child 0, element: uint32 not null"
    )
    texts = ["one two", "three \ufffd four"]
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    assert table.column("hash").to_pylist() == hashes
    assert table.column("offset").to_pylist() == [0, 28]
    assert table.column("source").to_pylist() == ["s", "s"]
    assert table.column("file").to_pylist() == [str(tmp_path / "a.jsonl")] * 2
    assert table.column("tokens").to_pylist() == [ids.tolist() for ids in TEXT.encode(texts)]
    assert (receipt["documents"], receipt["repaired"], receipt["bad"]) == (2, 1, {"bad_json": 1})


def test_the_file_of_an_earlier_version_is_read_as_it_was(tmp_path):
    ids = pa.ListArray.from_arrays(pa.array([0, 2, 5], pa.int32()), pa.array([7, 8, 9, 256_299, 9], pa.uint32()))
    table = pa.table({"hash": pa.array([b"a" * 16, b"b" * 16], pa.binary(16)), "tokens": ids})
    pq.write_table(table, tmp_path / "old.parquet", compression="zstd", use_dictionary=False)
    sha256 = hashlib.sha256((tmp_path / "old.parquet").read_bytes()).hexdigest()
    read = token_cache.read(str(tmp_path), "old", sha256=sha256)
    assert (read.tokens.tolist(), read.lengths.tolist()) == ([7, 8, 9, 256_299, 9], [2, 3])
    documents = token_cache.documents(str(tmp_path), "old", sha256=sha256)
    assert (documents.hashes.tobytes(), documents.lengths.tolist()) == (b"a" * 16 + b"b" * 16, [2, 3])
    assert [lengths.tolist() for lengths in token_cache.lengths(str(tmp_path / "old.parquet"))] == [[2, 3]]


@pytest.mark.parametrize("kind", ["redpajama", "text"])
def test_a_file_that_changes_before_it_is_read_up_becomes_no_unit(tmp_path, kind):
    names = {"redpajama": ("a.jsonl",), "text": ("a.txt", "b.txt")}[kind]
    for name in names:
        (tmp_path / name).write_text('{"text": "one two"}\n')
    config = SourceConfig(name="s", format=kind, paths=(str(tmp_path / "*"),), weight=1.0)
    [unit] = sources.inventory(config, 2**20)
    with (tmp_path / names[-1]).open("a") as file:
        file.write('{"text": "three four"}\n')
    with pytest.raises(DataError, match=rf"/{names[-1]}: changed while it was read; build again when nothing writes"):
        token_cache.tokenize(unit, TEXT, str(tmp_path / "tokens"))
    assert not (tmp_path / "tokens").exists()


def test_documents_have_the_same_identity_in_any_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three four five"}\n')
    (tmp_path / "b.jsonl").write_text('\n{"text": "one two", "meta": 1}\n\n{"text": "three four five"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "one two"}\n{"text": "three four six"}\n')
    names = ("a.jsonl", "b.jsonl", "c.jsonl")
    here, there, other = (tokenized(tmp_path / "tokens", tmp_path / name)[0] for name in names)
    assert here["sha256"] != there["sha256"]
    assert here["documents_sha256"] == there["documents_sha256"] != other["documents_sha256"]
    found = token_cache.documents(str(tmp_path / "tokens"), there["key"], sha256=there["sha256"])
    assert found.sha256() == here["documents_sha256"]


def test_texts_of_one_unit_keep_their_files(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"words of {name}")
    [receipt] = tokenized(tmp_path / "tokens", tmp_path / "*.txt", format="text")
    table = pq.read_table(tmp_path / "tokens" / f"{receipt['key']}.parquet")
    assert table.column("file").to_pylist() == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_what_is_left_out_is_kept_aside_byte_for_byte_up_to_a_bound_and_counted_beyond(tmp_path):
    bad = [b"{\xff\xfe", b'{"text": ' + b"7" * 5000, b'{"text": "' + b"x" * 6000 + b'"}', b'{"text": "a"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b'{"text": "one two"}', *bad, *[b"[]"] * 1100]))
    [receipt] = tokenized(tmp_path / "tokens", tmp_path / "a.jsonl", max_document_bytes=5500)
    assert receipt["bad"] == {"bad_json": 1, "no_text": 1100, "not_utf8": 1, "one_token": 1, "too_long": 1}
    assert [sample["offset"] for sample in receipt["bad_samples"][:3]] == [20, 24, 5034]
    assert len(receipt["bad_samples"]) == 20
    lines = (tmp_path / "tokens" / f"{receipt['key']}.bad.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert len(kept) == 1000
    assert {line["path"] for line in kept} == {str(tmp_path / "a.jsonl")}
    assert [base64.b64decode(kept[0]["base64"]), kept[0]["reason"], kept[0]["offset"]] == [bad[0], "not_utf8", 20]
    assert [kept[1]["line"], kept[1]["bytes"]] == [bad[1].decode()[:4096], 5009]
    assert [kept[2]["line"], kept[2]["reason"]] == [bad[2].decode()[:4096], "too_long"]


def test_a_compressed_file_becomes_parts_of_a_window_each_that_a_killed_worker_goes_on_with(tmp_path):
    lines = [json.dumps({"text": f"line {i} " + "word " * (i % 50)}).encode() for i in range(300)]
    lines += [b"{bad", json.dumps({"text": "x " * 6000}).encode(), *lines]  # one longer than two windows
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    config = SourceConfig(name="s", format="redpajama", paths=(str(tmp_path / "a.jsonl.gz"),), weight=1.0)
    [unit] = sources.inventory(config, 1000)
    whole = token_cache.tokenize(unit, TEXT, str(tmp_path / "whole"))
    assert token_cache.parts(whole) == [whole]
    assert unit.key() == replace(unit, window_bytes=64 * 2**20).key() != replace(unit, window_bytes=5000).key()

    windowed = replace(unit, window_bytes=5000)
    receipt = token_cache.tokenize(windowed, TEXT, str(tmp_path / "parts"))
    parts = token_cache.parts(receipt)
    assert [part["key"] for part in parts] == [f"{receipt['key']}-{number:05d}" for number in range(18)]
    assert {token_cache.unit_key(part) for part in parts} == {receipt["key"]}
    assert sorted(part["text_bytes"] > 5000 for part in parts) == [False] * 17 + [True]
    read = [token_cache.read(str(tmp_path / "parts"), part["key"], sha256=part["sha256"]) for part in parts]
    expected = token_cache.read(str(tmp_path / "whole"), whole["key"], sha256=whole["sha256"])
    assert [n for part in read for n in part.lengths.tolist()] == expected.lengths.tolist()
    assert [n for part in read for n in part.tokens.tolist()] == expected.tokens.tolist()
    assert [part["bad"] for part in parts if part["bad"]] == [whole["bad"]] == [{"bad_json": 1}]

    files = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    for name in (
        *(f"{part['key']}.json" for part in parts[1::2]),
        f"{parts[3]['key']}.parquet",
        f"{receipt['key']}.json",
    ):
        (tmp_path / "parts" / name).unlink()
    kept = tmp_path / "parts" / f"{parts[2]['key']}.parquet"
    kept.write_bytes(b"not written again, since its receipt is there")
    assert token_cache.tokenize(windowed, TEXT, str(tmp_path / "parts")) == receipt
    assert kept.read_bytes().startswith(b"not written again")
    kept.write_bytes(files[kept.name])
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == files


PEAKS = """
import gzip, pathlib, resource, sys
from dataclasses import replace
from openmoe.pipelines import sources, token_cache, tokenizer
from openmoe.pipelines.config import DataError, SourceConfig

folder, text = pathlib.Path(sys.argv[1]), tokenizer.load("builtin:small_8192")
for windows in (2, 12):
    line = b'{"text": "' + b"0123456789" * 5_000 + b'"}\\n'
    with gzip.open(folder / f"{windows}.jsonl.gz", "wb", 1) as file:
        for _ in range(20 * windows):
            file.write(line)
    config = SourceConfig(name="s", format="redpajama", paths=(f"{folder}/{windows}.jsonl.gz",), weight=1.0)
    [unit] = sources.inventory(config, 2**20)
    unit = replace(unit, window_bytes=2**20)
    print(len(token_cache.parts(token_cache.tokenize(unit, text, f"{folder}/tokens"))))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_compressed_file_of_many_windows_takes_the_memory_of_one(tmp_path):
    said = subprocess.run([sys.executable, "-c", PEAKS, str(tmp_path)], capture_output=True, text=True, check=True)
    few, peak, many, peak_of_many = map(int, said.stdout.split())
    assert (few, many) == (2, 12)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (peak_of_many - peak) * unit < 16 * 2**20  # the ids of all windows are 48 MB


def test_two_builds_of_a_unit_write_the_same_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one two"}\n' * 50 + b"\xff\n" * 50)
    trees = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        tokenized(folder, tmp_path / "a.jsonl")
        trees.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert trees[0] == trees[1]
    assert len(trees[0]) == 3


@pytest.mark.parametrize("library", ["sentencepiece", "pyarrow"])
def test_another_version_of_a_library_that_shapes_the_bytes_is_another_unit(tmp_path, monkeypatch, library):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one two"}\n')
    config = SourceConfig(name="s", format="redpajama", paths=(str(tmp_path / "a.jsonl"),), weight=1.0)
    [unit] = sources.inventory(config, 2**20)
    before = token_cache.key(unit, tokenizer.Tokenizer("builtin:small_8192"))
    monkeypatch.setattr(f"{library}.__version__", "0.0.1")
    assert token_cache.key(unit, tokenizer.Tokenizer("builtin:small_8192")) != before
