from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s4g_ray.data.dataset import open_dataset, write_dataset
from s4g_ray.datasets.inspection.part_checks import compare_parts
from tests.conftest import tables


def test_a_part_of_the_same_size_and_rows_with_other_values_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.schema.ROWS_PER_PART", 2)
    write_dataset(str(tmp_path), *tables(4), name="n")
    found = compare_parts(str(tmp_path), num_threads=2)
    assert (found.level, found.values) == ("ok", {"parts": 4, "altered": 0})
    path = tmp_path / "references/part-00001.parquet"
    table = pq.read_table(path)
    size = path.stat().st_size
    swapped = pa.array(["3.jpg", "2.jpg"])
    pq.write_table(table.set_column(table.column_names.index("uri"), "uri", swapped), path)
    assert path.stat().st_size == size
    open_dataset(str(tmp_path))
    found = compare_parts(str(tmp_path), num_threads=2)
    assert (found.level, found.examples) == ("fault", ("references/part-00001.parquet",))
    assert "1 of 4 Parquet parts altered since they were written; copy the data set" in found.text
