import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import heldout, passes, selection, shards, sources, storage, token_cache, tokenizer
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig

TEXT = tokenizer.load("builtin:small_8192")
TRAIN, VALIDATION, DUPLICATE = selection.TRAIN, selection.VALIDATION, selection.DUPLICATE


def written(folder: Path, texts: dict[str, list[str]]) -> DataConfig:
    """A configuration of one jsonl file for each source."""
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    named = [
        SourceConfig(name=name, format="redpajama", paths=(f"{folder}/{name}.jsonl",), weight=1.0) for name in texts
    ]
    tiny = {"seq_len": 64, "seed": 0, "unit_bytes": 100, "group_tokens": 200}
    return DataConfig(tokenizer="builtin:small_8192", sources=tuple(named), **tiny)


def tokenized(config: DataConfig, data: Path) -> dict[str, list[dict]]:
    """The receipts of all units by source, in plan order."""
    return {
        source.name: [
            token_cache.tokenize(unit, TEXT, f"{data}/tokens") for unit in sources.inventory(source, config.unit_bytes)
        ]
        for source in config.sources
    }


def selected(data: Path, receipts: dict[str, list[dict]], *, reverse: bool = False, **choice) -> dict[str, list[dict]]:
    """The receipts with their splits, the tasks of each kind done in this or the opposite order."""
    everything = [receipt for units in receipts.values() for receipt in units]
    plan = selection.plan(str(data), everything, **{"dedup": True, "validation_share": 0.0} | choice)
    selection.write_plan(plan)
    splits = {}
    for _, names in selection.stages(plan):
        done = [selection.run(selection.read_plan(plan.folder), name) for name in (names[::-1] if reverse else names)]
        splits = {key: split for receipt in done for key, split in receipt.get("units", {}).items()}
    return {name: [{**unit, "split": splits[unit["key"]]} for unit in units] for name, units in receipts.items()}


def parts_of(data: Path, receipts: dict[str, list[dict]]) -> dict[str, list[int]]:
    return {
        name: np.concatenate([selection.read(str(data), unit) for unit in units]).tolist()
        for name, units in receipts.items()
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_of_equal_documents_the_first_in_plan_order_stays_whichever_its_source(tmp_path):
    config = written(tmp_path, {"b": ["one two", "three four", "one two"], "a": ["five six", "one two", "three  four"]})
    receipts = selected(tmp_path, tokenized(config, tmp_path))
    assert parts_of(tmp_path, receipts) == {"b": [TRAIN, TRAIN, DUPLICATE], "a": [TRAIN, DUPLICATE, TRAIN]}
    [only] = receipts["b"]
    length = len(TEXT.encode(["one two"])[0])
    assert only["split"]["duplicate"] == {"documents": 1, "tokens": length}
    assert only["split"]["train"] == {"documents": 2, "tokens": only["tokens"] - length}
    assert only["split"]["validation"] == {"documents": 0, "tokens": 0}


@given(
    documents=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=20),
    slab=st.integers(1, 9),
    bucket=st.integers(1, 9),
)
@settings(deadline=None, max_examples=10)
def test_the_choice_is_that_of_one_set_whatever_the_slabs_buckets_and_order_of_work(
    tmp_path_factory, documents, slab, bucket
):
    texts = {name: [f"document {n}" for source, n in documents if source == name] for name in "abc"}
    texts = {name: lines for name, lines in texts.items() if lines}
    folder = tmp_path_factory.mktemp("selection")
    receipts = tokenized(written(folder, texts), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SLAB_DOCUMENTS", slab)
        patch.setattr(selection, "BUCKET_DOCUMENTS", bucket)
        found = parts_of(folder, selected(folder, receipts, reverse=True))
        one_way = tree(folder / "selections")
        selected(folder, receipts)
        assert tree(folder / "selections") == one_way
    seen: set[str] = set()
    for name, lines in texts.items():
        for line, part in zip(lines, found[name], strict=True):
            assert part == (DUPLICATE if line in seen else TRAIN)
            seen.add(line)


def test_the_validation_split_is_a_share_of_the_hashes_and_goes_with_the_text(tmp_path):
    lines = [f"document {n}" for n in range(2000)]
    config = replace(written(tmp_path, {"a": lines, "b": lines[::-1]}), unit_bytes=20_000)
    receipts = tokenized(config, tmp_path)
    parts = parts_of(tmp_path, selected(tmp_path, receipts, dedup=False, validation_share=0.1))
    assert parts["a"].count(VALIDATION) == 193
    assert parts["b"] == parts["a"][::-1]
    more = parts_of(tmp_path, selected(tmp_path, receipts, dedup=False, validation_share=0.2))
    assert {n for n, part in enumerate(parts["a"]) if part} < {n for n, part in enumerate(more["a"]) if part}
    both = parts_of(tmp_path, selected(tmp_path, receipts, validation_share=0.1))
    assert both == {"a": parts["a"], "b": [DUPLICATE] * 2000}


def test_what_is_left_out_is_in_no_row_and_all_else_is_in_a_pass_once(tmp_path):
    lines = [f"document number {n}, of which there are some" for n in range(40)]
    config = written(tmp_path, {"a": lines, "b": lines[20:] + [line.upper() for line in lines]})
    receipts = selected(tmp_path, tokenized(config, tmp_path), validation_share=0.2)
    path = str(tmp_path / "manifests" / "m.json")
    manifest = manifests.assemble(path, config, TEXT, receipts)
    parts = parts_of(tmp_path, receipts)
    for source, name in enumerate(("a", "b")):
        packed: dict[tuple[int, int], int] = {}
        for group in range(len(manifest.groups(source, 0))):
            receipt = passes.pack_group(manifest, source, 0, group)
            file = storage.join(manifest.pass_folder(source, 0), f"{group:05d}.array_record")
            shard = shards.Shard(file, sha256=receipt["sha256"], cache_dir="")
            for record in shard.read(list(range(receipt["rows"]))):
                for segment in shards.decode(record)[1]:
                    where = int(segment["unit"]), int(segment["document"])
                    packed[where] = packed.get(where, 0) + int(segment["length"])
        lengths = [
            token_cache.read(f"{tmp_path}/tokens", unit["key"], sha256=unit["sha256"]).lengths
            for unit in receipts[name]
        ]
        every = [(u, d, int(n)) for u, unit in enumerate(lengths) for d, n in enumerate(unit)]
        kept = {(u, d): n for (u, d, n), part in zip(every, parts[name], strict=True) if part == TRAIN}
        assert packed == kept
        assert 0 < len(kept) < len(every)
        apart = {(u, d): n for (u, d, n), part in zip(every, parts[name], strict=True) if part == VALIDATION}
        receipt = passes.pack_validation(manifest, source)
        file = storage.join(str(tmp_path), manifest.streams[source].passes, "validation", "00000.array_record")
        records = shards.Shard(file, sha256=receipt["sha256"], cache_dir="").read(list(range(receipt["rows"])))
        held: dict[tuple[int, int], int] = {}
        for segment in (segment for record in records for segment in shards.decode(record)[1]):
            where = int(segment["unit"]), int(segment["document"])
            held[where] = held.get(where, 0) + int(segment["length"])
        assert held == apart
    assert {part for of_source in parts.values() for part in of_source} == {TRAIN, VALIDATION, DUPLICATE}


def test_what_is_kept_apart_is_packed_in_groups_and_stays_one_where_it_was_packed_as_one(tmp_path):
    lines = [f"document number {n}, of which there are some" for n in range(300)]
    config = replace(written(tmp_path, {"a": lines}), unit_bytes=1000)
    receipts = selected(tmp_path, tokenized(config, tmp_path), validation_share=0.2)
    manifest = manifests.assemble(str(tmp_path / "manifests" / "m.json"), config, TEXT, receipts)
    manifests.commit(manifest)
    groups = manifest.validation_groups(0)
    assert len(groups) == 4
    kept = {unit for unit, receipt in enumerate(receipts["a"]) if selection.count(receipt, "validation")}
    assert sorted(unit for group in groups for unit in group) == sorted(kept)
    assert passes.packed_validation(manifest, 0) == [None] * 4
    first = heldout.read(manifest.path, 1)  # packs what it needs
    packed = passes.packed_validation(manifest, 0)
    assert [each and each["units"] for each in packed] == [groups[0], None, None, None]
    rows = [passes.pack_validation(manifest, 0, group)["rows"] for group in range(4)]
    everything = heldout.read(manifest.path, 1000)
    assert (len(everything.records), everything.records[0]) == (sum(rows), first.records[0])
    held = {(int(s["unit"]), int(s["document"])) for r in everything.records for s in shards.decode(r)[1]}
    assert len(held) == sum(selection.count(receipt, "validation") for receipt in receipts["a"])

    before = replace(manifest, path=str(tmp_path / "old" / "manifests" / "m.json"))
    for folder in ("tokens", "selections"):
        (tmp_path / "old").mkdir(exist_ok=True)
        (tmp_path / "old" / folder).symlink_to(tmp_path / folder)
    as_one = passes.pack_validation(replace(before, group_tokens=2**24), 0)
    assert as_one["units"] == sorted(kept)
    assert passes.packed_validation(before, 0) == [as_one]


def test_who_may_only_read_the_data_packs_what_is_kept_apart_for_itself(tmp_path, needs, monkeypatch):
    needs(os.geteuid() == 0, "root to become another user")
    lines = [f"document number {n}, of which there are some" for n in range(300)]
    config = replace(written(tmp_path, {"a": lines}), unit_bytes=1000)
    receipts = selected(tmp_path, tokenized(config, tmp_path), validation_share=0.2)
    manifest = manifests.assemble(str(tmp_path / "manifests" / "m.json"), config, TEXT, receipts)
    manifests.commit(manifest)
    (tmp_path / "scratch").mkdir()
    os.chown(tmp_path / "scratch", 65534, 65534)
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/scratch")
    for folder in [tmp_path, *list(tmp_path.parents)[:3]]:
        folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        denied = [heldout.read(manifest.path, rows).records for rows in (1, 1000)]
    finally:
        os.seteuid(0)
    assert passes.packed_validation(manifest, 0) == [None] * 4
    assert [heldout.read(manifest.path, rows).records for rows in (1, 1000)] == denied
    assert 1 == len(denied[0]) < len(denied[1])


def test_a_selection_changes_the_data_and_none_leaves_it_as_it_was(tmp_path):
    config = written(tmp_path, {"a": ["one two", "three four", "one two"]})
    receipts = tokenized(config, tmp_path)
    path = str(tmp_path / "manifests" / "m.json")
    plain = manifests.assemble(path, config, TEXT, receipts)
    other = manifests.assemble(path, config, TEXT, selected(tmp_path, receipts))
    assert plain.data_id != other.data_id
    assert plain.streams[0].passes != other.streams[0].passes
    assert plain.data_id == "6b8ee1e6beea4b02d6a6d99154f5bc6b"
    assert plain.streams[0].passes == "passes/a-68f5fe7e9de3d7c5"
    with pytest.raises(DataError, match=r"sources\.a: no document is for validation; raise validation_share"):
        passes.pack_validation(plain, 0)


def test_a_damaged_split_is_refused_in_one_line(tmp_path):
    config = written(tmp_path, {"a": ["one two", "three four"]})
    receipts = selected(tmp_path, tokenized(config, tmp_path))
    (tmp_path / receipts["a"][0]["split"]["path"]).write_bytes(b"\1\1")
    with pytest.raises(DataError, match=r"\.split: damaged, it does not match its receipt; delete both"):
        selection.read(str(tmp_path), receipts["a"][0])
