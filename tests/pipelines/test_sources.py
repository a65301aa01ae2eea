import gzip
import io
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openmoe.pipelines import documents, sources, storage
from openmoe.pipelines.config import DataError, SourceConfig
from openmoe.pipelines.sources import BadLine, Document

DIRT = (
    b'{"text": "line\\nbreak and \xe2\x80\xa8 and \xc2\x85"}\n'
    b'{"meta": {"a": NaN}, "text": "lone \\ud83d surrogate"}\r\n'
    b'{"meta": "repr", "text": "paired \\ud83d\\ude00"}\n'
    b'{"text": "truncated\n'
    b'{"text": "bad \xff byte"}\n'
    b'{"meta": {}}\n'
    b'{"text": null}\n'
    b'{"text": 5}\n'
    b'["text"]\n'
    b'{"text": "  "}\n'
    b"\n" + b"[" * 50_000 + b"\n"
    b'{"text": "nul \\u0000 and no newline at the end"}'
)
GOOD = [
    ("line\nbreak and \u2028 and \x85", False),
    ("lone \ufffd surrogate", True),
    ("paired \U0001f600", False),
    ("nul \x00 and no newline at the end", False),
]
BAD = ["bad_json", "not_utf8", "no_text", "no_text", "not_string", "no_text", "empty", "empty", "bad_json"]


def source(pattern, **settings) -> SourceConfig:
    return SourceConfig(**{"name": "s", "format": "redpajama", "paths": (str(pattern),), "weight": 1.0} | settings)


def read_all(config: SourceConfig, unit_bytes: int = 2**20) -> list[Document | BadLine]:
    return [record for unit in sources.inventory(config, unit_bytes) for record in sources.read(unit)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_good_lines_survive_among_bad_ones_and_each_bad_one_has_its_reason(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](DIRT))
    records = read_all(source(tmp_path / "*"))
    assert [(r.text, r.repaired) for r in records if isinstance(r, Document)] == GOOD
    assert [r.reason for r in records if isinstance(r, BadLine)] == BAD
    for record in records:
        line = DIRT[record.offset :].split(b"\n", 1)[0]
        assert isinstance(record, Document) or record.raw == line


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.just("text") | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def nearly_json(draw):
    """JSON, some bytes of which are others, more or gone, between blanks; or any bytes."""
    record = draw(JSON | st.fixed_dictionaries({"text": st.text(), "meta": JSON}))
    line = bytearray(json.dumps(record, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass"))
    for at, taken, put in draw(
        st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2), st.binary(max_size=2)), max_size=2)
    ):
        line[at : at + taken] = put
    blank = st.sampled_from([b"", b" ", b"\t", b"\r", b"\x0b", b"\xef\xbb\xbf", b"\xc2\xa0"])
    return draw(st.sampled_from([draw(blank) + bytes(line) + draw(blank), draw(st.binary(max_size=20))]))


@given(line=nearly_json())
@example(line=b"")
@example(line=b" \r\t")
@example(line=b"\x1c")
@example(line=b"\xc2\xa0")
@example(line=b' {"text": "a"}')
@example(line=b'{"text": "a"} ')
@example(line=b'{"text": "a"}{"text": "b"}')
@example(line=b'{"text": "a", "text": "b"}')
@example(line=b'{"text": "a", "text": null}')
@example(line=b'{"text": "\\ud83d\\ude00 \\ud800"}')
@example(line=b'{"text": "\xed\xa0\x80"}')
@example(line=b'{"text": "a", "meta": "\xff"}')
@example(line=b'{"text": "a", "meta": "\\x"}')
@example(line=b'{"text": "a\tb"}')
@example(line=b'{"text": "a", "meta": [NaN, -Infinity, 1e999, -0, 1E5, 0.1]}')
@example(line=b'{"text": "a", "meta": 01}')
@example(line=b'{"text": "a", "meta": ' + b"1" * 5000 + b"}")
@example(line=b'{"text": "a", "meta": ' + b"[" * 5000 + b"]" * 5000 + b"}")
@example(line=b'\xef\xbb\xbf{"text": "a"}')
@settings(deadline=None, max_examples=200)
def test_a_line_is_what_json_loads_says_whatever_its_bytes(line):
    record = documents.parse_line("file", 7, line)
    try:
        said = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        assert record == BadLine("file", 7, "not_utf8", line)
    except (ValueError, RecursionError):
        assert record == BadLine("file", 7, "bad_json" if line.strip() else "empty", line)
    else:
        text = said.get("text") if isinstance(said, dict) else None
        if isinstance(text, str) and text.strip():
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            assert record == Document("file", 7, whole.encode(), repaired=whole != text)
        else:
            reason = "no_text" if text is None else "empty" if isinstance(text, str) else "not_string"
            assert record == BadLine("file", 7, reason, line)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@given(
    lines=st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 9)), max_size=30),
    unit_bytes=st.integers(1, 200),
    suffix=st.sampled_from(list(COMPRESS)),
)
@settings(deadline=None, max_examples=60)
def test_any_bytes_in_any_cut_never_crash_and_never_lose_a_good_line(tmp_path_factory, lines, unit_bytes, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a.jsonl{suffix}"
    good = [f"document {line}" for line in lines if isinstance(line, int)]
    content = b"\n".join(
        json.dumps({"text": f"document {line}"}).encode() if isinstance(line, int) else line for line in lines
    )
    path.write_bytes(COMPRESS[suffix](content))
    config = source(path, max_document_bytes=35)
    documents = [r.text for r in read_all(config, unit_bytes) if isinstance(r, Document)]
    assert [text for text in documents if text in set(good)] == good


@st.composite
def damaged_files(draw):
    """A name and any bytes, or those of a good file with some of them changed or cut off."""
    suffix = draw(st.sampled_from(["jsonl.gz", "jsonl.zst", "parquet", "txt", "txt.gz"]))
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    parquet = io.BytesIO()
    pq.write_table(pa.table({"content": ["one", None, "two"] * 5}), parquet, row_group_size=4)
    good = {"parquet": parquet.getvalue(), "txt": lines, "jsonl.zst": zstandard.compress(lines)}
    content = bytearray(good.get(suffix) or gzip.compress(lines, mtime=0))
    for at, byte in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)):
        content[at] = byte
    cut = content[: draw(st.integers(0, len(content)))]
    return f"a.{suffix}", draw(st.sampled_from([bytes(content), bytes(cut), draw(st.binary(max_size=60))]))


@given(file=damaged_files(), unit_bytes=st.integers(1, 100))
@settings(deadline=None, max_examples=60)
def test_a_damaged_file_of_any_format_is_read_or_refused_in_one_line_that_names_it(tmp_path_factory, file, unit_bytes):
    name, content = file
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    kind = {"parquet": "the_stack", "txt": "text"}.get(name.split(".")[1], "redpajama")
    records, refused = [], ""
    try:
        records = read_all(source(path, format=kind), unit_bytes)
    except (DataError, storage.StorageError) as error:
        refused = str(error)
    assert all(isinstance(record, Document | BadLine) for record in records)
    assert refused.startswith(f"{path}: ") or not refused
    assert "\n" not in refused


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 10_000])
def test_byte_ranges_own_the_lines_that_start_in_them(tmp_path, unit_bytes):
    (tmp_path / "a.jsonl").write_bytes(DIRT)
    records = read_all(source(tmp_path / "a.jsonl"), unit_bytes if unit_bytes > 1 else 997)
    assert [r.offset for r in records] == [r.offset for r in read_all(source(tmp_path / "a.jsonl"))]


# A line of each subset, in the shapes in which it is met: the files, the sample, copies of the loaders' output.
SUBSET_LINES = {
    "arxiv": b'{"text":"\\\\section{One}","meta":{"timestamp":"2023-03-29T17:03:41","yymm":"2303","arxiv_id":"2303.1",'
    b'"language":"en","url":"https://arxiv.org/abs/2303.1","source":"arxiv"}}',
    "book": b'{"meta":{"short_book_title":"A","publication_date":1869,"url":"http://a"},"text":"\\n\\nOne"}',
    "c4": b'{"text": "One", "meta": {"timestamp": "2019-04-25T12:57:54Z", "url": "https://a", "language": "en", '
    b'"source": "c4"}}',
    "common_crawl": b'{"pred_label":"__label__wiki","pred_label_prob":0.57,"wiki_prob":0.57,"text":"One",'
    b'"source":"cc/2019-30/en_head_0000.json.gz/line1"}',
    "github": b'{"text":"One","meta":{"content_hash":"0a","timestamp":"","source":"github","line_count":1,'
    b'"max_line_length":3,"avg_line_length":3.0,"alnum_prop":1.0,"path":"a.py"}}',
    "stackexchange": b'{"text": "Q: One\\nA: two", "meta": {"language": "en", "url": "https://a", '
    b'"timestamp": "2023-03", "source": "stackexchange", "question_score": "12"}}',
    "wikipedia": b'{"text": "One", "meta": {"title": "A", "url": "https://a", "language": "de", '
    b'"timestamp": "20230320"}}',
    "sample, meta as JSON text": b'{"text": "One", "meta": "{\\"url\\": \\"https://a\\"}", "red_pajama_subset": "c4"}',
    "sample, meta as Python's repr": b'{"text": "One", "meta": "{\'url\': \'https://a\', \'n\': None}"}',
}


@pytest.mark.parametrize("line", SUBSET_LINES.values(), ids=SUBSET_LINES)
def test_a_line_of_every_subset_is_a_document_whatever_its_meta(tmp_path, line):
    others = [b'{"text": "other", "meta": {"a": [1, {}]}}', b'{"text": "other", "meta": "x"}', b'{"text": "other"}']
    (tmp_path / "arxiv_sample.jsonl").write_bytes(b"\n".join([*others, line]))
    records = read_all(source(tmp_path / "*_sample.jsonl"))
    assert [record.text for record in records[:3]] == ["other"] * 3
    assert "One" in records[3].text
    assert records[3].offset == 91


@pytest.mark.parametrize("unit_bytes", [1, 50, 300, 10_000])
def test_a_line_that_is_too_long_costs_itself_and_is_never_held(tmp_path, unit_bytes):
    line, fitting = json.dumps({"text": "x" * 988}).encode(), json.dumps({"text": "y" * 88}).encode()
    parts = [fitting, line, fitting + b"\r", line, fitting]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(parts))
    config = source(tmp_path / "a.jsonl", max_document_bytes=100)
    records = read_all(config, unit_bytes)
    kinds = [getattr(record, "reason", "document") for record in records]
    assert kinds == ["document", "too_long", "document", "too_long", "document"]
    assert [record.offset for record in records] == [0, 101, 1102, 1204, 2205]
    assert {len(record.raw) for record in records if isinstance(record, BadLine)} == {102}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    packed = read_all(source(tmp_path / "a.jsonl.gz", max_document_bytes=100))
    assert [record._replace(path="") for record in packed] == [record._replace(path="") for record in records]


def test_every_text_file_is_one_document_and_small_ones_share_a_unit(tmp_path):
    contents = {"a.txt": b"one\ntwo\n", "b.txt.gz": gzip.compress(b"three"), "c.txt.zst": zstandard.compress(b"four"),
                "d/e.txt": b"\xff", "f.txt": b" \n", "g.txt": b"x" * 60, "h.txt": b"five"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    config = source(tmp_path / "**", format="text", max_document_bytes=59)
    sizes = [[name.removeprefix(f"{tmp_path}/") for name, _ in u.files] for u in sources.inventory(config, 60)]
    assert sizes == [["a.txt", "b.txt.gz", "c.txt.zst", "d/e.txt", "f.txt", "g.txt"], ["h.txt"]]
    for unit_bytes in (1, 60, 10_000):
        records = read_all(config, unit_bytes)
        found = [(r.path.removeprefix(f"{tmp_path}/"), getattr(r, "text", None) or r.reason) for r in records]
        assert found == [
            ("a.txt", "one\ntwo\n"), ("b.txt.gz", "three"), ("c.txt.zst", "four"), ("d/e.txt", "not_utf8"),
            ("f.txt", "empty"), ("g.txt", "too_long"), ("h.txt", "five"),
        ]  # fmt: skip


def test_languages_of_the_stack_with_signs_in_their_names_are_read_from_gs(gcs, tmp_path):
    home = storage.join(gcs, tmp_path.name)
    languages = ["c", "c++", "c-sharp", "f#", "jupyter notebook", "objective-c++", "100%25", "ren'py?"]
    for language in languages:
        stack(tmp_path / "a.parquet", content=[f"in {language}"])
        content = (tmp_path / "a.parquet").read_bytes()
        storage.write_durable(storage.join(home, "data", language, "data-00000-of-00001.parquet"), content)
    records = read_all(source(f"{home}/data/*/*.parquet", format="the_stack"))
    assert sorted(record.text for record in records) == sorted(f"in {language}" for language in languages)
    one = read_all(source(f"{home}/data/c++/*.parquet", format="the_stack"))
    assert [record.text for record in one] == ["in c++"]


def test_concatenated_zstd_frames_are_one_file(tmp_path):
    line = json.dumps({"text": "a document"}).encode() + b"\n"
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line) + zstandard.compress(line))
    assert [record.text for record in read_all(source(tmp_path / "*"))] == ["a document"] * 2


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_truncated_compressed_file_is_an_error_that_names_it(tmp_path, suffix, compress):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compress(json.dumps({"text": "x" * 99}).encode() * 9000)[:-30])
    why = r"a\.jsonl\..*: .* stream unreadable after .* bytes of text \(Truncated compressed stream\); get it again"
    with pytest.raises(DataError, match=why):
        read_all(source(path))


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_file_whose_name_is_not_utf_8_is_refused(tmp_path):
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")).write_text('{"text": "one two"}')
    with pytest.raises(DataError, match=r"caf\\udce9\.jsonl': its name is not UTF-8; rename it$"):
        sources.inventory(source(tmp_path / "*"), 2**20)


def stack(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=2)


def test_parquet_units_are_row_groups_and_only_content_is_read(tmp_path):
    stack(tmp_path / "a.parquet", content=["one", None, " ", "four", "five"], size=[1, 2, 3, 4, 5])
    config = source(tmp_path / "*.parquet", format="the_stack")
    units = sources.inventory(config, 1)
    assert [(unit.start, unit.stop) for unit in units] == [(0, 1), (1, 2), (2, 3)]
    records = [record for unit in units for record in sources.read(unit)]
    assert [r.text for r in records if isinstance(r, Document)] == ["one", "four", "five"]
    assert [(r.offset, r.reason) for r in records if isinstance(r, BadLine)] == [(1, "no_text"), (2, "empty")]


def test_text_of_parquet_that_is_not_utf8_costs_one_row(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0])),
                                                    pa.py_buffer(b"\xff\xfefor")])  # fmt: skip
    stack(tmp_path / "a.parquet", content=broken)
    records = read_all(source(tmp_path / "a.parquet", format="the_stack"))
    assert [getattr(r, "reason", None) or r.text for r in records] == ["not_utf8", "for"]


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda f: None, {}, r"sources\.s\.paths: .*\*\.jsonl matches no file; correct it or leave the source out"),
        (lambda f: (f / "a.jsonl").write_text("x"), {"format": "the_stack"}, r"a\.jsonl: not a Parquet file"),
        (lambda f: stack(f / "a.jsonl", text=["x"], size=[1]), {"format": "the_stack"},
         r"a\.jsonl: the_stack needs column content, the file has text, size"),
        (lambda f: stack(f / "a.jsonl", content=[1]), {"format": "the_stack"},
         r"a\.jsonl: column content must hold text, it holds int64"),
        (lambda f: (f / "a.csv").write_text("x"), {"paths": ("{}/*.csv",)},
         r"a\.csv: format redpajama reads \.jsonl, \.jsonl\.zst, \.jsonl\.gz; narrow the source's paths"),
        (lambda f: (f / "c4").mkdir(), {"paths": ("{}/c4/",)},
         r"sources\.s\.paths: /.*/c4/ is a folder; name its files, such as /.*/c4/\*\.jsonl$"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_the_source_stop_the_inventory(tmp_path, make, settings, message):
    make(tmp_path)
    if "paths" in settings:
        settings = settings | {"paths": tuple(path.format(tmp_path) for path in settings["paths"])}
    with pytest.raises(DataError, match=message):
        sources.inventory(source(tmp_path / "*.jsonl", **settings), 2**20)
