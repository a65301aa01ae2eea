"""Which groups are wanted, whatever is packed already; and reading through a small cache."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.pipelines import mixture, passes, storage
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.manifest import Manifest, SourceManifest, StreamManifest
from openmoe.pipelines.passes import Group, Passes


def receipts_only(folder, tokens_of_units, weights) -> Manifest:
    """A build whose groups are packed by writing receipts: what is wanted next depends on these alone."""
    sources = [
        SourceManifest(name=f"s{n}", weight=weight, units=[{"tokens": t} for t in units])
        for n, (units, weight) in enumerate(zip(tokens_of_units, weights, strict=True))
    ]
    streams = [StreamManifest(source=n, objective="ul2", passes=f"passes/s{n}") for n in range(len(sources))]
    return Manifest(
        path=f"{folder}/manifests/x.json", data_id="", tokenizer="", tokenizer_fingerprint="", vocabulary=None,
        seq_len=64, objective="ul2", seed=1, group_tokens=500, sources=sources, streams=streams,
    )  # fmt: skip


def pack(manifest, group, rows):
    record = json.dumps({"group": group.group, "rows": rows}).encode()
    folder = manifest.pass_folder(group.stream, group.number)
    storage.create_if_absent(storage.join(folder, f"{group.group:05d}.json"), record)


@settings(max_examples=20, deadline=None)
@given(
    tokens_of_units=st.lists(st.lists(st.integers(10, 900), min_size=1, max_size=8), min_size=1, max_size=3),
    window_rows=st.sampled_from([5, 16, 1000]),
    num_rows=st.integers(1, 150),
    share=st.floats(0.6, 2.0),
    packed=st.sets(st.builds(Group, st.integers(0, 2), st.integers(0, 2), st.integers(0, 4))),
)
def test_whatever_is_packed_what_is_lacking_makes_the_rows_readable_and_is_asked_for_once(
    tokens_of_units, window_rows, num_rows, share, packed
):
    def pack_it(group):
        cut = manifest.groups(group.stream, group.number)
        if group.group < len(cut):
            tokens = sum(manifest.sources[group.stream].units[unit]["tokens"] for unit in cut[group.group])
            pack(manifest, group, max(1, round(tokens * share / 64)))  # rows of 64: more than are filled, or fewer

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(mixture, "WINDOW_ROWS", window_rows):
        sources = range(len(tokens_of_units))
        manifest = receipts_only(folder, tokens_of_units, [1.0 + n for n in sources])
        for group in packed:
            if group.stream in sources:
                pack_it(group)
        built, asked = Passes(manifest), []
        while wanted := passes.lacking(built, num_rows):
            assert not passes.covers(built, num_rows)
            new = passes.unpacked(manifest, wanted)
            assert len(set(wanted)) == len(wanted)
            for group in new:
                pack_it(group)
            asked += new
            before = built.total_rows()
            built.refresh()
            assert new or (built.total_rows() > before).any()
        assert len(set(asked)) == len(asked)
        assert passes.covers(built, num_rows)
        assert manifest.mixture.rows_available(built.total_rows()) >= num_rows


def test_a_pass_that_proves_longer_than_the_last_is_packed_to_its_end_before_the_next_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "WINDOW_ROWS", 5)
    manifest = receipts_only(tmp_path, [[500, 500, 500]], [1.0])
    for group, rows in ((Group(0, 0, 0), 2), (Group(0, 0, 1), 2), (Group(0, 0, 2), 2), (Group(0, 1, 0), 20)):
        pack(manifest, group, rows)
    built = Passes(manifest)
    assert (built.rows(0), built.readable(0)) == ([6], [6, 20])
    assert passes.coming(built, 25, 1000, ahead=0) == []
    assert passes.coming(built, 26, 1000, ahead=0) == [Group(0, 1, 1)]
    assert passes.lacking(built, 500) == [Group(0, 1, 1), Group(0, 1, 2)]


@pytest.fixture
def on_gs(small_data, gcs, tmp_path):
    """The path of the manifest of a copy of the build on gs://."""
    for path in Path(small_data.data_dir).rglob("*"):
        if path.is_file():
            name = path.relative_to(small_data.data_dir).as_posix()
            storage.write_durable(storage.join(gcs, tmp_path.name, name), path.read_bytes())
    return storage.join(gcs, tmp_path.name, "manifests", Path(small_data.path).name)


def test_a_build_on_gs_is_read_through_a_cache_that_is_smaller(small_data, on_gs, tmp_path):
    shards = [receipt["bytes"] for source in Passes(small_data).groups for groups in source for receipt in groups]
    cache_bytes = sum(shards) // 2
    assert cache_bytes > max(shards)
    loader, reference = Loader(on_gs, cache_dir=str(tmp_path), cache_bytes=cache_bytes), Loader(small_data.path)
    for lo in range(0, 160, 20):
        assert loader.records(lo, lo + 20) == reference.records(lo, lo + 20)
        kept = sum(path.stat().st_size for path in tmp_path.iterdir() if not path.name.startswith("."))
        assert 0 < kept <= cache_bytes


def only_group_0(folder):
    """Takes all receipts but those of the first groups out of a copy of a build."""
    for path in folder.glob("passes/*/*/*"):
        if path.name.split(".")[0] != "00000":
            path.unlink()
    return Loader(str(next((folder / "manifests").iterdir())), cache_dir=str(folder.parent / "cache"))


def test_who_may_only_read_renders_for_itself_within_a_bounded_cache_and_goes_on(
    small_data, tmp_path, needs, caplog, monkeypatch
):
    needs(os.geteuid() == 0, "root to become another user")
    folder = tmp_path / "data"
    shutil.copytree(small_data.data_dir, folder)
    loader = only_group_0(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for parent in [*tmp_path.parents][:3]:
        parent.chmod(parent.stat().st_mode | 0o055)  # /tmp stays everybody's
    tmp_path.chmod(0o755)
    for name in ("cache", "scratch"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, 65534, 65534)
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/scratch")
    told, wanted = [], Loader(small_data.path).records(0, 160)
    os.seteuid(65534)
    try:
        assert loader.make_ready(160, told.append) > 0
        assert loader.make_ready(160) == 0
        for kept in (tmp_path / "cache").iterdir():
            kept.unlink()  # as when the cache is full: it is rendered once more
        assert loader.records(0, 160) == wanted
    finally:
        os.seteuid(0)
    assert not told[0].endswith("for this process alone")
    assert all(words.endswith(", for this process alone") for words in told[1:])
    [warning] = caplog.records
    assert "permission denied" in warning.message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_is_missing_on_gs_is_rendered_to_the_same_rows(small_data, on_gs, tmp_path):
    loader = Loader(on_gs, cache_dir=str(tmp_path))
    wanted = loader.num_rows + 5
    assert loader.make_ready(wanted) == 1
    assert Loader(on_gs, cache_dir=str(tmp_path)).num_rows >= wanted
    assert loader.rows(wanted - 5, wanted)["input_ids"].shape == (5, 128)
