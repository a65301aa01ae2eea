"""What `openmoe data inspect` says of a build, from files as a build leaves them."""

import json
from dataclasses import replace

import pytest

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import passes
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig, StageConfig
from openmoe.pipelines.manifest import Manifest, SourceManifest, StreamManifest
from openmoe.pipelines.tokenizer import Tokenizer
from openmoe.platform.data import data_summary

CONFIG = DataConfig(
    tokenizer="builtin:small_8192",
    seq_len=512,
    seed=0,
    sources=(
        SourceConfig(name="wiki", format="redpajama", paths=("w/*",), weight=1),
        SourceConfig(name="code", format="the_stack", paths=("c/*",), weight=3),
    ),
)
UNITS = [
    {"documents": 30, "bad": {"bad_json": 2, "empty": 1}, "tokens": 900},
    {"documents": 10, "bad": {}, "tokens": 124},
]
GROUPS = [
    {"rows": 3, "slots_used": 1536, "loss_slots": 512, "pieces": {"R3": 1, "S": 3}},
    {"rows": 1, "slots_used": 256, "loss_slots": 256, "pieces": {"R3": 2, "S": 2}},
]


@pytest.fixture
def data_dir(tmp_path):
    """One source with two finished passes, one with none; the third pass of the first has no pass.json."""
    sources = [
        SourceManifest(name="wiki", weight=1, units=UNITS),
        SourceManifest(name="code", weight=3, units=[]),
    ]
    streams = [
        StreamManifest(source=0, objective="ul2", passes="passes/wiki-1"),
        StreamManifest(source=1, objective="ul2", passes="passes/code-1"),
    ]
    manifests.commit(
        Manifest(
            path=f"{tmp_path}/manifests/a.json",
            data_id="1234",
            tokenizer_fingerprint="",
            vocabulary=Tokenizer(CONFIG.tokenizer).vocabulary(CONFIG.num_sentinels),
            sources=sources,
            streams=streams,
            **{key: getattr(CONFIG, key) for key in ("tokenizer", "seq_len", "objective", "seed", "group_tokens")},
        )
    )
    for number in (0, 1, 3):
        folder = tmp_path / "passes" / "wiki-1" / f"{number:04d}"
        folder.mkdir(parents=True)
        (folder / "pass.json").write_text(json.dumps({"groups": GROUPS}))
    return str(tmp_path)


def test_a_stream_is_summed_over_its_finished_passes(data_dir):
    (build,) = data_summary.builds(CONFIG, data_dir)
    wiki, code = data_summary.summarize(build)
    assert wiki == data_summary.StreamSummary(
        name="wiki",
        share=0.25,
        documents=40,
        bad=3,
        duplicates=0,
        validation=0,
        validation_rows=0,
        tokens=1024,
        passes=2,
        rows=8,
        fill=0.875,
        loss=0.375,
        denoisers={"R3": 0.375, "S": 0.625},
        cut_off=0,
        lone=0,
    )
    assert (code.share, code.passes, code.rows, code.fill, code.denoisers) == (0.75, 0, 0, 0.0, {})


def test_where_there_are_several_objectives_each_stream_has_a_line_and_is_named_with_its_own(tmp_path):
    of_stages = (
        StageConfig(until_tokens=512 * 3, weights={"wiki": 1}),
        StageConfig(weights={"wiki": 1, "code": 1}, objective="next_token"),
    )
    of_sources = tuple(replace(source, weight=None) for source in CONFIG.sources)
    config = replace(CONFIG, sources=of_sources, stages=of_stages)
    receipts = {
        name: [{"documents_sha256": name, "documents": 5, "bad": {}, "tokens": 90}] for name in ("wiki", "code")
    }
    path = f"{tmp_path}/manifests/a.json"
    manifests.commit(manifests.assemble(path, config, Tokenizer(config.tokenizer), receipts))
    [build] = data_summary.builds(config, str(tmp_path))
    group = {"rows": 4, "slots_used": 2048, "loss_slots": 2048, "pieces": {"next_token": 9}}
    for stream, groups in ((0, GROUPS), (1, [group])):
        passes.finish(build, stream, 0, groups)
    streams = data_summary.summarize(build)
    assert [(s.name, s.rows, s.documents) for s in streams] == [
        ("wiki ul2", 4, 5),
        ("wiki next_token", 4, 5),
        ("code next_token", 0, 5),
    ]
    assert streams[1].denoisers == {"next_token": 1.0}
    assert (streams[1].loss, streams[0].denoisers) == (1.0, {"R3": 0.375, "S": 0.625})
    with pytest.raises(DataError, match="no build of these settings"):
        data_summary.builds(replace(config, packing="reference"), str(tmp_path))


def test_a_build_of_other_settings_is_not_shown(data_dir):
    other = DataConfig(tokenizer=CONFIG.tokenizer, seq_len=512, seed=1, sources=CONFIG.sources)
    with pytest.raises(DataError, match="no build of these settings; `openmoe data build RUN` makes one"):
        data_summary.builds(other, data_dir)
