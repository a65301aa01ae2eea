"""An audit finds a build sound, or names each kind of damage with the file that it is in."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openmoe.pipelines import audit, passes, selection, sources, storage, token_cache, tokenizer
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.config import DataConfig, SourceConfig
from openmoe.platform.commands import cli


@pytest.fixture
def copy(small_data, tmp_path):
    """(manifest, folder) of a copy of the build that may be damaged: 6 units, 5 groups with 213 rows."""
    shutil.copytree(small_data.data_dir, tmp_path / "data")
    path = str(next((tmp_path / "data/manifests").iterdir()))
    return manifests.load(path), tmp_path / "data"


def wiki(folder, name):
    [found] = folder.glob(f"passes/wiki-*/0000/{name}")
    return found


def unit(folder, manifest, number, suffix):
    return folder / "tokens" / f"{manifest.sources[0].units[number]['key']}{suffix}"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _without(path, *keys):
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_build_that_was_left_alone_is_sound_and_is_read_whole(copy):
    manifest, folder = copy
    told = []
    findings = audit.audit(manifest, report=lambda *progress: told.append(progress))
    assert (findings.contradictions, findings.orphans, findings.quarantined) == ([], [], [])
    assert (findings.units, findings.groups, findings.rows) == (6, 5, 213)
    assert (findings.artefacts, findings.read, findings.bad) == (11, 11, {"wiki": {}, "code": {}})
    files = [*folder.glob("tokens/*.parquet"), *folder.glob("passes/*/*/*.array_record")]
    assert findings.read_bytes == sum(path.stat().st_size for path in files)
    assert told[2:4] == [("receipts", 3, 3, "parts"), ("audit", 1, 11, "files")]


def test_what_packing_reference_loses_is_in_its_receipts_and_compared(small_data, tmp_path):
    corpus = Path(small_data.data_dir).parent
    source = SourceConfig(name="wiki", format="redpajama", paths=(f"{corpus}/wiki.jsonl",), weight=1)
    of_all = {"tokenizer": "builtin:small_8192", "seq_len": 128, "unit_bytes": 8_000, "group_tokens": 4_000}
    config = DataConfig(**of_all, seed=7, sources=(source,), packing="reference")
    text, units = tokenizer.load(config.tokenizer), sources.inventory(source, config.unit_bytes)
    receipts = {"wiki": [token_cache.tokenize(unit, text, f"{tmp_path}/tokens") for unit in units]}
    path = manifests.manifest_path(str(tmp_path), config, text, units)
    manifest = manifests.assemble(path, config, text, receipts)
    manifests.commit(manifest)
    groups = [passes.pack_group(manifest, 0, 0, group) for group in range(len(manifest.groups(0, 0)))]
    tokens = sum(unit["tokens"] for unit in manifest.sources[0].units)
    assert sum(group["raw_tokens"] + group["lone_tokens"] for group in groups) == tokens == 18407
    assert [group["lone_tokens"] for group in groups] == [1, 0, 0]
    assert [group["cut_off_tokens"] for group in groups] == [309, 306, 145]
    findings = audit.audit(manifest)
    assert (findings.contradictions, findings.cut_off, findings.lone) == ([], 760, 1)
    shown = CliRunner().invoke(cli.app, ["data", "inspect", manifest.path]).stdout
    assert "wiki: packing reference cut off 760 tokens, and made no example of 1 of text" in shown

    edit(next(tmp_path.glob("passes/*/0000/00000.json")), cut_off_tokens=308)
    edit(next(tmp_path.glob("passes/*/0000/00001.json")), lone_tokens=1)
    assert [str(wrong).split(": ", 1)[1] for wrong in audit.audit(manifest).contradictions] == [
        "holds cut_off_tokens 309, its receipt says 308",
        "holds lone_tokens 0, its receipt says 1",
    ]
    for receipt in tmp_path.glob("passes/*/0000/*.json"):  # of builds from before it was counted
        receipt.write_text(json.dumps(_without(receipt, "cut_off_tokens", "lone_tokens")))
    assert audit.audit(manifest).contradictions == []


DAMAGES = {
    "a shard is missing": (
        lambda m, f: wiki(f, "00001.array_record").unlink(),
        [("00001.array_record", "is missing, and there is a receipt of it")],
    ),
    "a tokenized unit is missing": (
        lambda m, f: unit(f, m, 0, ".parquet").unlink(),
        [(".parquet", "is missing, and there is a receipt of it")],
    ),
    "a byte of a shard is flipped": (
        lambda m, f: flip(wiki(f, "00001.array_record")),
        [("00001.array_record", "is damaged: ")],
    ),
    "a byte of a tokenized unit is flipped": (
        lambda m, f: flip(unit(f, m, 0, ".parquet")),
        [(".parquet", "is damaged: ")],
    ),
    "the receipt of another group": (
        lambda m, f: shutil.copy(wiki(f, "00001.json"), wiki(f, "00000.json")),
        [("0000/00000.json", "says group 1, should say 0"), ("0000/00000.json", "says units ")],
    ),
    "a group's receipt and shard are gone": (
        lambda m, f: (wiki(f, "00002.json").unlink(), wiki(f, "00002.array_record").unlink()),
        [("pass.json", "says that the pass is finished, but group 2 has no receipt")],
    ),
    "a pass that is finished without one of its groups": (
        lambda m, f: edit(wiki(f, "pass.json"), groups=json.loads(wiki(f, "pass.json").read_text())["groups"][:2]),
        [
            ("pass.json", "says that the pass is finished with 2 groups, should be 3"),
            ("pass.json", " 0 times: a pass has every unit once"),
        ],
    ),
    "a receipt of more rows": (
        lambda m, f: edit(wiki(f, "00000.json"), rows=1000),
        [("pass.json", "of group 0 says rows "), ("00000.array_record", "holds rows ")],
    ),
    "a group that the pass has not": (
        lambda m, f: shutil.copy(wiki(f, "00000.json"), wiki(f, "00000.json").with_name("00007.json")),
        [("00007.json", "is of no group: the pass has 3")],
    ),
    "the receipt of another unit": (
        lambda m, f: shutil.copy(unit(f, m, 1, ".json"), unit(f, m, 0, ".json")),
        [(".json", f"says {key} ") for key in ("documents", "key", "sha256", "start", "stop")],
    ),
    "a shard's receipt without its digest": (
        lambda m, f: wiki(f, "00000.json").write_text(json.dumps(_without(wiki(f, "00000.json"), "sha256", "rows"))),
        [("pass.json", "of group 0 says rows "), ("00000.array_record", "its receipt says no digest...")],
    ),
    "a receipt that is no JSON": (
        lambda m, f: unit(f, m, 0, ".json").write_text("{"),
        [(".json", "is missing, or no receipt")],
    ),
    "a unit twice in a pass": (
        lambda m, f: edit(wiki(f, "pass.json"), groups=[json.loads(wiki(f, "00000.json").read_text())] * 3),
        [("pass.json", "of group 1 says "), ("pass.json", " 3 times: a pass has every unit once")],
    ),
}


def test_a_shard_of_other_documents_is_named_even_if_its_receipt_was_made_for_it(copy):
    manifest, folder = copy
    shutil.copy(wiki(folder, "00001.array_record"), wiki(folder, "00000.array_record"))
    wiki(folder, "pass.json").unlink()
    made = json.loads(wiki(folder, "00001.json").read_text())
    kept = {"group": 0, "units": manifest.groups(0, 0)[0]}
    edit(wiki(folder, "00000.json"), **made | kept)
    tokens = [unit["tokens"] for unit in manifest.sources[0].units]
    absent, foreign = (set(manifest.groups(0, 0)[group]) for group in (0, 1))
    assert [each.what for each in audit.audit(manifest).contradictions] == [
        f"holds {0 if n in absent else tokens[n]:,} tokens of unit {n}, should hold {tokens[n] if n in absent else 0:,}"
        for n in sorted(absent | foreign)
    ]


def test_a_unit_of_other_tokens_is_named_even_if_receipt_and_manifest_were_made_for_it(copy):
    manifest, folder = copy
    ours, other = manifest.sources[0].units[:2]
    shutil.copy(unit(folder, manifest, 1, ".parquet"), unit(folder, manifest, 0, ".parquet"))
    edit(unit(folder, manifest, 0, ".json"), sha256=other["sha256"])
    ours["sha256"] = other["sha256"]
    assert [each.what for each in audit.audit(manifest).contradictions] == [
        f"holds documents {other['documents']}, its receipt says {ours['documents']}",
        f"holds tokens {other['tokens']}, its receipt says {ours['tokens']}",
        f'holds documents_sha256 "{other["documents_sha256"][:56]}..., '
        f'its receipt says "{ours["documents_sha256"][:56]}...',
    ]


def test_a_build_from_before_documents_had_a_digest_is_sound_by_its_counts_and_files(copy):
    manifest, folder = copy
    receipts = [unit(folder, manifest, n, ".json") for n in range(len(manifest.sources[0].units))]
    for path, held in zip(receipts, manifest.sources[0].units, strict=True):
        path.write_text(json.dumps(_without(path, "documents_sha256") | {"tokens_sha256": "0" * 64}))
        held |= {"tokens_sha256": "0" * 64}
        del held["documents_sha256"]
    assert audit.audit(manifest).contradictions == []
    edit(receipts[0], documents=1)
    manifest.sources[0].units[0]["documents"] = 1
    assert "its receipt says 1" in audit.audit(manifest).contradictions[0].what


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_with_its_file(copy, name):
    manifest, folder = copy
    damage, expected = DAMAGES[name]
    damage(manifest, folder)
    found = audit.audit(manifest).contradictions
    assert found
    for ending, what in expected:
        assert any(each.path.endswith(ending) and what in each.what for each in found), found


def test_an_artefact_without_a_receipt_is_listed_and_contradicts_nothing(copy):
    manifest, folder = copy
    shutil.copy(wiki(folder, "00000.array_record"), wiki(folder, "00000.array_record").with_name("00003.array_record"))
    (folder / "tokens/0123.parquet").write_bytes(b"of a killed build")
    (folder / "tokens/0123.bad.jsonl").write_bytes(b"{}\n")
    findings = audit.audit(manifest)
    assert findings.contradictions == []
    names = [path.rsplit("/", 1)[1] for path in findings.orphans]
    assert names == ["0123.bad.jsonl", "0123.parquet", "00003.array_record"]


def test_a_sample_reads_so_many_files_and_still_sees_that_one_is_missing(copy):
    manifest, folder = copy
    flip(wiki(folder, "00001.array_record"))
    assert audit.audit(manifest, sample=0).contradictions == []
    assert audit.audit(manifest, sample=3).read == 3
    assert audit.audit(manifest, sample=99).read == 11
    wiki(folder, "00000.array_record").unlink()
    [found] = audit.audit(manifest, sample=0).contradictions
    assert found.path == str(wiki(folder, "00000.json").with_suffix(".array_record"))


@pytest.fixture(scope="module")
def selected_build(tmp_path_factory):
    """A build with duplicates, bad lines, a validation split and its shard, made without Ray."""
    folder = tmp_path_factory.mktemp("selected")
    lines = [json.dumps({"text": f"text number {n % 30} of {n % 30 + 100}"}) for n in range(60)]
    (folder / "wiki.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"text": ""})]) + "\n")
    source = SourceConfig(name="wiki", format="redpajama", paths=(f"{folder}/wiki.jsonl",), weight=1.0)
    small = {"tokenizer": "builtin:small_8192", "seq_len": 64, "seed": 0, "unit_bytes": 400, "group_tokens": 200}
    config = DataConfig(sources=(source,), dedup="exact", validation_share=0.2, **small)
    text, data = tokenizer.load(config.tokenizer), str(folder / "data")
    units = sources.inventory(source, config.unit_bytes)
    receipts = [token_cache.tokenize(each, text, f"{data}/tokens") for each in units]
    plan = selection.plan(data, receipts, dedup=True, validation_share=0.2)
    selection.write_plan(plan)
    splits = {}
    for _, names in selection.stages(plan):
        done = [selection.run(plan, name) for name in names]
        splits = {key: split for receipt in done for key, split in receipt.get("units", {}).items()}
    receipts = [{**receipt, "split": splits[receipt["key"]]} for receipt in receipts]
    path = manifests.manifest_path(data, config, text, units)
    manifests.commit(manifests.assemble(path, config, text, {"wiki": receipts}))
    manifest = manifests.load(path)
    for group in range(len(manifest.groups(0, 0))):
        passes.pack_group(manifest, 0, 0, group)
    passes.pack_validation(manifest, 0)
    return manifest


def test_what_was_selected_and_kept_apart_is_audited_and_bad_lines_are_summed(selected_build):
    findings = audit.audit(selected_build)
    assert (findings.contradictions, findings.orphans) == ([], [])
    units = selected_build.sources[0].units
    assert findings.artefacts == 2 * len(units) + findings.groups
    assert findings.groups == len(selected_build.groups(0, 0)) + 1
    assert findings.validation_rows == sum(each["rows"] for each in passes.packed_validation(selected_build, 0)) > 0
    assert findings.bad == {"wiki": {"bad_json": 1, "empty": 1}}


def test_a_split_that_moved_a_document_is_named(selected_build, tmp_path):
    shutil.copytree(selected_build.data_dir, tmp_path / "data")
    split = max(
        Path(tmp_path / "data/selections").glob("*/*.split"), key=lambda path: path.stat().st_size
    )  # some are empty
    flip(split)
    manifest = manifests.load(str(next((tmp_path / "data/manifests").iterdir())))
    [found] = audit.audit(manifest).contradictions
    assert (found.path, found.what[:12]) == (str(split), "is damaged: ")


def test_a_split_whose_parts_are_counted_otherwise_is_named(selected_build):
    manifest = manifests.load(selected_build.path)
    split = manifest.sources[0].units[0]["split"]
    split["duplicate"]["documents"] += 1
    [found] = audit.audit(manifest).contradictions
    assert found.path.endswith(split["path"])
    assert re.match(r"holds duplicate \{.*\}, its receipt says \{", found.what)


def test_a_build_on_gcs_is_audited_as_one_on_disk_is(copy, gcs):
    _, folder = copy
    for path in (path for path in folder.rglob("*") if path.is_file()):
        storage.write_durable(f"{gcs}/audited/{path.relative_to(folder)}", path.read_bytes())
    [name] = storage.list_files(f"{gcs}/audited/manifests")
    manifest = manifests.load(f"{gcs}/audited/manifests/{name}")
    findings = audit.audit(manifest)
    assert (findings.contradictions, findings.rows, findings.read) == ([], 213, 11)
    shard = f"{gcs}/audited/{wiki(folder, '00001.array_record').relative_to(folder)}"
    storage.remove_files([shard])
    assert [each.path for each in audit.audit(manifest).contradictions] == [shard]


def command(*arguments):
    return CliRunner().invoke(cli.app, ["data", "audit", *map(str, arguments)], catch_exceptions=False)


def test_the_command_says_sound_and_ends_with_0_or_names_the_contradiction_and_ends_with_1(copy):
    manifest, folder = copy
    result = command(manifest.path)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (
        0,
        "SOUND: all is there, and holds what its receipts say",
    )
    partly = command(manifest.path, "--sample", "2").stdout.splitlines()[-1]
    assert partly == "SOUND IN PART: all is there, 2 of 11 files were read"
    flip(wiki(folder, "00001.array_record"))
    result = command(manifest.path)
    assert result.exit_code == 1
    assert f"CONTRADICTION\n    {wiki(folder, '00001.array_record')}: is damaged: " in result.stdout
    as_json = json.loads(command(manifest.path, "--json").stdout)
    assert (as_json[0]["sound"], len(as_json[0]["contradictions"]), as_json[0]["rows"]) == (False, 1, 213)
