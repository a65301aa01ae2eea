"""A row is told down to the bytes of the files that it was made of."""

import hashlib
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openmoe.pipelines import explain, manifest, passes, sources, token_cache, tokenizer
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig
from openmoe.pipelines.loader import Loader


def words(start, count):
    return " ".join(f"number {start + i} follows {start + i - 1}" for i in range(count))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(documents by file and offset, manifest path): 30 lines with bad ones between them, 12 rows of Parquet."""
    folder = tmp_path_factory.mktemp("build")
    documents, lines = {}, b""
    for i in range(30):
        documents[f"{folder}/wiki.jsonl", len(lines)] = text = words(100 * i, 20 + i)
        lines += json.dumps({"text": text}).encode() + b"\nnot json\n"
    (folder / "wiki.jsonl").write_bytes(lines)
    code = [f"def f{i}():\n    return {words(i, 30)!r}\n" for i in range(12)]
    documents |= {(f"{folder}/code.parquet", i): text for i, text in enumerate(code)}
    pq.write_table(pa.table({"content": code}), folder / "code.parquet", row_group_size=5)
    config = DataConfig(
        tokenizer="builtin:small_8192",
        seq_len=128,
        seed=3,
        unit_bytes=8_000,
        group_tokens=4_000,
        sources=(
            SourceConfig(name="wiki", format="redpajama", paths=(f"{folder}/wiki.jsonl",), weight=1),
            SourceConfig(name="code", format="the_stack", paths=(f"{folder}/code.parquet",), weight=1),
        ),
    )
    text = tokenizer.load(config.tokenizer)
    units = {source.name: sources.inventory(source, config.unit_bytes) for source in config.sources}
    receipts = {
        name: [token_cache.tokenize(u, text, f"{folder}/data/tokens") for u in us] for name, us in units.items()
    }
    everything = [unit for of_source in units.values() for unit in of_source]
    made = manifest.assemble(manifest.manifest_path(f"{folder}/data", config, text, everything), config, text, receipts)
    manifest.commit(made)
    for source in (0, 1):
        groups = [passes.pack_group(made, source, 0, group) for group in range(len(made.groups(source, 0)))]
        passes.finish(made, source, 0, groups)
    return documents, made.path


def whole(segment):
    """The piece of the document again: each sentinel of the inputs replaced by what the targets say for it."""
    hidden, name = {}, ""
    for part in segment.targets:
        name = part.text if part.kind == "sentinel" else name
        hidden[name] = part.text if part.kind == "text" else hidden.get(name, "")
    said = {part.text: hidden.pop(part.text, "") for part in segment.inputs if part.kind == "sentinel"}
    pieces = (part for part in segment.inputs if part.kind in ("text", "sentinel"))
    text = "".join(said[part.text] if part.kind == "sentinel" else part.text for part in pieces)
    return text + hidden.get("", "")


def test_every_segment_of_every_row_is_the_piece_of_the_document_it_names(build):
    documents, path = build
    text = tokenizer.load("builtin:small_8192")
    kinds = set()
    for row in range(Loader(path).num_rows):
        found = explain.explain(path, row)
        assert sum(s.num_inputs + s.num_targets for s in found.segments) == found.slots <= found.seq_len == 128
        for segment in found.segments:
            document = documents[segment.origin.file, segment.origin.offset]
            assert segment.origin.hash == hashlib.blake2b(document.encode(), digest_size=16).hexdigest()
            assert segment.origin.unit == ("row" if segment.origin.file.endswith(".parquet") else "byte")
            piece = text.encode([document])[0][segment.start : segment.start + segment.length]
            assert whole(segment).strip() == text.decode(piece).strip()
            kinds.add(segment.denoiser)
    assert kinds >= {"R3", "R8", "X3", "X8", "S"}


def test_the_roles_are_told_apart(build):
    for row in itertools.count():
        segments = explain.explain(build[1], row).segments
        if found := [s for s in segments if s.denoiser == "X8"]:
            break
    [prompt, *_], inputs = found[0].inputs, [part.kind for part in found[0].inputs]
    assert prompt.text == "[NLG]"
    assert (inputs[0], inputs[-1]) == ("prompt", "end")
    sentinels = [part.text for part in found[0].inputs if part.kind == "sentinel"]
    assert sentinels == [f"<extra_id_{i}>" for i in range(len(sentinels))]
    assert [part.text for part in found[0].targets if part.kind == "sentinel"] == sentinels


def test_where_a_row_lies_is_said(build):
    loader = Loader(build[1])
    found = explain.explain(build[1], 7)
    at = loader.locate(7, 8)[0]
    stream = manifest.load(build[1]).stream_names[at.stream]
    assert (found.row, found.stream, found.pass_number) == (7, stream, at.number)
    assert found.shard.endswith(f"/0000/{at.group:05d}.array_record")
    assert found.row_in_shard == at.row
    loss = np.count_nonzero(loader.rows(7, 8)["loss_weights"])
    assert loss == sum(s.num_targets for s in found.segments)


def test_a_row_that_is_not_built_is_refused(build):
    with pytest.raises(DataError, match=r"rows \[1000000, 1000001\) were asked for"):
        explain.explain(build[1], 1_000_000)
