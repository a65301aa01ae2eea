"""Passes of a small build, packed in this process: order and noise of their own, and waiting for a missing one."""

import hashlib
import json
import threading
import time

import numpy as np
import pytest

from openmoe.pipelines import loader as loaders
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import passes, shards, sources, storage, token_cache, tokenizer
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig, StageConfig
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.passes import Passes


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
    receipts = {"wiki": [{"tokens_sha256": "11", "tokens": 5}], "code": [{"tokens_sha256": "22", "tokens": 5}]}
    manifest = manifests.assemble("/d/manifests/x.json", staged, text, receipts)
    assert manifest.data_id == "62a344f660ae0413be3c8cfe847a8f89"
    assert [s.passes for s in manifest.sources] == ["passes/wiki-c6bd860477373bdf", "passes/code-3b9c0c0adfa885b5"]
    assert manifests.manifest_path("/d", staged, text, []) == "/d/manifests/fae2c236f048b3c01411dc72.json"


def test_rows_of_a_build_stay_what_they_always_were(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    pack(manifest, 0, 0)
    pack(manifest, 1, 0)
    loader = Loader(manifest.path)
    records = loader.records(0, loader.num_rows)
    assert manifest.data_id == "5cfd127235399c5b19e4f1ac58635861"
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


def test_a_loader_waits_for_the_pass_that_is_missing_and_names_it(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "POLL_S", 0.05)
    manifest = tokenized(config(corpus), tmp_path / "data")
    pack(manifest, 0, 0)
    pack(manifest, 1, 0)
    loader = Loader(manifest.path)
    rows, missing = loader.num_rows, []
    assert loader.wait_for(rows, timeout_s=0) == 0
    with pytest.raises(DataError, match=rf"pass 1 of code \(global row {rows}\) was not built within 0\.1 s; the"):
        loader.wait_for(rows + 1, timeout_s=0.1)

    def build():
        time.sleep(0.3)
        pack(manifest, 1, 1)

    builder = threading.Thread(target=build)
    builder.start()
    waited_s = loader.wait_for(rows + 5, timeout_s=60, on_wait=missing.append)
    builder.join()
    assert 0.2 < waited_s < 60
    assert set(missing) == {f"pass 1 of code (global row {rows})"}
    assert loader.rows(rows, rows + 5)["input_ids"].shape == (5, 128)


def test_a_run_wants_of_each_source_the_pass_it_reads_and_the_one_after(corpus, tmp_path):
    manifest = tokenized(config(corpus), tmp_path / "data")
    finished = Passes(manifest)
    assert finished.epoch_rows() is None
    assert passes.lacking(finished, 1000) == [(0, 0), (1, 0)]
    assert passes.coming(finished, 0, 1000, ahead=0) == [(0, 0), (1, 0)]
    pack(manifest, 0, 0)
    pack(manifest, 1, 0)
    finished.refresh()
    assert (finished.rows(0), finished.rows(1), finished.epoch_rows()) == ([168], [22], 190)
    assert passes.coming(finished, 0, 1000, ahead=0) == []
    assert passes.coming(finished, 0, 1000, ahead=1) == [(0, 1), (1, 1)]
    assert passes.coming(finished, 0, 190, ahead=1) == [(1, 1)]
    assert passes.coming(finished, 0, 80, ahead=1) == []
    assert passes.coming(finished, 100, 190, ahead=0) == [(1, 1)]
    assert passes.lacking(finished, 190) == [(1, 1), (1, 2)]
    assert passes.lacking(finished, 80) == []
