"""docs/shards.md: the program on the page reads our shards, and the names on it are those of the files."""

import json
import re
from pathlib import Path

import pytest

from openmoe.pipelines import packing, passes, shards

PAGE = (Path(__file__).parents[2] / "docs" / "shards.md").read_text()


@pytest.fixture(scope="module")
def shard(small_data):
    """(path of a shard, its receipt)."""
    path = Path(passes.shard_path(small_data, 0, 0, 0))
    return path, json.loads(path.with_suffix(".json").read_text())


def test_the_program_on_the_page_reads_a_shard_without_our_code(shard):
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert "openmoe" not in program
    names = {}
    exec(program, names)
    path, receipt = shard
    rows = list(names["read_rows"](str(path)))
    opened = shards.Shard(str(path), sha256=receipt["sha256"], cache_dir="")
    records = opened.read(list(range(receipt["rows"])))
    batch = shards.batch(records, 128)
    assert len(rows) == receipt["rows"] == len(records)
    assert sum(int(has_loss.sum()) for *_, has_loss in rows) == receipt["loss_slots"]
    for at, (tokens, segments, has_loss) in enumerate(rows):
        assert tokens.tolist() == batch["target_ids"][at, : len(tokens)].tolist()
        assert has_loss.tolist() == (batch["loss_weights"][at, : len(tokens)] > 0).tolist()
        assert segments.tolist() == shards.decode(records[at])[1].tolist()


def test_the_page_names_what_receipts_and_segments_hold(shard):
    _, receipt = shard
    assert [name for name in receipt if f"`{name}`" not in PAGE] == []
    assert f"    7 x u32  segment[segments]          {', '.join(shards.SEGMENT.names)}" in PAGE
    assert f"counts {', '.join(packing.KINDS)} from 0" in PAGE
    assert f"u8   version, {shards.VERSION}\n" in PAGE
