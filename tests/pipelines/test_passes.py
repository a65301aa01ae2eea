"""Passes of a small build, packed in this process: order and noise of their own, and waiting for a missing one."""

import collections
import hashlib
import itertools
import json
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import mixture, passes, shards, sources, storage, token_cache, tokenizer
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig, StageConfig
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.passes import Group, Passes


def words(start, count):
    """Text that is the same everywhere, without a corpus."""
    return " ".join(f"number {start + i} follows {start + i - 1}" for i in range(count))


@pytest.fixture
def corpus(tmp_path):
    """40 documents of one source, 10 of the other."""
    for name, count in (("wiki", 40), ("code", 10)):
        lines = (json.dumps({"text": words(100 * i, 20 + i)}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def config(corpus, weights=(3.0, 1.0), stages=()) -> DataConfig:
    of_sources = tuple(
        SourceConfig(name=name, format="redpajama", paths=(f"{corpus}/{name}.jsonl",), weight=weight)
        for name, weight in zip(("wiki", "code"), weights, strict=True)
    )
    tiny = {"seq_len": 128, "seed": 3, "unit_bytes": 8_000, "group_tokens": 4_000}
    return DataConfig(tokenizer="builtin:small_8192", sources=of_sources, stages=stages, **tiny)


def tokenized(config, folder) -> manifests.Manifest:
    """The manifest of a build without any pass, made without Ray."""
    text = tokenizer.load(config.tokenizer)
    units = {source.name: sources.inventory(source, config.unit_bytes) for source in config.sources}
    receipts = {
        name: [token_cache.tokenize(unit, text, f"{folder}/tokens") for unit in of_source]
        for name, of_source in units.items()
    }
    everything = [unit for of_source in units.values() for unit in of_source]
    path = manifests.manifest_path(str(folder), config, text, everything)
    manifests.commit(manifests.assemble(path, config, text, receipts))
    return manifests.load(path)


def pack(manifest, source, number):
    receipts = [passes.pack_group(manifest, source, number, g) for g in range(len(manifest.groups(source, number)))]
    passes.finish(manifest, source, number, receipts)


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def segments_of(manifest, source, number):
    """All segments of a pass in the order in which they are stored, one SEGMENT table."""
    tables = []
    for group, receipt in enumerate(Passes(manifest).groups[source][number]):
        path = storage.join(manifest.pass_folder(source, number), f"{group:05d}.array_record")
        shard = shards.Shard(path, sha256=receipt["sha256"], cache_dir="")
        tables += [shards.decode(record)[1] for record in shard.read(list(range(receipt["rows"])))]
    return np.concatenate(tables)


def test_the_next_pass_holds_the_same_documents_in_another_order_with_other_noise(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    pack(manifest, 0, 0)
    pack(manifest, 0, 1)
    first, second = segments_of(manifest, 0, 0), segments_of(manifest, 0, 1)
    documents = [np.unique(table[["unit", "document"]]) for table in (first, second)]
    tokens = [int(table["length"].sum()) for table in (first, second)]
    assert [len(found) for found in documents] == [40, 40]
    assert (documents[0] == documents[1]).all()
    assert tokens == [18407, 18407]
    kinds = [np.bincount(table["denoiser"], minlength=6).tolist() for table in (first, second)]
    assert kinds == [[32, 19, 17, 22, 22, 91], [20, 21, 12, 22, 25, 97]]
    orders = [table[["unit", "document"]][:20].tolist() for table in (first, second)]
    assert orders[0] != orders[1]


def test_identities_of_builds_without_stages_stay_what_they_always_were():
    of_sources = (
        SourceConfig(name="wiki", format="redpajama", paths=("w/*",), weight=1),
        SourceConfig(name="code", format="the_stack", paths=("c/*",), weight=3.0),
    )
    plain = DataConfig(tokenizer="builtin:small_8192", seq_len=512, seed=0, sources=of_sources)
    text = tokenizer.load(plain.tokenizer)
    receipts = {"wiki": [{"documents_sha256": "11", "tokens": 5}], "code": [{"documents_sha256": "22", "tokens": 5}]}
    manifest = manifests.assemble("/d/manifests/x.json", plain, text, receipts)
    assert manifest.data_id == "15cca119115d62b79a8465bee3d9cb21"
    assert [s.passes for s in manifest.streams] == ["passes/wiki-c6bd860477373bdf", "passes/code-3b9c0c0adfa885b5"]
    assert manifests.manifest_path("/d", plain, text, []) == "/d/manifests/4bec624a64bf2b5223bafccf.json"


def test_identities_of_builds_with_stages_of_ul2_stay_what_they_always_were():
    of_sources = (
        SourceConfig(name="wiki", format="redpajama", paths=("w/*",)),
        SourceConfig(name="code", format="the_stack", paths=("c/*",)),
    )
    of_stages = (
        StageConfig(until_tokens=5120, weights={"wiki": 1}),
        StageConfig(weights={"wiki": 1, "code": 3.0}),
    )
    staged = DataConfig(tokenizer="builtin:small_8192", seq_len=512, seed=0, sources=of_sources, stages=of_stages)
    text = tokenizer.load(staged.tokenizer)
    receipts = {"wiki": [{"documents_sha256": "11", "tokens": 5}], "code": [{"documents_sha256": "22", "tokens": 5}]}
    manifest = manifests.assemble("/d/manifests/x.json", staged, text, receipts)
    assert manifest.data_id == "62a344f660ae0413be3c8cfe847a8f89"
    assert [s.passes for s in manifest.streams] == ["passes/wiki-c6bd860477373bdf", "passes/code-3b9c0c0adfa885b5"]
    assert manifests.manifest_path("/d", staged, text, []) == "/d/manifests/fae2c236f048b3c01411dc72.json"


def test_rows_of_a_build_stay_what_they_always_were(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    pack(manifest, 0, 0)
    pack(manifest, 1, 0)
    loader = Loader(manifest.path)
    records = loader.records(0, loader.num_rows)
    assert manifest.data_id == "4d0f06d02321e992479b1633fc9c6c5e"
    assert (len(records), hashlib.sha256(b"".join(records)).hexdigest()[:16]) == (89, "77e965821b19fe7c")


def test_stages_are_part_of_what_identifies_the_data(corpus, tmp_path):
    def build(*ends_and_weights):
        stages = tuple(StageConfig(until_tokens=end, weights=weights) for end, weights in ends_and_weights)
        return tokenized(config(corpus, (None, None), stages), tmp_path / "data")

    first = build((1280, {"wiki": 1, "code": 0}), (None, {"wiki": 1, "code": 1}))
    later = build((2560, {"wiki": 1}), (None, {"wiki": 1, "code": 1}))
    other = build((1280, {"wiki": 1}), (None, {"wiki": 3, "code": 1}))
    assert len({first.data_id, later.data_id, other.data_id, tokenized(config(corpus), tmp_path / "data").data_id}) == 4
    assert first.stages == ((10, (1, 0)), (None, (1, 1)))
    assert [stream.passes for stream in first.streams] == [stream.passes for stream in other.streams]


MIXED = (
    StageConfig(until_tokens=128 * 60, weights={"wiki": 1}),
    StageConfig(until_tokens=128 * 200, weights={"code": 3, "wiki": 1}, objective="next_token"),
    StageConfig(weights={"wiki": 1, "code": 1}, objective="prefix_lm"),
)


@pytest.fixture
def mixed(corpus, tmp_path):
    """A build of three objectives, five streams: no code under UL2."""
    return tokenized(config(corpus, (None, None), MIXED), tmp_path / "data")


@st.composite
def staged(draw):
    """Weights, objectives and ends of up to four stages over three sources, each read somewhere."""
    ends = sorted(draw(st.sets(st.integers(1, 2500), max_size=3)))
    weights = st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1)
    kinds = st.sampled_from(["ul2", "next_token", "prefix_lm"])
    stages = [StageConfig(until_tokens=64 * end, weights=draw(weights), objective=draw(kinds)) for end in ends]
    return (*stages, StageConfig(weights={name: draw(st.integers(1, 9)) for name in "abc"}, objective=draw(kinds)))


@given(stages=staged(), rows=st.lists(st.integers(1, 400), min_size=4, max_size=9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=12)
def test_whatever_the_stages_every_row_of_every_pass_is_read_once_before_the_next_pass_begins(stages, rows, seed):
    of_sources = tuple(SourceConfig(name=name, format="redpajama", paths=("x",)) for name in "abc")
    data = DataConfig(tokenizer="builtin:small_8192", seq_len=64, seed=seed, sources=of_sources, stages=stages)
    receipts = {name: [{"documents_sha256": name, "tokens": 9}] for name in "abc"}
    with tempfile.TemporaryDirectory() as folder:
        manifest = manifests.assemble(f"{folder}/manifests/x.json", data, tokenizer.load(data.tokenizer), receipts)
        manifests.commit(manifest)
        every = itertools.product(range(len(manifest.streams)), range(3))
        sizes = dict(zip(every, itertools.cycle(rows), strict=False))
        for (stream, number), size in sizes.items():
            passes.finish(manifest, stream, number, [{"rows": size}, {"rows": 2 * size}])
        loader = Loader(manifest.path)
        read = loader.locate(0, loader.num_rows)
    for stream in range(len(manifest.streams)):
        of_stream = [record for record in read if record.stream == stream]
        assert [record.number for record in of_stream] == sorted(record.number for record in of_stream)
        assert len(set(of_stream)) == len(of_stream)
        orders = [[record[2:] for record in of_stream if record.number == number] for number in range(3)]
        for (number, order), after in zip(enumerate(orders), orders[1:], strict=False):
            assert not after or len(order) == 3 * sizes[stream, number]
            assert len(after) < 30 or order[:30] != after[:30]


def test_a_stream_is_a_source_under_an_objective_with_passes_of_its_own(mixed, corpus, tmp_path):
    assert [(stream.source, stream.objective) for stream in mixed.streams] == [
        (0, "ul2"), (0, "next_token"), (1, "next_token"), (0, "prefix_lm"), (1, "prefix_lm"),
    ]  # fmt: skip
    assert mixed.stream_names == ["wiki ul2", "wiki next_token", "code next_token", "wiki prefix_lm", "code prefix_lm"]
    assert mixed.stages == ((60, (1, 0, 0, 0, 0)), (200, (0, 1, 3, 0, 0)), (None, (0, 0, 0, 1, 1)))
    assert (mixed.first_streams, len({stream.passes for stream in mixed.streams})) == ([0, 2], 5)
    alone = tokenized(config(corpus), tmp_path / "data")
    assert alone.streams[0] == mixed.streams[0]  # shards of UL2 are shared with a build that has nothing else
    assert alone.stream_names == ["wiki", "code"]


def test_every_stage_reads_its_own_objective_and_each_stream_row_after_row_into_its_next_pass(mixed):
    for each in ((0, 0), (1, 0), *((2, number) for number in range(6)), (3, 0), (4, 0)):
        pack(mixed, *each)
    loader, finished = Loader(mixed.path), Passes(mixed)
    assert finished.epoch_rows() == finished.rows(0)[0] + finished.rows(2)[0]
    assert loader.num_rows > 220
    read, kinds = loader.locate(0, loader.num_rows), [set(), set(), set()]
    for number, record in enumerate(loader.records(0, loader.num_rows)):
        kinds[(number >= 60) + (number >= 200)] |= set(shards.decode(record)[1]["denoiser"].tolist())
    assert kinds == [{0, 1, 2, 3, 4, 5}, {6}, {5}]
    assert len(set(read)) == len(read)
    assert {record.number for record in read if record.stream == 2} == {0, 1, 2, 3, 4, 5}
    assert collections.Counter(record.stream for record in read[60:200]) == {1: 35, 2: 105}


def test_streams_of_one_source_hold_the_same_documents_in_orders_of_their_own(mixed):
    for stream in (0, 1, 3):
        pack(mixed, stream, 0)
    tables = [segments_of(mixed, stream, 0) for stream in (0, 1, 3)]
    assert [int(table["length"].sum()) for table in tables] == [18407, 18407, 18407]
    orders = [tuple(dict.fromkeys(table[["unit", "document"]].tolist())) for table in tables]
    assert [len(order) for order in orders] == [40, 40, 40]
    assert len(set(orders)) == 3


def test_a_group_that_is_rendered_on_read_is_named_with_its_objective_where_there_are_several(mixed):
    pack(mixed, 0, 0)
    told = []
    Loader(mixed.path).make_ready(100, told.append)
    assert "group 0 of pass 0 of wiki next_token" in told


def test_other_objectives_and_packings_are_other_data(corpus, tmp_path):
    plain = config(corpus)
    builds = [
        tokenized(replace(plain, **change), tmp_path / "data")
        for change in ({}, {"packing": "reference"}, {"objective": "next_token"}, {"objective": "prefix_lm"})
    ]
    assert len({build.data_id for build in builds}) == 4
    assert len({build.streams[0].passes for build in builds}) == 4
    assert len({build.stream_key(0) for build in builds}) == 4
    for build in builds[1:]:
        pack(build, 0, 0)
    assert segments_of(builds[1], 0, 0)["length"].sum() >= 18407 - 6
    assert set(segments_of(builds[2], 0, 0)["denoiser"]) == {6}
    assert set(segments_of(builds[3], 0, 0)["denoiser"]) == {5}


def test_a_manifest_from_before_there_were_streams_is_read_as_it_was_meant(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    fields = json.loads(storage.read_bytes(manifest.path))
    del fields["packing"]
    for stream, source in zip(fields.pop("streams"), fields["sources"], strict=True):
        source["passes"] = stream["passes"]
    old = tmp_path / "data" / "manifests" / "old.json"
    old.write_text(json.dumps(fields))
    assert replace(manifests.load(str(old)), path=manifest.path) == manifest


def test_a_loader_reads_every_row_of_every_pass_once_through_all_stages(corpus, tmp_path):
    stages = (
        StageConfig(until_tokens=128 * 30, weights={"wiki": 1}),
        StageConfig(until_tokens=128 * 90, weights={"code": 3, "wiki": 1}),
        StageConfig(weights={"wiki": 1, "code": 1}),
    )
    manifest = tokenized(config(corpus, (None, None), stages), tmp_path / "data")
    for each in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)):
        pack(manifest, *each)
    finished = Passes(manifest)
    assert (finished.rows(0), finished.rows(1)) == ([168, 166], [22, 23, 22, 22])
    loader = Loader(manifest.path)
    read = loader.locate(0, loader.num_rows)
    assert collections.Counter(record.stream for record in read[:30]) == {0: 30}
    assert collections.Counter(record.stream for record in read[30:90]) == {0: 18, 1: 42}
    assert len(set(read)) == len(read) == 183
    assert np.bincount([record.number for record in read if record.stream == 1]).tolist() == [22, 23, 22, 22]


def test_another_pass_changes_no_row_before_it(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    pack(manifest, 0, 0)
    pack(manifest, 1, 0)
    before = Loader(manifest.path)
    records = before.records(0, before.num_rows)
    pack(manifest, 1, 1)
    pack(manifest, 0, 1)
    after = Loader(manifest.path)
    assert after.num_rows > before.num_rows
    assert after.records(0, before.num_rows) == records


def test_a_token_cache_file_that_does_not_match_its_receipt_is_refused_in_one_line(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    path = tmp_path / "data" / "tokens" / f"{manifest.sources[0].units[0]['key']}.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        pack(manifest, 0, 0)
    assert str(error.value) == f"{path}: damaged, it does not match its receipt; delete both and build again"


def groups(stream, number, count):
    return [Group(stream, number, group) for group in range(count)]


def test_what_nobody_has_packed_is_rendered_when_it_is_read_to_the_same_bytes(corpus, tmp_path):
    ahead, read = tokenized(config(corpus), tmp_path / "ahead"), tokenized(config(corpus), tmp_path / "read")
    for each in ((0, 0), (1, 0), (1, 1)):
        pack(ahead, *each)
    pack(read, 1, 0)
    loader, told = Loader(read.path), []
    rows = 160
    assert loader.num_rows == 0
    assert loader.make_ready(rows, told.append) == 4
    assert sorted(told) == ["group 0 of pass 0 of wiki", "group 0 of pass 1 of code"] + [
        f"group {g} of pass 0 of wiki" for g in (1, 2)
    ]
    assert loader.make_ready(rows) == 0
    assert tree(tmp_path / "read" / "passes") == tree(tmp_path / "ahead" / "passes")
    assert loader.records(0, rows) == Loader(ahead.path).records(0, rows)


def test_a_host_that_renders_takes_what_another_has_finished_in_between(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    host, other = Loader(manifest.path), Loader(manifest.path)
    rendered = []
    # The group that this host has begun with is the only one that both do.
    assert host.make_ready(150, lambda group: rendered.append(other.make_ready(150))) == 1
    assert rendered == [5]
    assert host.records(0, 150) == other.records(0, 150)


def test_a_window_is_read_when_its_groups_are_packed_long_before_the_pass_is_finished(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "WINDOW_ROWS", 50)
    whole, begun = tokenized(config(corpus), tmp_path / "whole"), tokenized(config(corpus), tmp_path / "begun")
    for each in ((0, 0), (1, 0), (1, 1)):
        pack(whole, *each)
    pack(begun, 1, 0)
    for group in (0, 2):
        passes.pack_group(begun, 0, 0, group)
    found = Passes(begun)
    assert [g["rows"] for g in Passes(whole).groups[0][0]] == [63, 71, 34]
    assert (found.rows(0), found.readable(0), found.readable(1)) == ([], [50], [22])
    assert found.window_ends(0).tolist() == [50]
    assert Passes(whole).window_ends(0).tolist() == [50, 100, 150, 168]
    loader, reference = Loader(begun.path), Loader(whole.path)
    rows = loader.num_rows
    assert 50 <= rows < reference.num_rows
    assert loader.records(0, rows) == reference.records(0, rows)


def test_the_groups_of_the_next_window_come_first_and_sources_in_the_order_of_the_mixture(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(mixture, "WINDOW_ROWS", 50)
    manifest = tokenized(config(corpus), tmp_path / "data")
    found = Passes(manifest)
    assert passes.coming(found, 0, 1000, ahead=0) == [*groups(0, 0, 1), *groups(1, 0, 1)]
    for group in passes.coming(found, 0, 1000, ahead=0):
        passes.pack_group(manifest, *group)
    found.refresh()
    # Row 50 of the one is read at global row 67, row 22 of the other, of which the mixture has a quarter, at 88.
    assert (found.readable(0), found.readable(1)) == ([50], [22])
    assert passes.coming(found, 0, 1000, ahead=0) == []
    assert passes.coming(found, 0, 1000, ahead=1) == [Group(0, 0, 1), Group(1, 1, 0)]
    assert passes.coming(found, 80, 1000, ahead=0) == [Group(0, 0, 1)]
    assert passes.lacking(found, 150) == [Group(0, 0, 1), Group(1, 1, 0), Group(0, 0, 2)]


def test_a_run_wants_of_each_source_the_pass_it_reads_and_the_one_after(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    finished = Passes(manifest)
    assert finished.epoch_rows() is None
    first = [*groups(0, 0, 3), *groups(1, 0, 1)]
    assert passes.lacking(finished, 1000) == first
    assert passes.coming(finished, 0, 1000, ahead=0) == finished.first_passes() == first
    pack(manifest, 0, 0)
    pack(manifest, 1, 0)
    finished.refresh()
    assert (finished.rows(0), finished.rows(1), finished.epoch_rows()) == ([168], [22], 190)
    assert finished.first_passes() == []
    assert passes.coming(finished, 0, 1000, ahead=0) == []
    assert passes.coming(finished, 0, 1000, ahead=1) == [*groups(1, 1, 1), *groups(0, 1, 3)]
    assert passes.coming(finished, 0, 190, ahead=1) == groups(1, 1, 1)
    assert passes.coming(finished, 0, 80, ahead=1) == []
    assert passes.coming(finished, 100, 190, ahead=0) == groups(1, 1, 1)
    assert passes.lacking(finished, 190) == [*groups(1, 1, 1), *groups(1, 2, 1)]
    assert passes.lacking(finished, 80) == []
