import subprocess
import sys

import pytest

from openmoe.pipelines import limits
from openmoe.pipelines.config import DataConfig, SourceConfig, StageConfig

SOURCE = {"name": "c4", "format": "redpajama", "paths": ("c4/*.jsonl",), "weight": 1.0}
DATA = {"tokenizer": "builtin:small_8192", "seq_len": 512, "seed": 0, "sources": (SourceConfig(**SOURCE),)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "C4 en"}, "name: lower-case letters, digits, _ and - wanted, got 'C4 en'"),
        ({"format": "csv"}, "format: redpajama, the_stack, text or chat, got 'csv'"),
        ({"max_quarantined_units": -1}, "max_quarantined_units: must be at least 0, got -1"),
        ({"missing": "ignore"}, "missing: stop or renormalize, got 'ignore'"),
        ({"max_document_bytes": 0}, r"max_document_bytes: must be in \[1, 2\^31\), got 0"),
        ({"paths": ()}, r"paths: at least one non-empty glob wanted, got \[\]"),
        ({"paths": ("s3://b/*.jsonl",)}, r"paths: local files and gs:// are read, got s3://b/\*\.jsonl; copy them"),
        ({"weight": 0.0}, r"weight: must be above 0, got 0\.0; leave the source out instead"),
        ({"weight": float("nan")}, "weight: must be above 0, got nan"),
        ({"max_bad_share": 1.5}, r"max_bad_share: must be in \[0, 1\], got 1\.5"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**SOURCE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "t5"}, "objective: ul2, next_token, prefix_lm or chat, got 't5'"),
        ({"packing": "tight"}, "packing: budgeted or reference, got 'tight'"),
        (
            {"packing": "reference", "seq_len": 513},
            "seq_len: packing reference gives inputs and targets half a row each, an even number, got 513",
        ),
        ({"seq_len": 63}, r"seq_len: must be in \[64, 32768\], got 63"),
        ({"seq_len": 2048, "num_sentinels": 255}, "num_sentinels: 2048 tokens can hold 256 masked spans, each"),
        ({"dedup": "minhash"}, "dedup: none or exact, got 'minhash'"),
        ({"validation_share": 0.6}, r"validation_share: must be in \[0, 0\.5\], got 0\.6"),
        ({"unit_bytes": 0}, "unit_bytes: must be at least 1, got 0"),
        ({"sources": ()}, "sources: at least one is needed, got none"),
        ({"sources": (SourceConfig(**SOURCE),) * 2}, r"sources: names must differ, got \['c4', 'c4'\]"),
        (
            {"sources": (SourceConfig(**SOURCE), SourceConfig(**SOURCE | {"name": "tiny", "weight": 1e-4}))},
            "sources: tiny has weight 0.0001 of 1.0001, less than one row in 2000; give it at least 0.00050005",
        ),
    ],
)
def test_data_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**DATA | change)


@pytest.mark.parametrize("module", ["config", "storage"])
def test_config_and_storage_import_nothing_heavy(module):
    program = (
        f"import sys, openmoe.pipelines.{module}; "
        "print(sorted({'numpy', 'pyarrow', 'ray', 'jax', 'fsspec', 'sentencepiece'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


STAGED = DataConfig(
    **DATA | {"sources": tuple(SourceConfig(**SOURCE | {"name": name, "weight": None}) for name in ("a", "b", "c"))},
    stages=(
        StageConfig(until_tokens=5120, weights={"b": 1, "a": 2}),
        StageConfig(until_tokens=10240, weights={"c": 1, "a": 0}, objective="next_token"),
        StageConfig(weights={"c": 3, "b": 1}),
    ),
)


def test_streams_come_in_the_order_of_objectives_then_of_sources():
    assert STAGED.streams() == [(0, "ul2"), (1, "ul2"), (2, "ul2"), (2, "next_token")]
    assert STAGED.stream_names() == ["a ul2", "b ul2", "c ul2", "c next_token"]
    assert STAGED.weights_by_stage() == [(2, 1, 0, 0), (0, 0, 0, 1), (0, 1, 3, 0)]


def test_the_objective_of_a_token_is_that_of_its_stage():
    assert [STAGED.objective_at(token) for token in (1, 5120, 5121, 10240, 10241)] == [
        "ul2",
        "ul2",
        "next_token",
        "next_token",
        "ul2",
    ]
    assert DataConfig(**DATA, objective="prefix_lm").objective_at(10**12) == "prefix_lm"


def test_with_one_objective_streams_are_the_sources():
    plain = DataConfig(**DATA)
    assert (plain.streams(), plain.stream_names(), plain.weights_by_stage()) == ([(0, "ul2")], ["c4"], [(1.0,)])


def test_the_rows_of_a_missing_source_go_to_the_others_in_each_stage(tmp_path):
    (tmp_path / "there").touch()
    here = {"format": "text", "paths": (f"{tmp_path}/there",)}
    book = SourceConfig(name="book", format="text", paths=(f"{tmp_path}/gone",), missing="renormalize")
    stages = (
        StageConfig(until_tokens=512, weights={"wiki": 3, "code": 1, "book": 1}),
        StageConfig(weights={"wiki": 1, "book": 1}, objective="next_token"),
    )
    sources = (SourceConfig(name="wiki", **here), SourceConfig(name="code", **here), book)
    said = []
    left, missing = limits.present(DataConfig(**DATA | {"sources": sources, "stages": stages}), said.append)
    assert ([source.name for source in left.sources], missing) == (["wiki", "code"], ["book"])
    begin = "MISSING SOURCE book: no file matches; the others take its rows in stage"
    assert said == [f"{begin} 1: wiki ul2 75.00%, code ul2 25.00%", f"{begin} 2: wiki next_token 100.00%"]
