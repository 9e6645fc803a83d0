from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.format import columns
from s4g_ray.data.format.columns import conform, iterate_tables
from s4g_ray.errors import InputError
from tests.conftest import tables

NUMBERS = [0, 1, 2, 3]
TEXTS = ["train", "train", "test", "train"]
LISTS = [[101, 102], None, [], [100]]
WHOLE = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    *(pa.float32(), pa.float64(), pa.decimal128(9, 2), pa.decimal256(40, 0)),
    pa.dictionary(pa.int8(), pa.int64()),
]
STRINGS = [
    *(pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()),
    *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.uint8(), pa.large_string())),
    pa.dictionary(pa.uint32(), pa.string_view()),  # categories of polars
]
NESTED = [
    *(pa.large_list(pa.int64()), pa.list_(pa.int32()), pa.list_(pa.float64())),
    *(pa.large_list(pa.uint16()), pa.list_view(pa.int64())),
]


def write(folder: Path, column: str, values: Any) -> GeoDataset:
    """Write four queries with one column as given."""
    references, queries = tables()
    columns = {name: queries[name] for name in queries.column_names}
    columns[column] = values
    return write_dataset(str(folder), references, pa.table(columns), name="n")


def read(dataset: GeoDataset, column: str) -> Any:
    table = dataset.queries.to_table(columns=list({"id": None, column: None})).sort_by("id")
    return table[column]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        *(("id", kind, NUMBERS) for kind in WHOLE),
        *(("lat", kind, NUMBERS) for kind in WHOLE),
        *(("heading_deg", kind, [0, None, 2, 3]) for kind in WHOLE),
        *(("split", kind, TEXTS) for kind in STRINGS),
        *(("region", kind, ["é", None, "", "x"]) for kind in STRINGS if "binary" not in str(kind)),
        *(("region", kind, NUMBERS) for kind in (pa.int32(), pa.uint64())),
        *(("semi_positives", kind, LISTS) for kind in NESTED),
        *((name, pa.null(), [None] * 4) for name in ("region", "semi_positives", "heading_deg")),
    ],
    ids=str,
)
def test_types_that_lose_nothing_are_cast_to_those_of_the_schema(
    tmp_path: Path, column: str, kind: pa.DataType, values: list[Any], chunked: bool
) -> None:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_decimal(plain):
        values = [None if value is None else Decimal(value) for value in values]
    array = pa.array(values, plain)
    if plain != kind:
        array = array.dictionary_encode().cast(kind)
    given = pa.chunked_array([array[:1], array[1:]] if chunked else [array])
    found = read(write(tmp_path, column, given), column)
    wanted = [str(value) for value in values] if column == "region" and kind in WHOLE else values
    assert found.to_pylist() == wanted
    assert str(found.type) in ("int64", "double", "float", "string", "list<element: int64>")


@pytest.mark.parametrize("cast_rows", [1, 3, 10**6])
@pytest.mark.parametrize("kind", [pa.large_string(), pa.large_binary()])
def test_texts_beyond_2_gib_of_a_chunk_are_cast(
    kind: pa.DataType, cast_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "CAST_ROWS", cast_rows)
    data = np.zeros(2**31 + 8, np.uint8)  # pages that are not written take no memory
    data[-8:] = list(b"a.jpb.jp")
    starts = np.arange(2**31, 2**31 + 9, 2)
    buffers = [None, pa.py_buffer(starts), pa.py_buffer(data)]
    uris = pa.Array.from_buffers(kind, 4, buffers)
    queries = tables()[1].drop_columns(["uri"]).append_column("uri", uris)
    found = conform(queries, "queries")["uri"]
    found.validate(full=True)
    assert found.to_pylist() == ["a.", "jp", "b.", "jp"]


class Numbered(pa.ExtensionType):  # type: ignore[misc]
    """An extension type, as other libraries define for ids."""

    def __init__(self) -> None:
        super().__init__(pa.int32(), "tests.numbered")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Numbered:
        return cls()


def test_extension_and_run_end_encoded_columns_are_read_by_their_values(tmp_path: Path) -> None:
    ids = pa.ExtensionArray.from_storage(Numbered(), pa.array(NUMBERS, pa.int32()))
    assert read(write(tmp_path / "a", "id", ids), "id").to_pylist() == NUMBERS
    splits = pc.run_end_encode(pa.array(TEXTS))
    assert read(write(tmp_path / "b", "split", splits), "split").to_pylist() == TEXTS


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string_view())], ids=str
)
@pytest.mark.parametrize("chunked", [False, True])
def test_run_end_encoded_columns_of_any_texts_are_read_by_their_values(
    tmp_path: Path, kind: pa.DataType, chunked: bool
) -> None:
    values = pa.array(["x", None, ""])
    if pa.types.is_dictionary(kind):
        values = values.dictionary_encode()
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3, 6], pa.int32()), values.cast(kind))
    regions = pa.chunked_array([runs[1:3], runs[3:5]] if chunked else [runs[1:5]])
    found = read(write(tmp_path, "region", regions), "region")
    assert found.to_pylist() == ["x", None, "", ""]


def test_an_empty_run_end_encoded_column_is_cast() -> None:
    kind = pa.run_end_encoded(pa.int32(), pa.string_view())
    queries = tables()[1].slice(0, 0)
    found = conform(queries.append_column("region", pa.chunked_array([], kind)), "queries")
    assert len(found) == 0


def cast_of(message: str) -> str:
    """The cast that a message names."""
    found = re.search(r"(?:cast|round) it: (.*)", message)
    assert found is not None, message
    return found[1]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("id", [0.0, 1.0, 2.5, 3.0], r"column 'id', row 2: 2\.5 \(double\) is no int64; round it"),
        (
            "id",
            [Decimal(f"{number}.5") for number in range(4)],
            r"'id', row 0: Decimal\('0.5'\).* round",
        ),
        ("id", [True, False, True, False], "column 'id' is bool, but must be int64; cast it"),
        ("id", ["7", "8", "9", "10"], "column 'id' is string, but must be int64; cast it"),
        (
            "place_id",
            pa.array([datetime.datetime(2024, 1, day) for day in (1, 2, 3, 4)]),
            "'place_id' is timestamp.*, but must be int64; cast it",
        ),
        ("lat", ["1", "2", "3", "4"], "column 'lat' is string, but must be double; cast it"),
        ("uri", NUMBERS, "column 'uri' is int64, but must be string; cast it"),
        ("split", [True] * 4, "column 'split' is bool, but must be string; cast it"),
    ],
)
def test_what_would_lose_something_is_refused_with_a_cast_that_helps(
    tmp_path: Path, column: str, values: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        write(tmp_path, column, values)
    table = tables()[1].drop([column]).append_column(column, pa.chunked_array([pa.array(values)]))
    given = eval(cast_of(str(error.value)), {"table": table, "pa": pa, "pc": pc})
    conform(table.drop([column]).append_column(column, given), "queries")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("id", [0.0, 1.0, float("nan"), 3.0], r"column 'id', row 2: nan .*drop such rows"),
        ("id", pa.array([0, 1, 2, 2**63], pa.uint64()), "row 3: 9223372036854775808 .*too large"),
        ("id", [0.0, 1e300, 2.0, 3.0], r"row 1: 1e\+300 \(double\) is no int64"),
        ("uri", [b"a", b"b", b"caf\xe9", b"d"], r"'uri', row 2: b'caf\\xe9' .*UTF-8 text"),
        ("semi_positives", [[1], [2], [1.5], []], r"row 2: \[1\.5\] .*give whole numbers"),
        ("semi_positives", [["1"], [], [], []], "'semi_positives' is list<.*string>, but must be"),
        ("semi_positives", NUMBERS, "'semi_positives' is int64, but must be list"),
        (
            "lat",
            [{"x": 1.0}] * 4,
            r"'lat' is struct.*pc\.struct_field\(table\[.lat.\], \['x'\]\)",
        ),
        ("id", pa.nulls(4), "row 0: id is null; give every row one; 3 more"),
        ("Lat", [0.0] * 4, "unknown column 'Lat'; did you mean 'lat'"),
        ("heading", [0.0] * 4, "unknown column 'heading'; did you mean 'heading_deg'"),
        ("size_m", [60.0] * 4, "unknown column 'size_m'; references have such a column"),
        ("weather", ["x"] * 4, "unknown column 'weather'; drop it, or rename it to one of id, pl"),
        ("__index_level_0__", NUMBERS, r"index of a pandas frame: reset_index\(drop=True\)"),
    ],
)
def test_other_values_and_columns_are_refused_by_name_and_row(
    tmp_path: Path, column: str, values: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"queries.*{message}"):
        write(tmp_path, column, values)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("column", ["id", "place_id", "semi_positives"])
@pytest.mark.parametrize(("kind", "bits"), [(pa.float16(), 11), (pa.float32(), 24), (None, 53)])
def test_whole_numbers_that_may_be_rounded_are_refused(
    column: str, kind: pa.DataType | None, bits: int
) -> None:
    queries = tables()[1]

    def make(number: int) -> pa.Table:
        values = pa.array([3.0, float(number), 0.0, -1.0], kind or pa.float64())
        if column == "semi_positives":
            values = pa.array([None, [], *([value] for value in values[:2].to_pylist())])
            values = values.cast(pa.list_(kind or pa.float64()))
        given = pa.chunked_array([values[:2], values[2:]])
        columns = {name: queries[name] for name in queries.column_names}
        return pa.table({**columns, column: given})

    row = 3 if column == "semi_positives" else 1
    for number in (2**bits - 1, 1 - 2**bits):
        found = conform(make(number), "queries")[column].to_pylist()[row]
        assert found == ([number] if column == "semi_positives" else number)
    for number in (2**bits, -(2**bits), 2 ** (bits + 3)):
        message = f"{column}', row {5 + row}: .* may be rounded: .* below 2..{bits} .*pandas: Int64"
        with pytest.raises(InputError, match=message):
            conform(make(number), "queries", 5)


def test_a_repeated_column_is_refused(tmp_path: Path) -> None:
    references, queries = tables()
    twice = queries.append_column("lat", queries["lat"])
    with pytest.raises(InputError, match="queries: column 'lat' is there twice"):
        write_dataset(str(tmp_path), references, twice, name="n")


def test_rows_of_later_tables_are_numbered_through(tmp_path: Path) -> None:
    references, queries = tables()
    number = queries.column_names.index("id")
    later = queries.set_column(number, "id", [[4.0, 5.0, 6.5, 7.0]])
    with pytest.raises(InputError, match=r"'id', row 6: 6\.5"):
        write_dataset(str(tmp_path), references, iter([queries, later]), name="n")


def test_a_pandas_frame_is_a_table(tmp_path: Path) -> None:
    references, queries = (table.to_pandas() for table in tables())
    queries["split"] = queries["split"].astype("category")
    queries["heading_deg"] = np.array([0.0, np.nan, 2.0, 3.0])
    dataset = write_dataset(str(tmp_path / "a"), references, queries, name="n")
    assert read(dataset, "heading_deg").to_pylist() == [0.0, None, 2.0, 3.0]
    kept = queries.iloc[[0, 3, 1]]
    dataset = write_dataset(str(tmp_path / "b"), references, [kept], name="n")
    assert read(dataset, "id").to_pylist() == [0, 1, 3]
    with pytest.raises(InputError, match=r"index of a pandas frame: reset_index"):
        write_dataset(str(tmp_path / "c"), references, pa.Table.from_pandas(kept), name="n")


class Frame:
    """A data frame as polars and DuckDB give them: it exports Arrow, and iterates over columns."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __iter__(self) -> Iterator[Any]:
        return iter(self._table.columns)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


def test_a_frame_that_exports_arrow_is_a_table_alone_or_among_others(tmp_path: Path) -> None:
    references, queries = tables()
    wanted = write_dataset(str(tmp_path / "a"), references, queries, name="n").fingerprint
    reader = pa.RecordBatchReader.from_batches(queries.schema, queries.to_batches(max_chunksize=1))
    for number, rows in enumerate((Frame(queries), [Frame(queries)], reader)):
        dataset = write_dataset(str(tmp_path / str(number)), Frame(references), rows, name="n")
        assert dataset.fingerprint == wanted


class LazyFrame:
    """A query of polars: it has rows once it is collected."""

    def collect(self) -> Any:
        return tables()[0]


@pytest.mark.parametrize(
    ("rows", "remedy"),
    [
        *((rows, r"give a pyarrow\.Table") for rows in ("a.parquet", 5, None, ["a.csv"], [[1, 2]])),
        *((rows, r"give pyarrow\.table") for rows in ({"id": [1]}, [{"id": 1}])),
        (LazyFrame(), r"collect it, as frame\.collect\(\)"),
    ],
)
def test_what_is_no_table_is_refused(rows: Any, remedy: str) -> None:
    with pytest.raises(InputError, match=f"is no table: {remedy}"):
        list(iterate_tables(rows))
