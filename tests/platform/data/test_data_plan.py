"""`openmoe data plan` and `tokenize`, without Ray: what is there, what is left, how far it goes."""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from openmoe.pipelines import ray_tasks
from openmoe.pipelines.config import DataError, SourceConfig
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.sources import Unit
from openmoe.platform.commands import cli
from openmoe.platform.data import build_ahead, data_plan
from openmoe.platform.run_file import spec

SMALL = (
    *("sample_corpus=null", "model.group_size=128", "train.steps=40", "train.batch_rows=4", "seed=3"),
    *("data.seq_len=128", "data.unit_bytes=8000", "data.group_tokens=4000"),
)


def settings(built, data_dir, **missing):
    """Overrides of a run over the files of `small_data`, whose artefacts are in `data_dir`."""
    corpus = Path(built.data_dir).parent
    sources = [
        {"name": name, "format": "redpajama", "paths": [f"{corpus}/{name}.jsonl"], "weight": weight}
        for name, weight in (("wiki", 3.0), ("code", 1.0))
    ]
    for name, how in missing.items():
        sources.append({"name": name, "format": "redpajama", "paths": [f"{corpus}/no-{name}"], "weight": 4.0} | how)
    return (*SMALL, f"data.sources={json.dumps(sources)}", f"data_dir={data_dir}")


def data(command, *overrides):
    return CliRunner().invoke(cli.app, ["data", command, "quickstart", *overrides], catch_exceptions=False)


def plan(*overrides):
    result = data("plan", "--json", *overrides)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_before_anything_is_read_a_plan_names_files_and_units_and_estimates_by_bytes(small_data, tmp_path):
    found = plan(*settings(small_data, tmp_path))
    wiki, code = found["sources"]
    assert (wiki["files"], wiki["compressed"], wiki["bytes"], wiki["units"]) == (1, 0, 39428, 5)
    assert (wiki["tokenized"], wiki["tokens"], wiki["measured"], wiki["estimated_tokens"]) == (0, 0, False, 13143)
    assert (found["manifest"], code["units"], list(tmp_path.iterdir())) == (None, 1, [])
    assert [(s["rows"], s["packed_rows"]) for s in found["streams"]] == [(117, 0), (43, 0)]


def test_what_is_tokenized_is_told_by_receipts_and_gives_a_better_estimate(small_data, tmp_path):
    (tmp_path / "tokens").mkdir()
    units = small_data.sources[0].units
    for unit in units[:2]:
        shutil.copy(f"{small_data.data_dir}/tokens/{unit['key']}.json", tmp_path / "tokens")
    wiki, _ = plan(*settings(small_data, tmp_path))["sources"]
    assert (wiki["units"], wiki["tokenized"], wiki["measured"]) == (5, 2, True)
    assert wiki["documents"] == sum(unit["documents"] for unit in units[:2])
    assert wiki["tokens"] == sum(unit["tokens"] for unit in units[:2])
    total = sum(unit["tokens"] for unit in units)
    assert abs(wiki["estimated_tokens"] / total - 1) < 0.1


def test_of_a_finished_build_nothing_is_left_and_passes_are_exact(small_data):
    found = plan(*settings(small_data, small_data.data_dir))
    assert found["manifest"] == small_data.path
    assert [(s["tokenized"], s["estimated_tokens"] == s["tokens"]) for s in found["sources"]] == [(5, True), (1, True)]
    assert [(s["rows"], s["groups_left"]) for s in found["streams"]] == [(117, 0), (43, 0)]
    wiki, _ = found["streams"]
    assert 0 < wiki["passes"] == 117 / wiki["packed_rows"]
    told = data("plan", *settings(small_data, small_data.data_dir))
    assert f"everything is built: {small_data.path}" in told.stdout.replace("\n", "")


def test_a_longer_run_over_the_same_build_lacks_groups(small_data):
    found = plan(*settings(small_data, small_data.data_dir), "train.steps=400")
    assert [s["rows"] for s in found["streams"]] == [1211, 389]
    assert all(s["groups_left"] > 0 for s in found["streams"])


def test_a_source_that_may_be_missing_is_listed_and_the_others_take_its_rows(small_data, tmp_path):
    found = data("plan", "--json", *settings(small_data, tmp_path, books={"missing": "renormalize"}))
    assert [(s["name"], s["missing"]) for s in json.loads(found.stdout)["sources"]] == [
        ("wiki", False),
        ("code", False),
        ("books", True),
    ]
    assert [s["rows"] for s in json.loads(found.stdout)["streams"]] == [117, 43]
    assert "MISSING SOURCE books" in found.stderr


def test_every_source_that_must_not_be_missing_gets_a_line(small_data, tmp_path):
    with pytest.raises(DataError) as error:
        data("plan", *settings(small_data, tmp_path, books={}, news={}))
    assert [line.split(" matches")[0].split("/")[-1] for line in str(error.value).splitlines()] == [
        "no-books",
        "no-news",
    ]


def test_a_sample_corpus_that_is_not_written_yet_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"^sample_corpus: {tmp_path}/c is written when the data is built; .*corpus"):
        data("plan", f"sample_corpus={tmp_path}/c", f"data_dir={tmp_path}", "data.sources.0.paths=[nowhere]")


def test_tokenizing_ends_with_the_manifest_and_packs_nothing(small_data, tmp_path):
    shutil.copytree(f"{small_data.data_dir}/tokens", tmp_path / "tokens")
    loaded = spec.load("quickstart", settings(small_data, tmp_path))
    manifest = build_ahead.tokenize(loaded, lambda *progress: None, print)
    assert (manifest.data_id, manifest.path) == (small_data.data_id, str(next((tmp_path / "manifests").iterdir())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifests", "tokens"]


def test_a_run_over_data_that_may_only_be_read_leaves_what_is_missing_to_its_workers(
    small_data, tmp_path, mount_disk, monkeypatch
):
    monkeypatch.setattr(ray_tasks, "_in_ray", lambda *args: iter(()))  # a cluster without a free CPU
    folder = tmp_path / "data"
    folder.mkdir()
    mount_disk(folder, "20m")
    shutil.copytree(small_data.data_dir, folder, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    loaded = spec.load("quickstart", (*settings(small_data, folder), "train.steps=100"))
    said: list[str] = []
    manifest, resolved = build_ahead.build_first(loaded, 60, lambda *progress: None, said.append)
    with build_ahead.BuildAhead(resolved, manifest, lambda: 0, lambda *progress: None, said.append) as ahead:
        ahead._thread.join(30)
        ahead.check()
    assert len(said) == 2
    for line in said:
        assert "the file system is read-only" in line
        assert line.endswith("; what is not packed is rendered by the workers, each for itself")
    loader = Loader(manifest.path, cache_dir=str(tmp_path / "cache"))
    assert loader.num_rows < 400
    assert loader.make_ready(400) > 0
    assert loader.num_rows >= 400


def test_compressed_files_row_groups_and_folders_of_texts_count_by_their_bytes(tmp_path):
    line = json.dumps({"text": "one line of text"}) + "\n"
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(line.encode() * 500, mtime=0))
    (tmp_path / "c.jsonl").write_text(line * 500)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("a" * 40)
    pq.write_table(pa.table({"content": ["x = 1"] * 40}), tmp_path / "s.parquet", row_group_size=10)
    named = {"c": ("redpajama", "c.jsonl*"), "t": ("text", "*.txt"), "s": ("the_stack", "*.parquet")}
    sources = [
        {"name": name, "format": kind, "paths": [f"{tmp_path}/{pattern}"], "weight": 1.0}
        for name, (kind, pattern) in named.items()
    ]
    small = [setting for setting in SMALL if "unit_bytes" not in setting]
    settings = (*small, "data.unit_bytes=50", f"data.sources={json.dumps(sources)}", f"data_dir={tmp_path}/data")
    lines, texts, stack = plan(*settings)["sources"]
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["c.jsonl"] == 500 * 29
    assert (lines["files"], lines["compressed"], lines["units"]) == (2, 1, 1 + 500 * 29 // 50)
    assert lines["bytes"] == sizes["c.jsonl"] + sizes["c.jsonl.gz"]
    assert lines["estimated_tokens"] == round(sizes["c.jsonl.gz"] + sizes["c.jsonl"] / 3)
    assert (texts["files"], texts["bytes"], texts["units"], texts["estimated_tokens"]) == (3, 120, 2, 40)
    assert (stack["files"], stack["compressed"], stack["units"]) == (1, 1, 4)
    assert stack["estimated_tokens"] == stack["bytes"] == sizes["s.parquet"]


def test_row_groups_that_are_tokenized_stand_for_their_part_of_the_file():
    stack = {"source": "s", "format": "the_stack", "path": "s.parquet", "fingerprint": "1000:1"}
    units = [Unit(**stack, start=0, stop=1), Unit(**stack, start=1, stop=4)]
    source = SourceConfig(name="s", format="the_stack", paths=("s.parquet",), weight=1.0)
    found = data_plan._source_plan(source, [(units[0], [{"documents": 2, "tokens": 50}]), (units[1], None)])
    assert (found.tokens, found.estimated_tokens, found.measured, found.files) == (50, 200, True, 1)
    split = {"train": {"documents": 1, "tokens": 30}, "validation": {"documents": 1, "tokens": 20}}
    parts = [{"documents": 2, "tokens": 50, "split": split}]
    found = data_plan._source_plan(source, [(units[0], parts), (units[1], None)])
    assert (found.documents, found.tokens, found.estimated_tokens) == (1, 30, 120)


def test_a_run_in_epochs_knows_its_rows_once_its_first_passes_are_packed(small_data, tmp_path):
    epochs = ("train.steps=null", "train.epochs=2")
    before = plan(*settings(small_data, tmp_path), *epochs)["streams"]
    assert [(s["rows"], s["passes"], s["groups_left"]) for s in before] == [(None, None, None)] * 2
    told = data("plan", *settings(small_data, tmp_path), *epochs).stdout
    assert "left to do: 6 units to tokenize, then to pack the groups of its epochs" in told
    wiki, code = plan(*settings(small_data, small_data.data_dir), *epochs)["streams"]
    first_passes = wiki["packed_rows"] + code["packed_rows"] // 2  # of code two passes are packed
    assert wiki["rows"] + code["rows"] == 2 * first_passes // 4 * 4


def test_a_manifest_is_inspected_without_its_run_and_takes_no_settings(small_data):
    shown = CliRunner().invoke(cli.app, ["data", "inspect", small_data.path, "--json"], catch_exceptions=False)
    [streams] = json.loads(shown.stdout).values()
    assert [(stream["name"], stream["documents"], stream["share"]) for stream in streams] == [
        ("wiki", 40, 0.75),
        ("code", 10, 0.25),
    ]
    with pytest.raises(DataError, match=r"^seed=1: a manifest has no settings to change"):
        CliRunner().invoke(cli.app, ["data", "inspect", small_data.path, "seed=1"], catch_exceptions=False)
