import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openmoe.pipelines import audit, passes, ray_tasks, selection, shards, sources, stdlib_corpus, storage, token_cache
from openmoe.pipelines import build as builder
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.build import _tokenize_task as tokenize_task
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig, StageConfig
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.passes import Passes
from openmoe.pipelines.storage import StorageError

FORMATS = {
    "wikipedia": ("redpajama", "wikipedia/*.jsonl", 1.0),
    "common_crawl": ("redpajama", "common_crawl/*/*.zst", 2.0),
    "the_stack": ("the_stack", "the_stack/data/*/*.parquet", 5.0),
}


def config(corpus, names=tuple(FORMATS), **settings) -> DataConfig:
    sources = tuple(
        SourceConfig(name=name, format=kind, paths=(storage.join(str(corpus), glob),), weight=weight)
        for name, (kind, glob, weight) in FORMATS.items()
        if name in names
    )
    tiny = {"unit_bytes": 6_000, "group_tokens": 1_500, "seq_len": 128, "seed": 3}
    return DataConfig(**{"tokenizer": "builtin:small_8192", "sources": sources} | tiny | settings)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def loader_of(manifest, tmp_path) -> Loader:
    return Loader(manifest.path, cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    stdlib_corpus.write_corpus(str(folder), max_text_bytes=120_000, max_code_bytes=120_000)
    return folder


@pytest.fixture(scope="session")
def built(ray_local, corpus, tmp_path_factory):
    """A finished build of 700 rows, which no test changes."""
    folder = tmp_path_factory.mktemp("built")
    return folder, builder.build(config(corpus), str(folder), min_rows=700)


@pytest.fixture
def copied(built, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(built[0], folder)
    return folder


def test_a_build_that_lost_receipts_and_holds_torn_files_ends_in_the_same_bytes(built, copied, corpus):
    whole = tree(built[0])
    receipts = sorted(copied.rglob("tokens/*.json")) + sorted(copied.rglob("passes/*/*/0*.json"))
    for receipt in receipts[::3]:
        receipt.unlink()
        artefact = next(receipt.parent.glob(f"{receipt.stem}.*"))
        artefact.write_bytes(artefact.read_bytes()[: artefact.stat().st_size // 2])
    for finished in (*copied.rglob("pass.json"), *copied.rglob("manifests/*.json")):
        finished.unlink()
    (copied / "tokens/.half.json.99.tmp").write_bytes(b"{")
    builder.build(config(corpus), str(copied), min_rows=700, place=builder.Workplace(num_workers=1))
    assert tree(copied) == whole


def test_a_finished_build_needs_no_ray_and_reports_no_work(built, corpus, monkeypatch):
    monkeypatch.setattr(ray_tasks, "run", None)
    reports = []
    again = builder.build(config(corpus), str(built[0]), min_rows=700, report=lambda *args: reports.append(args))
    assert again == built[1]
    assert reports == []


def test_parts_of_a_compressed_file_are_units_of_the_build(ray_local, built, corpus, tmp_path, monkeypatch):
    """Their pass has every document once, an audit knows them, and where a build ends does not depend on workers."""
    inventory = sources.inventory
    monkeypatch.setattr(
        sources, "inventory", lambda *args: [replace(unit, window_bytes=20_000) for unit in inventory(*args)]
    )
    only = config(corpus, names=("common_crawl",))
    manifests_of = [
        builder.build(only, str(tmp_path / name), min_rows=60, place=builder.Workplace(num_workers=n))
        for name, n in (("one", 1), ("two", 2))
    ]
    units, whole = manifests_of[0].sources[0].units, built[1].sources[1].units
    assert len(units) > len(whole)
    for key in ("documents", "tokens", "text_bytes"):
        assert sum(unit[key] for unit in units) == sum(unit[key] for unit in whole)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert audit.audit(manifests_of[1]).contradictions == []


def test_progress_counts_up_to_the_total(ray_local, built, copied, corpus):
    shutil.rmtree(copied / "passes")
    reports = []
    builder.build(config(corpus), str(copied), min_rows=50, report=lambda *args: reports.append(args))
    total = reports[0][2]
    assert [report[:4] for report in reports] == [("pack", done, total, "groups") for done in range(1, total + 1)]
    left = [sum(int(number) for number in re.findall(r" (\d+) left", report[4])) for report in reports]
    assert left == list(range(total - 1, -1, -1))
    assert set(re.findall(r"(\w+) \d+ left", reports[0][4])) == {"common_crawl", "the_stack", "wikipedia"}


def test_more_rows_later_never_change_earlier_ones(ray_local, built, copied, corpus, tmp_path):
    before = loader_of(built[1], tmp_path)
    grown = builder.build(config(corpus), str(copied), min_rows=2 * before.num_rows)
    after = loader_of(grown, tmp_path)
    assert after.num_rows >= 2 * before.num_rows
    assert after.data_id == before.data_id
    assert after.records(0, 700) == before.records(0, 700)


def test_rows_do_not_depend_on_the_range_they_are_read_in(built, tmp_path):
    loader = loader_of(built[1], tmp_path)
    whole = loader.rows(90, 110)
    for row in range(90, 110):
        one = loader.rows(row, row + 1)
        for key, values in one.items():
            np.testing.assert_array_equal(values[0], whole[key][row - 90])


def test_rows_follow_the_weights_and_come_from_the_source_that_is_named(built, tmp_path):
    assert built[1].stream_names == ["wikipedia", "common_crawl", "the_stack"]
    shares = np.bincount([record.stream for record in loader_of(built[1], tmp_path).locate(0, 700)]) / 700
    np.testing.assert_allclose(shares, [0.125, 0.25, 0.625], atol=0.05)


def test_each_pass_holds_every_token_of_every_document_once_with_its_own_noise(built):
    manifest = built[1]
    sizes = [unit["tokens"] for unit in manifest.sources[0].units]
    finished = Passes(manifest).groups[0]
    assert len(finished) >= 2
    records = []
    for number, groups in enumerate(finished[:2]):
        assert len(groups) > 1
        held = np.zeros(len(sizes), np.int64)
        records.append([])
        for group, receipt in enumerate(groups):
            path = storage.join(manifest.pass_folder(0, number), f"{group:05d}.array_record")
            shard = shards.Shard(path, sha256=receipt["sha256"], cache_dir="")
            records[-1] += shard.read(list(range(receipt["rows"])))
        for record in records[-1]:
            segments = shards.decode(record)[1]
            np.add.at(held, segments["unit"], segments["length"])
        assert held.tolist() == sizes
    assert not set(records[0]) & set(records[1])


def test_a_row_can_be_traced_to_its_documents(built, tmp_path):
    manifest = built[1]
    loader = loader_of(manifest, tmp_path)
    checked = 0
    for record, where in zip(loader.records(0, 40), loader.locate(0, 40), strict=True):
        tokens, segments = shards.decode(record)
        at = 0
        for segment in segments:
            unit = manifest.source_of(where.stream).units[segment["unit"]]
            cached = token_cache.read(storage.join(manifest.data_dir, "tokens"), unit["key"], sha256=unit["sha256"])
            first = cached.lengths[: segment["document"]].sum() + segment["start"]
            piece = cached.tokens[first : first + segment["length"]]
            if segment["denoiser"] == 5:
                inputs, end = tokens[at + 6 : at + segment["inputs"] - 1], at + segment["inputs"]
                targets = tokens[end : end + segment["targets"] - 1]
                assert np.concatenate([inputs, targets]).tolist() == piece.tolist()
                checked += 1
            at += segment["inputs"] + segment["targets"]
    assert checked > 10


def test_the_same_bytes_elsewhere_are_the_same_data(ray_local, built, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "moved")
    moved = builder.build(config(tmp_path / "moved"), str(tmp_path / "data"), min_rows=20)
    assert moved.data_id == built[1].data_id
    assert loader_of(moved, tmp_path).records(0, 20) == loader_of(built[1], tmp_path).records(0, 20)


def test_another_seed_is_other_data_over_the_same_token_cache(ray_local, built, copied, corpus, tmp_path):
    reports = []
    other = builder.build(config(corpus, seed=4), str(copied), min_rows=20, report=lambda *args: reports.append(args))
    assert other.data_id != built[1].data_id
    assert {stage for stage, *_ in reports} == {"pack"}
    assert loader_of(other, tmp_path).records(0, 20) != loader_of(built[1], tmp_path).records(0, 20)


def test_other_weights_are_other_data_over_the_same_passes(built, copied, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_tasks, "run", lambda *args: iter(()))
    base = config(corpus)
    heavier = replace(base, sources=(replace(base.sources[0], weight=4.0), *base.sources[1:]))
    other = builder.build(heavier, str(copied), min_rows=20)
    assert other.data_id != built[1].data_id
    assert loader_of(other, tmp_path).num_rows >= 20


def test_the_entropy_leaves_sentinels_and_inputs_out(built, tmp_path):
    loader = loader_of(built[1], tmp_path)
    batch = loader.rows(0, 30)
    targets = batch["target_ids"][(batch["loss_weights"] == 1) & (batch["target_ids"] < 8192)]
    _, counts = np.unique(targets, return_counts=True)
    shares = counts / counts.sum()
    assert loader.unigram_entropy(0, 30) == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)
    assert loader.text_token_counts(0, 30).sum() == len(targets)


def test_rows_that_are_not_built_are_refused(built, tmp_path):
    loader = loader_of(built[1], tmp_path)
    with pytest.raises(DataError, match=rf"rows \[5, {loader.num_rows + 1}\) were asked for, \[0, "):
        loader.rows(5, loader.num_rows + 1)


def test_a_damaged_shard_stops_the_reader(built, copied, tmp_path):
    for shard in copied.rglob("*.array_record"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    manifest = copied / "manifests" / Path(built[1].path).name
    with pytest.raises(StorageError, match=r"array_record: damaged or replaced"):
        Loader(str(manifest)).rows(0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"sources\.bad: no document in"),
        (b'{"text": ""}\n', r"sources\.bad: 1 of 1 documents are unusable, max_bad_share allows 0\.01; "
         r"first in .*bad\.jsonl at 0: empty; mend the file or raise max_bad_share"),
        (b'{"text": "fine words"}\n' * 9 + b"{broken\n", r"1 of 10 documents .* at 207: bad_json"),
        (b'{"text": "fine words"}\n{"text": "\xff"}\n', r"1 of 2 documents .* at 23: not_utf8"),
        (b'{"txt": "fine"}\n', r"1 of 1 documents .* at 0: no_text"),
    ],
)  # fmt: skip
def test_a_source_with_too_much_rubbish_stops_the_build(ray_local, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    bad = SourceConfig(name="bad", format="redpajama", paths=(str(tmp_path / "*.jsonl"),), weight=1.0)
    with pytest.raises(DataError, match=message):
        builder.build(replace(config(tmp_path), sources=(bad,)), str(tmp_path / "data"), min_rows=1)
    assert not (tmp_path / "data/manifests").exists()


def test_bad_lines_within_the_limit_are_counted_and_kept_aside(ray_local, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine words"}\n' * 9 + b"{broken\n")
    bad = SourceConfig(
        name="bad", format="redpajama", paths=(str(tmp_path / "*.jsonl"),), weight=1.0, max_bad_share=0.1
    )
    manifest = builder.build(replace(config(tmp_path), sources=(bad,)), str(tmp_path / "data"), min_rows=1)
    assert manifest.sources[0].units[0]["bad"] == {"bad_json": 1}
    kept = next((tmp_path / "data/tokens").glob("*.bad.jsonl")).read_text()
    path = str(tmp_path / "bad.jsonl")
    assert json.loads(kept) == {"path": path, "offset": 207, "reason": "bad_json", "line": "{broken"}


def test_duplicates_and_validation_are_taken_out_over_the_same_token_cache(ray_local, built, copied, corpus, tmp_path):
    base = config(corpus, dedup="exact", validation_share=0.1)
    again = replace(base.sources[0], name="again", paths=(f"{corpus}/wikipedia/*.jsonl", f"{corpus}/c4/*.jsonl"))
    asked, reports = replace(base, sources=(*base.sources, again)), []
    chosen = builder.build(asked, str(copied), min_rows=20, report=lambda *args: reports.append(args[0]))
    assert list(dict.fromkeys(reports)) == ["tokenize", "sort", "unite", "split", "pack"]
    first, *_, last = chosen.sources
    left_out = [sum(selection.count(unit, part) for unit in last.units) for part in ("validation", "duplicate")]
    assert left_out[1] >= sum(unit["documents"] for unit in first.units)
    assert sum(selection.count(unit, "validation") for source in chosen.sources for unit in source.units) > 0
    assert loader_of(chosen, tmp_path).num_rows >= 20
    same = builder.build(asked, str(tmp_path / "new"), min_rows=20, place=builder.Workplace(num_workers=1))
    assert tree(tmp_path / "new" / "selections") == tree(copied / "selections")
    assert loader_of(same, tmp_path).records(0, 20) == loader_of(chosen, tmp_path).records(0, 20)
    told = []
    for _ in range(2):
        builder.pack_validation(same, lambda *progress: told.append(progress), builder.Workplace(num_workers=1))
    kept_apart = [passes.packed_validation(same, stream) for stream in range(len(same.streams))]
    assert told[-1] == ("hold out", sum(map(len, kept_apart)), sum(map(len, kept_apart)), "groups")
    assert all(group for groups in kept_apart for group in groups)
    twice = replace(again, paths=again.paths[:1])
    with pytest.raises(DataError, match=r"sources\.again: of its documents \d+ were there before, and 0 are for valid"):
        builder.build(replace(base, sources=(*base.sources, twice)), str(copied), min_rows=20)


def test_a_missing_source_is_renormalized_away_only_when_the_run_file_says_so(built, copied, corpus, tmp_path):
    whole = config(corpus)
    book = SourceConfig(name="book", format="redpajama", paths=(f"{corpus}/book/*.jsonl",), weight=8.0)
    for asked in (replace(whole, sources=(*whole.sources, book)), replace(whole, sources=(book, *whole.sources))):
        with pytest.raises(DataError, match=r"sources\.book\.paths: .*/book/\*\.jsonl matches no file"):
            builder.build(asked, str(tmp_path), min_rows=20)
    said, may_be = [], replace(book, missing="renormalize")
    place = builder.Workplace(say=said.append)
    manifest = builder.build(replace(whole, sources=(may_be, *whole.sources)), str(copied), min_rows=20, place=place)
    assert said == [
        "MISSING SOURCE book: no file matches; the others take its rows: "
        "wikipedia 12.50%, common_crawl 25.00%, the_stack 62.50%"
    ]
    assert manifest.missing == ("book",)
    assert manifests.load(manifest.path).missing == ("book",)
    assert manifest.data_id == built[1].data_id
    with pytest.raises(DataError, match="sources: book is missing, and without it: sources: at least one is needed"):
        builder.build(replace(whole, sources=(may_be,)), str(tmp_path), min_rows=20)


def test_a_missing_source_is_taken_out_of_every_stage(ray_local, corpus, tmp_path):
    paths = {"wikipedia": f"{corpus}/wikipedia/*.jsonl", "book": f"{corpus}/book/*.jsonl"}
    sources = tuple(
        SourceConfig(name=name, format="redpajama", paths=(path,), missing="renormalize")
        for name, path in paths.items()
    )
    first = StageConfig(until_tokens=1280, weights={"wikipedia": 1, "book": 3})
    stages = (first, StageConfig(weights={"wikipedia": 1}))
    built = builder.build(config(corpus, sources=sources, stages=stages), str(tmp_path), min_rows=20)
    assert [source.name for source in built.sources] == ["wikipedia"]
    assert [tuple(stage.weights) for stage in built.stages] == [(1,), (1,)]
    stages = (StageConfig(until_tokens=1280, weights={"book": 3}), stages[1])
    with pytest.raises(DataError, match=r"book is missing, and without it: stages\.0\.weights: at least one source"):
        builder.build(config(corpus, sources=sources, stages=stages), str(tmp_path), min_rows=20)


def test_an_error_inside_a_worker_is_the_same_one_line(ray_local, tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd rubbish")
    bad = SourceConfig(name="bad", format="redpajama", paths=(str(tmp_path / "*.zst"),), weight=1.0)
    with pytest.raises(DataError, match=r"^/\S+/a\.jsonl\.zst: zstd stream unreadable after 0 bytes of text"):
        builder.build(replace(config(tmp_path), sources=(bad,)), str(tmp_path / "data"), min_rows=1)


def node(cpus, memory=0, label=None, **resources):
    labels = {"openmoe.ai/role": label} if label else {}
    return {"Resources": {"CPU": cpus, "memory": memory, **resources}, "Labels": labels}


NOT_ON_TPUS = "ray.io/accelerator-type"


@pytest.mark.parametrize(
    ("nodes", "place", "cpus", "labels"),
    [
        ([node(8), node(8)], {"reserved_cpus": 6}, 10, set()),
        ([node(8), node(8)], {"reserved_cpus": 16}, 0, set()),
        ([node(2), node(8, TPU=4)], {"reserved_cpus": 8}, 2, {NOT_ON_TPUS}),
        ([node(0), node(8, TPU=4)], {"reserved_cpus": 3}, 5, set()),
        ([node(2), node(8, TPU=4), node(64, label="data")], {"reserved_cpus": 8}, 64, {"openmoe.ai/role"}),
        ([node(2), node(16, label="data"), node(8, label="data")], {}, 24, {"openmoe.ai/role"}),
        ([node(2), node(16, label="serving")], {}, 18, set()),
        ([node(8, 5e9), node(8, 3e9)], {"task_memory_bytes": 2 * 10**9}, 3, set()),
        ([node(8, 5e9), node(8, 90e9, label="data")], {"task_memory_bytes": 2 * 10**9}, 8, {"openmoe.ai/role"}),
    ],
)
def test_data_work_goes_where_the_label_says_else_beside_the_workers(nodes, place, cpus, labels):
    found, selector = ray_tasks.offer(nodes, builder.Workplace(**place))
    assert (found, set(selector or {})) == (cpus, labels)


def lethal(row):
    """The tokenizing task, which one file's units kill, as a document can that is too large for the memory."""
    unit = json.loads(row["task"])["unit"]
    if unit["path"].endswith("deadly.jsonl") and unit["start"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return tokenize_task(row)


def test_a_unit_that_always_kills_its_worker_is_named_and_goes_into_quarantine_when_allowed(
    ray_local, tmp_path, monkeypatch
):
    ray_local.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(builder, "_tokenize_task", lethal)
    for name in ("a", "deadly", "z"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(b'{"text": "%s words"}\n' % name.encode() for _ in range(9)))
    source = SourceConfig(name="s", format="redpajama", paths=(f"{tmp_path}/*.jsonl",), weight=1.0)
    said: list[str] = []
    place = builder.Workplace(say=said.append)
    limited = config(tmp_path, sources=(source,), unit_bytes=150)
    message = (
        rf"^sources\.s: {tmp_path}/deadly\.jsonl \[150, 225\) killed its worker 3 times, as out of memory does; max"
    )
    with pytest.raises(DataError, match=message):
        builder.build(limited, str(tmp_path / "data"), min_rows=1, place=place)
    deadly = f"s: {tmp_path}/deadly.jsonl [150, 225)"
    assert said == [f"a worker died, {n} of 3 times over {deadly}" for n in (1, 2)]

    allowed = replace(limited, sources=(replace(source, max_quarantined_units=1),))
    manifest = builder.build(allowed, str(tmp_path / "data"), min_rows=1, place=place)
    [empty] = [unit for unit in manifest.sources[0].units if "quarantined" in unit]
    assert [empty["quarantined"], empty["path"]] == ["killed its worker 3 times", f"{tmp_path}/deadly.jsonl"]
    assert [empty[field] for field in ("start", "stop", "documents", "tokens")] == [150, 225, 0, 0]
    assert [unit["documents"] for unit in manifest.sources[0].units] == [8, 1, 6, 0, 8, 1]
    with pytest.raises(
        DataError, match=r"1 units are quarantined, max_quarantined_units allows 0; the first is .*deadly"
    ):
        builder.build(limited, str(tmp_path / "data"), min_rows=1, place=place)


def test_a_full_disk_stops_the_build_and_more_room_lets_it_finish_in_the_same_bytes(
    ray_local, built, corpus, tmp_path, mount_disk
):
    mount_disk(tmp_path, "300k")
    with pytest.raises(DataError, match=r"\.array_record: cannot be written \([\d,]+ bytes\): the disk is full"):
        builder.build(config(corpus), str(tmp_path), min_rows=700, place=builder.Workplace(num_workers=1))
    subprocess.run(["mount", "-o", "remount,size=40m", str(tmp_path)], check=True)
    builder.build(config(corpus), str(tmp_path), min_rows=700)
    assert tree(tmp_path) == tree(built[0])


def test_a_build_and_its_reading_work_wholly_on_gs(gcs, ray_local, built, corpus, tmp_path):
    home = storage.join(gcs, "build")
    for name, content in tree(corpus).items():
        storage.write_durable(storage.join(home, "corpus", name), content)
    manifest = builder.build(config(f"{home}/corpus"), f"{home}/data", min_rows=100)
    assert manifest.data_id == built[1].data_id
    loader = loader_of(manifest, tmp_path)
    assert loader.records(0, 100) == loader_of(built[1], tmp_path).records(0, 100)
    again = builder.build(config(f"{home}/corpus"), f"{home}/data", min_rows=100)
    assert again == manifest
