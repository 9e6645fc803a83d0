from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.errors import InputError
from tests.conftest import tables
from tests.support.resealed import reseal


def with_column(
    table: pa.Table, name: str, values: Any, kind: pa.DataType | None = None
) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def test_a_written_data_set_opens_with_all_columns_and_counts(tmp_path: Path) -> None:
    references, queries = tables()
    dataset = write_dataset(str(tmp_path / "d"), references, queries, name="small")
    assert dataset.queries.schema.names[-2:] == ["heading_deg", "semi_positives"]
    assert dataset.references.count_rows() == 4
    header = json.loads((tmp_path / "d/dataset.json").read_text())
    assert header["counts"]["queries"] == {"train": 4}
    assert open_dataset(str(tmp_path / "d")).fingerprint == dataset.fingerprint
    table = dataset.table("references", ["train"])
    assert table.uris[1] == f"{tmp_path}/d/1.jpg"
    assert table.rows(np.array([3, 0])).tolist() == [3, 0]
    with pytest.raises(KeyError):
        table.rows(np.array([9]))


def test_a_table_holds_the_rows_of_its_splits_as_they_were_given_sorted_by_id(
    tmp_path: Path,
) -> None:
    references, queries = tables(30)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = references.drop(["place_id"]).to_pylist()
    for place, row in enumerate(rows):
        row["id"] = int(rng.integers(10**9)) * 30 + place
        row["place_id"] = 100 + place
        row["uri"] = ("a.tar", "/b.tar", "s3://c/d.tar")[place % 3]
        row["offset"] = place * 10**9 if place % 4 else None
        row["length"] = place + 1 if place % 4 else None
        row["split"] = ("train", "test", "gallery")[place // 10]
        row["region"] = None if place % 5 else f"é{place}"
    dataset = write_dataset(
        str(tmp_path / "d"), pa.Table.from_pylist(rows), queries.slice(0, 10), name="x"
    )
    table = dataset.table("references", ["gallery", "train"])
    wanted = sorted((row for row in rows if row["split"] != "test"), key=lambda row: int(row["id"]))
    whole = {"a.tar": f"{tmp_path}/d/a.tar"}
    assert list(table.uris) == [whole.get(row["uri"], row["uri"]) for row in wanted]
    assert list(table.regions) == [row["region"] or "" for row in wanted]
    for name, column in (
        ("id", table.ids),
        ("place_id", table.place_ids),
        ("lat", table.lat),
        ("lon", table.lon),
    ):
        assert column.tolist() == [row[name] for row in wanted]
    for name, positions in (("offset", table.offsets), ("length", table.lengths)):
        given = [-1 if row[name] is None else row[name] for row in wanted]
        assert positions.tolist() == given
    assert len(dataset.table("references", ["val"])) == 0


def test_pairs_join_every_query_with_every_reference_of_its_place(tmp_path: Path) -> None:
    references, queries = tables(6)
    references = with_column(references, "place_id", [5, 5, 7, 8, 9, 9])
    queries = with_column(queries, "place_id", [9, 7, 5, 9, 8, 7])
    queries = with_column(queries, "split", ["train"] * 5 + ["test"])
    pairs = write_dataset(str(tmp_path / "d"), references, queries, name="x").pairs("train")
    found = sorted(
        zip(
            pairs.query_ids.tolist(),
            pairs.reference_ids.tolist(),
            pairs.place_ids.tolist(),
            strict=True,
        )
    )
    wanted = [
        (q, r, place)
        for q, place in enumerate([9, 7, 5, 9, 8])
        for r, other in enumerate([5, 5, 7, 8, 9, 9])
        if place == other
    ]
    assert found == sorted(wanted)


@pytest.mark.parametrize(
    ("view", "column", "values", "message"),
    [
        (
            "references",
            "id",
            [0, 1, 1, 3],
            r"references/part-00000\.parquet, row 2: id 1 is already used at .*row 1",
        ),
        ("queries", "id", [0, 0, 2, 3], "queries/part-00000.parquet, row 1: id 0"),
        ("references", "lat", [0.0, 91.0, 0.0, 0.0], r"row 1 \(lat=91\.0\).*-90\.\.90"),
        ("queries", "lon", [0.0, 0.0, -180.5, 0.0], r"row 2 \(lon=-180\.5\)"),
        ("queries", "lat", [0.0, 0.0, float("nan"), 0.0], r"row 2 \(lat=nan\)"),
        (
            "queries",
            "lat",
            [0.0, None, 0.0, 0.0],
            "row 1: only one of lat and lon is given; give both",
        ),
        (
            "references",
            "split",
            ["train", "training", "train", "train"],
            r"row 1 \(split='training'\)",
        ),
        ("queries", "split", ["train", "gallery", "train", "train"], "split='gallery'"),
        (
            "queries",
            "place_id",
            [100, 101, 102, 999],
            "row 3: train query of place_id 999, which has no train",
        ),
        ("queries", "place_id", [100, 101, 102, None], "row 3: place_id is null"),
        ("queries", "id", [0, 1, -2, 3], r"row 2 \(id=-2\): id is negative"),
        ("references", "place_id", [100, -101, 102, 103], "place_id is negative"),
        ("references", "uri", ["a", None, "b", "c"], "row 1: uri is null"),
    ],
)
def test_faulty_rows_are_refused_with_file_and_row(
    tmp_path: Path, view: str, column: str, values: list[Any], message: str
) -> None:
    made = dict(zip(("references", "queries"), tables(), strict=True))
    made[view] = with_column(made[view], column, values)
    with pytest.raises(InputError, match=message):
        write_dataset(str(tmp_path / "d"), made["references"], made["queries"], name="x")
    assert not (tmp_path / "d/dataset.json").exists()


def test_parquet_with_wrong_columns_is_refused_with_the_file(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path / "d"), *tables(), name="x")
    path = tmp_path / "d/references/part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop(["lat"]), path)
    reseal(tmp_path / "d")
    with pytest.raises(InputError, match=r"part-00000\.parquet: missing columns lat \(double\)"):
        open_dataset(dataset.uri)
    pq.write_table(with_column(table, "id", [str(i) for i in range(4)]), path)
    reseal(tmp_path / "d")
    with pytest.raises(InputError, match="column 'id' is string, but must be int64"):
        open_dataset(dataset.uri)
    size = path.stat().st_size
    path.write_bytes(b"no parquet".ljust(size))
    with pytest.raises(InputError, match="not a readable Parquet file"):
        open_dataset(dataset.uri)


def test_opening_a_missing_data_set_and_writing_over_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data set at .*dataset\.json is missing"):
        open_dataset(str(tmp_path / "none"))
    write_dataset(str(tmp_path / "d"), *tables(), name="x")
    with pytest.raises(InputError, match="holds a data set already"):
        write_dataset(str(tmp_path / "d"), *tables(), name="x")


def test_writing_leaves_other_files_alone_and_invalid_tables_write_nothing(
    tmp_path: Path,
) -> None:
    references, queries = tables()
    photo = tmp_path / "d/queries/0.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"mine")
    with pytest.raises(InputError, match="keys references and queries"):
        write_dataset(str(tmp_path / "d"), references, queries, name="x", views={"query": "photo"})
    with pytest.raises(InputError):
        write_dataset(
            str(tmp_path / "d"), references, with_column(queries, "lat", [99.0] * 4), name="x"
        )
    assert [p.name for p in (tmp_path / "d").rglob("*") if p.is_file()] == ["0.jpg"]
    write_dataset(str(tmp_path / "d"), references, queries, name="x")
    assert photo.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not of format 's4g-dataset'"),
        ('{"format": "other"}', "is not of format 's4g-dataset'"),
        ('{"format": "s4g-dataset", "version": 1}', "version 1, and .* reads version 2; convert a"),
        ('{"format": "s4g-dataset", "version": 2}', "lacks name and fingerprint"),
        (
            '{"format": "s4g-dataset", "version": 2, "name": "n", "fingerprint": "f"}',
            "is damaged .*parts",
        ),
        (
            '{"format": "s4g-dataset", "version": 2, "name": "n", "fingerprint": "f",'
            ' "parts": [{"name": "../x.parquet", "rows": 1, "bytes": 1, "sha256": ""}]}',
            "no part's name",
        ),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: str, message: str) -> None:
    write_dataset(str(tmp_path / "d"), *tables(), name="x")
    (tmp_path / "d/dataset.json").write_text(header)
    with pytest.raises(InputError, match=rf"dataset\.json .*{message}"):
        open_dataset(str(tmp_path / "d"))


def test_faulty_rows_of_later_files_are_numbered_within_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.schema.ROWS_PER_PART", 2)
    references, queries = tables(5)
    references = with_column(references, "lon", [0.0, 0.0, 0.0, 200.0, 0.0])
    with pytest.raises(InputError, match=r"part-00001\.parquet, row 1 \(lon=200\.0\)"):
        write_dataset(str(tmp_path / "d"), references, queries, name="x")


def test_headings_regions_and_semi_positives_are_read_by_row(tmp_path: Path) -> None:
    references, queries = tables(4)
    queries = queries.append_column("heading_deg", pa.array([0.0, 90.0, None, 270.0], pa.float32()))
    queries = queries.append_column("region", pa.array(["x", None, "y", "x"]))
    queries = queries.append_column("semi_positives", pa.array([[101, 103], None, [], [100]]))
    made = write_dataset(str(tmp_path), references, queries, name="n")
    table = made.table("queries", ["train"])
    np.testing.assert_array_equal(table.headings, [0, 90, np.nan, 270])
    assert list(table.regions) == ["x", "", "y", "x"]
    taken = table.take(np.array([3, 1]))
    assert (taken.headings.tolist(), list(taken.regions)) == ([270, 90], ["x", ""])
    assert np.isnan(made.table("references", ["train"]).headings).all()
    for _ in range(2):
        semi = made.semi_positives("train")
        assert [semi.query_ids.tolist(), semi.offsets.tolist()] == [[0, 3], [0, 2, 3]]
        assert semi.place_ids.tolist() == [101, 103, 100]
        assert [values.tolist() for values in semi.expand()] == [[0, 0, 3], [101, 103, 100]]
        assert len(made.semi_positives("test")) == 0
        made.release_columns()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "heading_deg",
            [0.0, float("inf"), None, 1.0],
            r"row 1 \(heading_deg=inf\): heading_deg is not within",
        ),
        ("heading_deg", [0.0, 10.0, 1e30, 1.0], r"row 2 .* is not within -360\.\.360"),
        ("semi_positives", [[101], None, [], [100, None]], "row 3: semi_positives holds a null"),
        (
            "semi_positives",
            [[], [-1], [], []],
            "row 1: semi_positives holds a null or a negative place_id",
        ),
    ],
)
def test_unusable_headings_and_semi_positives_are_refused(
    tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    references, queries = tables(4)
    kind = pa.float32() if column == "heading_deg" else pa.list_(pa.int64())
    with pytest.raises(InputError, match=message):
        write_dataset(
            str(tmp_path),
            references,
            queries.append_column(column, pa.array(values, kind)),
            name="n",
        )


def test_a_file_in_the_way_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot be a folder: .*file is a file"):
            write_dataset(str(target), *tables(2), name="n")


def test_folders_that_resemble_chained_urls_and_file_uris_are_plain_folders(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "a::b"), f"file://{tmp_path}/c"):
        assert write_dataset(uri, *tables(2), name="n").uri == uri.removeprefix("file://")
        assert open_dataset(uri).references.count_rows() == 2


def test_sizes_of_tiles_are_written_where_they_are_given_and_read_as_null_elsewhere(
    tmp_path: Path,
) -> None:
    references, queries = tables()
    plain = write_dataset(str(tmp_path / "plain"), references, queries, name="small")
    sized = references.append_column("size_m", pa.array([60, 120, None, 60]))
    given = write_dataset(
        str(tmp_path / "sized"), [sized, references.slice(0, 0)], queries, name="s"
    )
    for dataset, sizes in ((plain, [None] * 4), (given, [60.0, 120.0, None, 60.0])):
        opened = open_dataset(dataset.uri)
        read = np.array(sizes, dtype=np.float32)
        for one in (dataset, opened):
            assert one.references.to_table(columns=["size_m"])["size_m"].to_pylist() == sizes
            np.testing.assert_array_equal(one.table("references", ["train"]).sizes, read)
            assert np.isnan(one.table("queries", ["train"]).sizes).all()
    alike = references.append_column("size_m", pa.array([60.0] * 4))
    found = write_dataset(str(tmp_path / "alike"), alike, queries, name="a")
    for dataset, value in ((plain, np.nan), (found, 60.0)):  # one value takes the memory of all
        column = dataset.table("references", ["train"]).sizes
        np.testing.assert_array_equal(column, [np.float32(value)] * 4)
        assert column.strides == (0,)
    part = pq.read_schema(tmp_path / "plain/references/part-00000.parquet")
    assert "size_m" not in part.names
    wrong = references.append_column("size_m", pa.array([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(InputError, match=r"row 1 \(size_m=0\.0\): size_m is not above 0"):
        write_dataset(str(tmp_path / "wrong"), wrong, queries, name="w")
    path = tmp_path / "sized/references/part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(with_column(table, "size_m", [1.0] * 4, pa.float64()), path)
    reseal(tmp_path / "sized")
    with pytest.raises(InputError, match="column 'size_m' is double, but must be float"):
        open_dataset(given.uri)


def write_tiles_of(year: str, name: str, home: str, target: Path) -> GeoDataset:
    """Write the same rows as those of another year, but for the folder of their images."""
    made = []
    for table in tables():
        uris = [[f"{home}/{year}/tiles/{Path(uri).name}" for uri in table["uri"].to_pylist()]]
        made.append(table.set_column(table.column_names.index("uri"), "uri", uris))
    return write_dataset(str(target), *made, name=name)


@pytest.mark.parametrize("home", ["/mnt/a", "s3://bucket"])
def test_equal_rows_of_two_data_sets_have_fingerprints_of_their_own(
    tmp_path: Path, home: str
) -> None:
    first = write_tiles_of("2019", "lake2019", home, tmp_path / "first")
    other = write_tiles_of("2021", "lake2021", home, tmp_path / "other")
    moved = write_tiles_of("archive/2019", "lake2019", home, tmp_path / "moved")
    assert first.fingerprint == moved.fingerprint != other.fingerprint
