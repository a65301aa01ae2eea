import json
from pathlib import Path

import numpy as np
import pytest

from openmoe.pipelines import shards
from openmoe.pipelines.config import DataError
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.packing import Pieces, Row
from openmoe.pipelines.storage import StorageError

PACKED = json.loads((Path(__file__).parent / "goldens/ul2.json").read_text())["packed"]


def record(examples) -> bytes:
    tokens = [token for example in examples for part in ("inputs", "targets") for token in example[part]]
    segments = np.zeros(len(examples), shards.SEGMENT)
    segments["inputs"] = [len(example["inputs"]) for example in examples]
    segments["targets"] = [len(example["targets"]) for example in examples]
    return shards.encode(np.asarray(tokens, np.uint32), segments)


def test_batches_equal_what_seqio_makes_of_the_same_examples():
    first, second, third = PACKED["examples"]
    batch = shards.batch([record([first, second]), record([third])], 15)
    for name, key in {
        "target_ids": "decoder_target_tokens",
        "input_ids": "decoder_input_tokens",
        "loss_weights": "decoder_loss_weights",
        "segment_ids": "decoder_segment_ids",
        "positions": "decoder_positions",
    }.items():
        assert batch[name].tolist() == [features[key] for features in PACKED["features"]]
        assert batch[name].dtype == (np.float32 if name == "loss_weights" else np.int32)


def test_a_record_is_version_1_little_endian():
    segments = np.asarray([(2, 1, 5, 7, 8, 9, 3)], shards.SEGMENT)
    encoded = shards.encode(np.asarray([5, 1, 256299], np.uint32), segments)
    assert encoded.hex() == (
        "01000100" "03000000" "05000000" "01000000" "2be90300"
        "02000000" "01000000" "05000000" "07000000" "08000000" "09000000" "03000000"
    )  # fmt: skip
    tokens, table = shards.decode(encoded)
    assert tokens.tolist() == [5, 1, 256299]
    assert table.tolist() == [(2, 1, 5, 7, 8, 9, 3)]


def test_a_record_of_another_version_is_refused():
    with pytest.raises(DataError, match="record version 2, this program reads 1"):
        shards.decode(b"\x02" + bytes(20))


def write_one(path: str) -> dict:
    pieces = Pieces(*(np.asarray([value]) for value in (0, 0, 4, 2, 5)))
    row = Row(np.asarray([9, 1, 8, 1], np.uint32), pieces, np.asarray([2]), np.asarray([2]))
    content, facts, _ = shards.render([row, row], np.asarray([[3, 6]]))
    Path(path).write_bytes(content)
    return facts


def test_a_shard_holds_its_rows_and_counts_them(tmp_path):
    path = str(tmp_path / "shard")
    facts = write_one(path)
    counts = {key: facts[key] for key in ("rows", "slots_used", "loss_slots", "raw_tokens")}
    assert counts == {"rows": 2, "slots_used": 8, "loss_slots": 4, "raw_tokens": 4}
    assert facts["pieces"] == {"R3": 0, "R8": 0, "X3": 0, "X8": 0, "X64": 0, "S": 2}
    shard = shards.Shard(path, sha256=facts["sha256"], cache_dir=str(tmp_path))
    tokens, table = shards.decode(shard.read([1])[0])
    assert tokens.tolist() == [9, 1, 8, 1]
    assert table.tolist() == [(2, 2, 5, 3, 6, 4, 2)]


def test_a_damaged_shard_is_refused_when_it_is_opened(tmp_path):
    path = tmp_path / "shard"
    facts = write_one(str(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match="shard: damaged or replaced"):
        shards.Shard(str(path), sha256=facts["sha256"], cache_dir=str(tmp_path))


def test_rows_that_are_unpacked_together_are_as_each_alone(small_data):
    records = Loader(small_data.path).records(0, 160)
    together, alone = shards.batch(records, 128), [shards.batch([record], 128) for record in records]
    for key, array in together.items():
        np.testing.assert_array_equal(array, np.concatenate([each[key] for each in alone]))
