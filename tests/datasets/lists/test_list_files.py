from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.datasets.lists import list_files
from s4g_ray.datasets.lists.image_lists import ImageList, read_list
from s4g_ray.datasets.lists.list_files import CsvList, ParquetList
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.errors import InputError

OPTIONS = ListOptions(
    pair="key",
    path_column="path",
    lat_column="lat",
    lon_column="lon",
    key_column="key",
    max_distance_m=None,
    split_column="split",
    test_fraction=0.2,
    region_column="region",
    heading_column="heading",
    id_column=None,
)
HEADER = ["path", "lat", "lon", "key", "split", "region", "heading"]
# what a value may look like: read by Arrow, by the csv module alone, or refused
VALUES = {
    "path": ["a.jpg", " b c.jpg ", "é/ü.png", "", 'say "hi".jpg', "a,b.jpg", "two\nlines.jpg"],
    "lat": ["1.5", " 2 ", "-90", "90.1", "", "+3", "1e1", "1_0", "nan", "x", "７"],
    "lon": ["2.5", "", "-180", "inf", "0x10"],
    "key": ["k", "0", "\tk", ""],
    "split": ["train", " test", "val", "gallery", ""],
    "region": ["", "r", "null", "NaN"],
    "heading": ["", "0", "-360", "361", "north"],
}


def read(reader: Any) -> dict[str, list[Any]] | str:
    """Return the columns of a list, or what it is refused with."""
    try:
        images = ImageList.from_chunks(reader, list(reader.read()))
    except InputError as error:
        return str(error)
    texts = {name: images.column(name).to_pylist() for name in ("path", "key", "region")}
    arrays: dict[str, Any] = {
        "number": images.numbers,
        "id": images.ids,
        "lat": images.lat,
        "lon": images.lon,
        "split": images.splits,
        "heading": images.headings,
    }
    return {**texts, **{name: [str(v) for v in column] for name, column in arrays.items()}}


def read_csv(text: str, block_bytes: int, *, is_plain: bool | None = None) -> Any:
    """Read a CSV text of queries in blocks; is_plain: False to read it by the csv module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_files, "BLOCK_BYTES", block_bytes)
        if is_plain is not None:
            patch.setattr(list_files, "is_plain", lambda block: is_plain)
        return read(CsvList("q.csv", io.BytesIO(text.encode()), "queries", OPTIONS))


good_first = {kind: st.sampled_from([*values[:2] * 8, *values]) for kind, values in VALUES.items()}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.fixed_dictionaries(good_first), st.none()), max_size=8),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(40, 300),
    st.booleans(),
)
def test_blocks_by_arrow_give_what_the_csv_module_gives_row_by_row(
    rows: list[dict[str, str] | None], line_end: str, block_bytes: int, quoted: bool
) -> None:
    """Values that Arrow does not read, refused values, blank lines, quotes and line ends."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(
        buffer,
        lineterminator=line_end,
        quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL,
    )
    writer.writerow(HEADER)
    for row in rows:
        if row is None:
            buffer.write(f" {line_end}")
        else:
            writer.writerow([row[name] for name in HEADER])
    text = buffer.getvalue()
    assert read_csv(text, block_bytes) == read_csv(text, 10**6, is_plain=False)


def test_lines_are_numbered_over_blocks_blank_lines_and_quoted_line_ends() -> None:
    lines = [",".join(HEADER)]
    lines += [f"{n}.jpg,1,2,k,train,," for n in range(40)]
    lines[20] = ""
    lines[31] = '"two\nlines.jpg",1,2,k,train,,'
    found = read_csv("\n".join(lines), 100)
    wanted = [n for n in range(2, 42) if n != 21]
    wanted = [n if n < 32 else n + 1 for n in wanted]
    assert found["number"] == [str(n) for n in wanted]
    lines[38] = "bad.jpg,91,2,k,train,,"
    assert read_csv("\n".join(lines), 100).startswith("q.csv, line 40: 91.0, 2.0 is not within")


def test_bytes_that_are_no_utf8_are_refused_with_their_line() -> None:
    text = ",".join(HEADER).encode() + b"\na.jpg,1,2,k,train,,\nb\xff.jpg,1,2,k,train,,\n"
    found = read(CsvList("q.csv", io.BytesIO(text), "queries", OPTIONS))
    assert found == (
        "q.csv is not UTF-8 text: line 3: invalid start byte (b'\\xff'); save it as UTF-8"
    )


def test_a_parquet_list_gives_the_rows_of_a_csv_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_files, "BATCH_ROWS", 7)
    rng = np.random.default_rng(0)
    lat = [None if n % 5 == 0 else float(rng.uniform(-90, 90)) for n in range(30)]
    columns = {
        "path": [f"{n}.jpg" for n in range(30)],
        "lat": pa.array(lat),
        "lon": pa.array(lat, pa.float32()),
        "key": pa.array(range(30)),
        "split": pa.array(["train", "test", "val"] * 10).dictionary_encode(),
        "region": [None, "r"] * 15,
        "heading": pa.array([None, 3, 7] * 10),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "q.parquet")
    with (tmp_path / "q.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [table.column_names, *zip(*table.to_pydict().values(), strict=True)]
        )
    source = SourceFolder(str(tmp_path))
    found = [read_list(source, f"q.{kind}", "queries", OPTIONS) for kind in ("csv", "parquet")]
    for name in ("ids", "lat", "lon", "headings", "splits"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    for name in ("path", "key", "region"):
        assert found[0].column(name).to_pylist() == found[1].column(name).to_pylist()
    assert [images.locate(9) for images in found] == [
        f"{tmp_path}/q.csv, line 11",
        f"{tmp_path}/q.parquet, row 9",
    ]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("lat", [1.0, float("nan"), 3.0], r"q\.parquet, row 1: nan, 2\.0 is not within"),
        ("path", ["a", "b", None], "row 2: path is empty"),
        ("split", ["train", "train", "all"], "row 2: split='all' is none of"),
        ("heading", ["1", "2", "x"], "row 2: heading='x' is not a number"),
    ],
)
def test_bad_values_of_parquet_are_refused_with_their_row(
    column: str, values: list[Any], message: str
) -> None:
    columns: dict[str, Any] = {
        "path": ["a", "b", "c"],
        "lat": [1.0, 2.0, 3.0],
        "lon": [2.0] * 3,
        "key": ["k"] * 3,
        "split": ["train"] * 3,
        "region": ["r"] * 3,
        "heading": [0.0] * 3,
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table({**columns, column: values}), buffer)
    buffer.seek(0)
    with pytest.raises(InputError, match=message):
        list(ParquetList("q.parquet", buffer, "queries", OPTIONS).read())


def test_files_that_are_no_lists_are_refused() -> None:
    with pytest.raises(InputError, match=r"q\.parquet is not a readable Parquet file"):
        list(ParquetList("q.parquet", io.BytesIO(b"path,lat"), "queries", OPTIONS).read())
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in HEADER}), buffer)
    buffer.seek(0)
    with pytest.raises(InputError, match=r"q\.parquet holds no row; list the queries in it"):
        list(ParquetList("q.parquet", buffer, "queries", OPTIONS).read())
