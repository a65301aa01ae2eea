import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from openmoe.pipelines import export as exports
from openmoe.pipelines import storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.export import FEATURES, Plan
from openmoe.pipelines.loader import Loader


def example_class():
    """tf.train.Example as TensorFlow declares it (tensorflow/core/example), as far as int64 lists go."""
    message = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
    optional, repeated = (getattr(descriptor_pb2.FieldDescriptorProto, f"LABEL_{n}") for n in ("OPTIONAL", "REPEATED"))
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    numbers = file.message_type.add(name="Int64List")
    numbers.field.add(name="value", number=1, type=descriptor_pb2.FieldDescriptorProto.TYPE_INT64, label=repeated)
    feature = file.message_type.add(name="Feature")
    feature.field.add(name="int64_list", number=3, type=message, type_name=".tensorflow.Int64List", label=optional)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING, label=optional)
    entry.field.add(name="value", number=2, type=message, type_name=".tensorflow.Feature", label=optional)
    features.field.add(
        name="feature", number=1, type=message, type_name=".tensorflow.Features.FeatureEntry", label=repeated
    )
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type=message, type_name=".tensorflow.Features", label=optional)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


EXAMPLE = example_class()


def decoded(record):
    """The lists of a serialized tf.train.Example, read by the protobuf library."""
    example = EXAMPLE.FromString(record)
    return {name: list(feature.int64_list.value) for name, feature in example.features.feature.items()}


def read(path):
    """The rows of an exported file, by libraries that are not ours: {row: {feature: list}}."""
    if path.suffix == ".parquet":
        found = pq.read_table(path).to_pylist()
    else:
        reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
        found = [decoded(record) for record in reader.read_all()]
    rows = [row.pop("row") for row in found]
    return dict(zip([row if isinstance(row, int) else row[0] for row in rows], found, strict=True))


@pytest.fixture(scope="module")
def loader(small_data):
    return Loader(small_data.path)


def plan(loader, form="parquet", rows=(10, 20), file_rows=4):
    return Plan(data_id=loader.data_id, format=form, rows=rows, file_rows=file_rows)


@pytest.mark.parametrize("form", ["parquet", "array_record"])
def test_other_libraries_read_the_rows_of_the_run_under_maxtexts_names(loader, tmp_path, form):
    progress = []
    receipt = exports.export(loader, str(tmp_path), plan(loader, form), lambda *report: progress.append(report))
    files = sorted(tmp_path.glob(f"*.{form}"))
    assert [file.name for file in files] == [f"rows-{n:05d}-of-00003.{form}" for n in range(3)]
    assert progress == [("export", done, 10, "rows") for done in (4, 8, 10)]
    found = {row: values for file in files for row, values in read(file).items()}
    batch = loader.rows(10, 20)
    assert list(found) == list(range(10, 20))
    for at, values in enumerate(found.values()):
        assert set(values) == set(FEATURES)
        assert values["inputs"] == batch["input_ids"][at].tolist()
        assert values["targets"] == batch["target_ids"][at].tolist()
        assert values["inputs_position"] == values["targets_position"] == batch["positions"][at].tolist()
        assert values["inputs_segmentation"] == batch["segment_ids"][at].tolist()
        # MaxText's loss: cross-entropy where targets_segmentation is not 0.
        assert [float(number != 0) for number in values["targets_segmentation"]] == batch["loss_weights"][at].tolist()
    assert json.loads((tmp_path / "export.json").read_text()) == json.loads(json.dumps(receipt))
    for file in files:
        assert receipt["files"][file.name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@given(st.lists(st.integers(0, 2**63 - 1)))
def test_any_numbers_survive_the_encoding(numbers):
    assert decoded(exports.tf_example({"x": np.asarray(numbers, np.int64), "": np.asarray([7])})) == {
        "x": numbers,
        "": [7],
    }


def test_numbers_take_as_many_bytes_as_protocol_buffers_give_them():
    assert exports.varints(np.asarray([0, 127, 128, 300, 256299])).hex() == "007f8001ac02abd20f"


def test_an_export_that_was_killed_goes_on_to_the_same_bytes_and_a_complete_one_is_never_touched(loader, tmp_path):
    whole = tmp_path / "whole"
    exports.export(loader, str(whole), plan(loader))
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("plan.json", "rows-00000-of-00003.parquet"):
        (killed / name).write_bytes((whole / name).read_bytes())
    exports.export(loader, str(killed), plan(loader))
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    with pytest.raises(DataError, match="whole: holds a complete export; choose another folder, or remove it"):
        exports.export(loader, str(whole), plan(loader))


def test_nothing_else_is_overwritten(loader, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds thesis\.txt, which is no export; choose an empty folder"):
        exports.export(loader, str(tmp_path), plan(loader))
    other = tmp_path / "other"
    other.mkdir()
    exports.export(loader, str(other), plan(loader))
    (other / "export.json").unlink()
    with pytest.raises(DataError, match="holds a part of another export"):
        exports.export(loader, str(other), plan(loader, rows=(10, 21)))


def test_rows_that_are_not_built_are_refused_before_anything_is_written(loader, tmp_path):
    with pytest.raises(DataError, match=r"rows \[0, 100000\) were asked for"):
        exports.export(loader, str(tmp_path), plan(loader, rows=(0, 100_000)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="rows: the first must be at least 0 and below the end, got 7:7"):
        plan(loader, rows=(7, 7))


def test_an_export_goes_to_gs(loader, gcs, tmp_path):
    folder = storage.join(gcs, tmp_path.name)
    exports.export(loader, folder, plan(loader, "array_record"))
    assert storage.list_files(folder)[:2] == ["export.json", "plan.json"]
    copy = Path(tmp_path / "copy.array_record")
    copy.write_bytes(storage.read_bytes(storage.join(folder, "rows-00002-of-00003.array_record")))
    assert list(read(copy)) == [18, 19]
