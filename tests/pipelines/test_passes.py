"""Passes of a small build, packed in this process: order and noise of their own, and waiting for a missing one."""

import json

import numpy as np
import pytest

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
    receipts = {"wiki": [{"tokens_sha256": "11", "tokens": 5}], "code": [{"tokens_sha256": "22", "tokens": 5}]}
    manifest = manifests.assemble("/d/manifests/x.json", plain, text, receipts)
    assert manifest.data_id == "15cca119115d62b79a8465bee3d9cb21"
    assert [s.passes for s in manifest.sources] == ["passes/wiki-c6bd860477373bdf", "passes/code-3b9c0c0adfa885b5"]
    assert manifests.manifest_path("/d", plain, text, []) == "/d/manifests/4bec624a64bf2b5223bafccf.json"


def test_stages_are_part_of_what_identifies_the_data(corpus, tmp_path):
    def build(*ends_and_weights):
        stages = tuple(StageConfig(until_tokens=end, weights=weights) for end, weights in ends_and_weights)
        return tokenized(config(corpus, (None, None), stages), tmp_path / "data")

    first = build((1280, {"wiki": 1, "code": 0}), (None, {"wiki": 1, "code": 1}))
    later = build((2560, {"wiki": 1}), (None, {"wiki": 1, "code": 1}))
    other = build((1280, {"wiki": 1}), (None, {"wiki": 3, "code": 1}))
    assert len({first.data_id, later.data_id, other.data_id, tokenized(config(corpus), tmp_path / "data").data_id}) == 4
    assert first.stages == ((10, (1, 0)), (None, (1, 1)))
    assert [source.passes for source in first.sources] == [source.passes for source in other.sources]


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
    assert np.bincount(loader.sources_of(0, 30)).tolist() == [30]
    assert np.bincount(loader.sources_of(30, 90)).tolist() == [18, 42]
    read = loader.locate(0, loader.num_rows)
    assert len(set(read)) == len(read) == 183
    assert np.bincount([record.number for record in read if record.source == 1]).tolist() == [22, 23, 22, 22]


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


def groups(source, number, count):
    return [Group(source, number, group) for group in range(count)]


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
