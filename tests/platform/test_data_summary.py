"""What `openmoe data show` says of a build, from files as a build leaves them."""

import json

import pytest

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.config import DataConfig, DataError, SourceConfig
from openmoe.pipelines.manifest import Manifest, SourceManifest
from openmoe.pipelines.tokenizer import Tokenizer
from openmoe.platform import data_summary

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
        SourceManifest(name="wiki", weight=1, units=UNITS, passes="passes/wiki-1"),
        SourceManifest(name="code", weight=3, units=[], passes="passes/code-1"),
    ]
    manifests.commit(
        Manifest(
            path=f"{tmp_path}/manifests/a.json",
            data_id="1234",
            tokenizer_fingerprint="",
            vocabulary=Tokenizer(CONFIG.tokenizer).vocabulary(CONFIG.num_sentinels),
            sources=sources,
            **{key: getattr(CONFIG, key) for key in ("tokenizer", "seq_len", "objective", "seed", "group_tokens")},
        )
    )
    for number in (0, 1, 3):
        folder = tmp_path / "passes" / "wiki-1" / f"{number:04d}"
        folder.mkdir(parents=True)
        (folder / "pass.json").write_text(json.dumps({"groups": GROUPS}))
    return str(tmp_path)


def test_a_source_is_summed_over_its_finished_passes(data_dir):
    (build,) = data_summary.builds(CONFIG, data_dir)
    wiki, code = data_summary.summarize(build)
    assert wiki == data_summary.SourceSummary(
        name="wiki",
        share=0.25,
        documents=40,
        bad=3,
        duplicates=0,
        validation=0,
        tokens=1024,
        passes=2,
        rows=8,
        fill=0.875,
        loss=0.375,
        denoisers={"R3": 0.375, "S": 0.625},
    )
    assert (code.share, code.passes, code.rows, code.fill, code.denoisers) == (0.75, 0, 0, 0.0, {})


def test_a_build_of_other_settings_is_not_shown(data_dir):
    other = DataConfig(tokenizer=CONFIG.tokenizer, seq_len=512, seed=1, sources=CONFIG.sources)
    with pytest.raises(DataError, match="no build of these settings; `openmoe data build RUN` makes one"):
        data_summary.builds(other, data_dir)
