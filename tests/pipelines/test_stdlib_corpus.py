import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard

from openmoe.pipelines import stdlib_corpus
from openmoe.pipelines.config import DataError

CAPS = {"max_text_bytes": 60_000, "max_code_bytes": 80_000}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_corpus_has_the_files_and_fields_of_the_real_ones(tmp_path):
    summary = stdlib_corpus.write_corpus(str(tmp_path), **CAPS)
    assert sorted(tree(tmp_path)) == [
        "COMPLETE.json",
        "c4/c4-train.00000-of-00001.jsonl",
        "common_crawl/2023-06/en_head_0000.json.gz.dedup.classifier.jsonl.zst",
        "the_stack/data/python/data-00000-of-00002.parquet",
        "the_stack/data/python/data-00001-of-00002.parquet",
        "wikipedia/wiki.jsonl",
    ]
    wiki = json.loads((tmp_path / "wikipedia/wiki.jsonl").read_text().split("\n")[0])
    assert sorted(wiki) == ["meta", "text"]
    assert sorted(wiki["meta"]) == ["language", "timestamp", "title", "url"]
    crawl = next(tmp_path.glob("common_crawl/*/*")).read_bytes()
    first = json.loads(zstandard.ZstdDecompressor().decompressobj().decompress(crawl).split(b"\n")[0])
    assert sorted(first) == ["pred_label", "pred_label_prob", "source", "text", "wiki_prob"]
    table = pq.read_table(tmp_path / "the_stack/data/python/data-00000-of-00002.parquet")
    assert len(table.schema.names) == 29
    assert {"content", "hexsha", "max_stars_repo_licenses", "alphanum_fraction"} <= set(table.schema.names)
    assert summary["bytes"]["the_stack"] <= 80_000
    # What Python's documentation holds differs by version.
    assert sum(summary["bytes"].values()) > {11: 100_000, 13: 96_000}.get(sys.version_info.minor, 80_000)


def test_the_corpus_is_the_same_every_time_and_is_not_written_twice(tmp_path):
    stdlib_corpus.write_corpus(str(tmp_path / "a"), **CAPS)
    stdlib_corpus.write_corpus(str(tmp_path / "b"), **CAPS)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    (tmp_path / "a/wikipedia/wiki.jsonl").write_text("the user's own edit\n")
    stdlib_corpus.write_corpus(str(tmp_path / "a"), **CAPS)
    assert (tmp_path / "a/wikipedia/wiki.jsonl").read_text() == "the user's own edit\n"


def test_an_interrupted_corpus_is_completed_and_what_is_whole_of_it_left_alone(tmp_path):
    stdlib_corpus.write_corpus(str(tmp_path / "a"), **CAPS)
    whole, [c4] = tree(tmp_path / "a"), (tmp_path / "a/c4").iterdir()
    before = c4.stat()
    (tmp_path / "a/COMPLETE.json").unlink()
    (tmp_path / "a/wikipedia/wiki.jsonl").write_bytes(b'{"text": "ha')
    stdlib_corpus.write_corpus(str(tmp_path / "a"), **CAPS)
    assert tree(tmp_path / "a") == whole
    assert (c4.stat().st_ino, c4.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_files_in_another_encoding_are_read_and_undecodable_ones_named(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n")
    (tmp_path / "broken.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/left_out.py").write_bytes(b"")
    modules, unreadable = stdlib_corpus._modules(tmp_path)
    assert [module.text for module in modules] == ["# -*- coding: latin-1 -*-\nname = 'é'\n"]
    assert unreadable == ["broken.py"]


def test_a_python_without_sources_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"no \.py files of Python's standard library"):
        stdlib_corpus._modules(tmp_path)
