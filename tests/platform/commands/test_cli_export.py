import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from openmoe.pipelines.config import DataError
from openmoe.platform.commands import cli


def export(*arguments):
    return CliRunner().invoke(cli.app, ["data", "export", *map(str, arguments)], catch_exceptions=False)


def test_a_range_of_rows_is_exported_from_a_manifest(small_data, tmp_path):
    result = export(small_data.path, tmp_path / "out", "--rows", "5:15")
    assert result.exit_code == 0
    assert f"rows 5 to 14 in 1 file(s), data {small_data.data_id}" in result.stdout
    table = pq.read_table(tmp_path / "out" / "rows-00000-of-00001.parquet")
    assert table["row"].to_pylist() == list(range(5, 15))


def test_all_rows_are_exported_when_none_are_named(small_data, tmp_path):
    result = export(small_data.path, tmp_path / "out", "--format", "array_record", "--json")
    assert list(json.loads(result.stdout)["files"]) == ["rows-00000-of-00001.array_record"]
    assert (tmp_path / "out" / "rows-00000-of-00001.array_record").exists()


def test_a_range_that_is_none_is_one_line(small_data, tmp_path):
    with pytest.raises(DataError, match=r"^--rows 5-15: two numbers with a colon wanted, such as 0:\d+$"):
        export(small_data.path, tmp_path / "out", "--rows", "5-15")


def test_a_run_whose_data_is_not_built_says_how_to_build_it(tmp_path):
    with pytest.raises(DataError, match=r"no build of these settings; `openmoe data build RUN` makes one"):
        export("quickstart", tmp_path / "out", f"data_dir={tmp_path}/data", f"run_dir={tmp_path}/run")
