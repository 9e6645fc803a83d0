from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.data.schema import SPLITS
from s4g_ray.errors import InputError
from s4g_ray.pipeline.run import run
from tests.conftest import tables, tiny_config, with_validation
from tests.support.resealed import reseal

NAMES: dict[View, list[str]] = {
    "references": ["id", "place_id", "lat", "lon"],
    "queries": ["id", "place_id", "heading_deg"],
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 7 rows that are checked 3 at a time, and ids that are looked up 4 at a time."""
    monkeypatch.setattr("s4g_ray.data.schema.ROWS_PER_PART", 7)
    monkeypatch.setattr("s4g_ray.data.validation.BATCH_ROWS", 3)
    monkeypatch.setattr("s4g_ray.data.tables.part_writer.BATCH_ROWS", 3)
    monkeypatch.setattr("s4g_ray.data.validation.LOOKUP_ROWS", 4)


def random_tables(rows: int, seed: int = 0) -> dict[View, pa.Table]:
    """Tables of all columns and splits, whose ids are in no order."""
    rng = np.random.default_rng(seed)
    made: dict[View, pa.Table] = {}
    for view in VIEWS:
        split = [SPLITS[view][n] for n in rng.integers(0, len(SPLITS[view]), rows)]
        split[: rows // 3] = ["train"] * (rows // 3)
        known = rng.random(rows) < 0.7
        known[[8, 9, 29]] = True
        places = np.arange(rows) if view == "references" else rng.integers(0, rows // 3, rows)
        columns: dict[str, Any] = {
            "id": rng.permutation(rows * 3)[:rows],
            "place_id": places + 1000,
            "uri": [f"{n}.jpg" for n in range(rows)],
            "lat": [float(n) if k else None for n, k in enumerate(known)],
            "lon": [float(-n) if k else None for n, k in enumerate(known)],
            "split": split,
        }
        if view == "queries":
            heading = [float(n) if k else None for n, k in enumerate(~known)]
            columns["heading_deg"] = pa.array(heading, pa.float32())
            semi = [
                rng.integers(0, 99, n).tolist() if n < 4 else None for n in rng.integers(0, 5, rows)
            ]
            columns["semi_positives"] = pa.array(semi, pa.list_(pa.int64()))
        made[view] = pa.table(columns)
    return made


def all_columns(dataset: GeoDataset) -> list[Any]:
    """Everything that columns and semi_positives return, as lists."""
    found: list[Any] = []
    for view in VIEWS:
        for splits in (["train"], ["test", "gallery"], ["val"], [*SPLITS[view]], ["none"]):
            columns = dataset.columns(view, splits, NAMES[view])
            found += [str((column.dtype, column.tolist())) for column in columns]
    for split in SPLITS["queries"]:
        semi = dataset.semi_positives(split)
        found += [values.tolist() for values in (semi.query_ids, semi.offsets, semi.place_ids)]
    return found


@pytest.mark.usefixtures("small")
def test_columns_in_memory_are_those_of_the_files(tmp_path: Path) -> None:
    made = random_tables(30)
    written = write_dataset(str(tmp_path), made["references"], made["queries"], name="n")
    opened = open_dataset(str(tmp_path))
    copied = pickle.loads(pickle.dumps(opened))
    assert len(pickle.dumps(opened.held)) < 100
    of_written = all_columns(written)
    assert all_columns(opened) == of_written
    assert all_columns(copied) == of_written
    opened.release_columns()
    assert all_columns(opened) == of_written
    rows = {row["id"]: row["semi_positives"] for row in made["queries"].to_pylist()}
    semi = opened.semi_positives("train")
    ends = semi.offsets.tolist()
    for query, start, end in zip(semi.query_ids.tolist(), ends, ends[1:], strict=False):
        assert semi.place_ids[start:end].tolist() == rows[query]


def in_batches(table: pa.Table, size: int) -> Iterator[pa.RecordBatch]:
    yield from table.combine_chunks().to_batches(max_chunksize=size)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "cut",
    [
        lambda table: [table],
        lambda table: in_batches(table, 1),
        lambda table: in_batches(table, 10),
        lambda table: iter([table.slice(0, 7), table.slice(7, 0), table.slice(7)]),
        lambda table: pa.concat_tables([table.slice(0, 5), table.slice(5)]),
    ],
)
def test_rows_in_any_tables_give_the_same_files_and_fingerprint(
    cut: Callable[[pa.Table], Any], tmp_path: Path
) -> None:
    made = random_tables(30, seed=1)
    whole = write_dataset(str(tmp_path / "a"), made["references"], made["queries"], name="n")
    parted = write_dataset(
        str(tmp_path / "b"), cut(made["references"]), cut(made["queries"]), name="n"
    )
    assert parted.fingerprint == whole.fingerprint
    contents = []
    for folder in ("a", "b"):
        paths = sorted((tmp_path / folder).rglob("*.*"))
        contents.append([(path.name, path.read_bytes()) for path in paths])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 11
    assert all_columns(open_dataset(parted.uri)) == all_columns(whole)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("view", "column", "rows", "value", "message"),
    [
        (
            "references",
            "lat",
            [8, 9, 29],
            95.0,
            r"references/part-00001\.parquet, row 1 \(lat=95\.0\): .*; 2 more such rows",
        ),
        ("queries", "split", [20], "all", r"queries/part-00002\.parquet, row 6 \(split='all'\)"),
        ("queries", "place_id", [4, 25], -3, r"part-00000\.parquet, row 4 \(place_id=-3\).*1 more"),
        ("queries", "semi_positives", [16], [1, -2], r"part-00002\.parquet, row 2: semi_positives"),
        ("queries", "place_id", [3, 5], 1025, r"part-00000\.parquet, row 3: train query.*\(2 such"),
        (
            "references",
            "id",
            [5, 19],
            77_777,
            r"part-00002\.parquet, row 5: id 77777 is already used at .*-00000\.parquet, row 5;",
        ),
    ],
)
def test_faults_are_counted_over_batches_and_parts_and_nothing_is_left(
    view: View, column: str, rows: list[int], value: Any, message: str, tmp_path: Path
) -> None:
    """Written from a table, from batches, and opened from files: the same words."""
    made = random_tables(30, seed=2)
    values = made[view][column].to_pylist()
    for row in rows:
        values[row] = value
    number = made[view].column_names.index(column)
    faulty = made[view].set_column(
        number, column, pa.array(values, made[view].schema.field(column).type)
    )
    given = {**made, view: faulty}
    for cut in (lambda table: table, lambda table: in_batches(table, 4)):
        with pytest.raises(InputError, match=message):
            write_dataset(
                str(tmp_path / "d"), cut(given["references"]), cut(given["queries"]), name="n"
            )
        assert not [path for path in (tmp_path / "d").rglob("*") if path.is_file()]
    write_dataset(str(tmp_path / "d"), made["references"], made["queries"], name="n")
    for start in range(0, 30, 7):
        path = tmp_path / f"d/{view}/part-{start // 7:05d}.parquet"
        table = pq.read_table(path)
        of_part = faulty.slice(start, 7)[column].combine_chunks()
        pq.write_table(table.set_column(table.column_names.index(column), column, of_part), path)
    reseal(tmp_path / "d")
    with pytest.raises(InputError, match=message):
        open_dataset(str(tmp_path / "d"))


@pytest.mark.usefixtures("small")
def test_an_iterator_that_fails_leaves_no_parts(tmp_path: Path) -> None:
    made = random_tables(30)

    def fail() -> Iterator[pa.Table]:
        yield made["queries"]
        raise OSError("the source is gone")

    (tmp_path / "queries").mkdir()
    (tmp_path / "queries/mine.jpg").write_bytes(b"x")
    with pytest.raises(OSError, match="the source is gone"):
        write_dataset(str(tmp_path), made["references"], fail(), name="n")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.jpg"]


def test_rules_come_before_later_ones_whatever_the_order_of_their_rows(tmp_path: Path) -> None:
    """As a check of whole columns: ids, repeated ids, then values."""
    references, queries = tables(6)
    columns = references.to_pydict()
    columns["lat"][0] = 100.0
    columns["id"][3] = 1
    columns["place_id"][5] = -1
    for remedy, message in (
        (("place_id", 5, 105), r"row 5 \(place_id=-1\)"),
        (("id", 3, 3), "row 3: id 1 is already used at .*row 1"),
        (("lat", 0, 0.0), r"row 0 \(lat=100\.0\)"),
    ):
        with pytest.raises(InputError, match=message):
            write_dataset(str(tmp_path / "d"), pa.table(columns), queries, name="n")
        column, row, value = remedy
        columns[column][row] = value
    write_dataset(str(tmp_path / "d"), pa.table(columns), queries, name="n")


@pytest.mark.parametrize("statistics", [True, False])
def test_a_null_uri_is_found_with_and_without_statistics(tmp_path: Path, statistics: bool) -> None:
    dataset = write_dataset(str(tmp_path), *tables(6), name="n")
    path = tmp_path / "queries/part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, write_statistics=statistics)
    reseal(tmp_path)
    open_dataset(dataset.uri)
    uris = pa.array(["a", "b", None, "d", None, "f"])
    table = table.set_column(table.column_names.index("uri"), "uri", uris)
    pq.write_table(table, path, write_statistics=statistics)
    reseal(tmp_path)
    with pytest.raises(InputError, match="row 2: uri is null; give every row one; 1 more such row"):
        open_dataset(dataset.uri)


class StoppedError(Exception):
    """Raised where a run would begin to write."""


def test_a_run_reads_each_part_once_before_it_starts(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation, the train split and all checks against the configuration share one reading."""
    made = with_validation(synthetic, tmp_path / "validated")
    queries = made.queries.to_table()
    headings = pa.array(np.zeros(len(queries), np.float32))
    queries = queries.set_column(queries.column_names.index("heading_deg"), "heading_deg", headings)
    dataset = write_dataset(str(tmp_path / "d"), made.references.to_table(), queries, name="d")
    config = tiny_config(
        tmp_path / "run",
        dataset.uri,
        data={"query_heading": "known", "val_split": "val"},
        sampling={"mode": "similarity", "gallery_negatives": 2, "exclude_radius_m": 10.0},
    )
    opened: Counter[str] = Counter()
    open_file = LocalFileSystem.open

    def spy(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith(".parquet"):
            opened[re.sub(r".*/d/", "", path)] += 1
        return open_file(self, path, *args, **kwargs)

    def stop(*_: Any, **__: Any) -> None:
        raise StoppedError

    monkeypatch.setattr(LocalFileSystem, "open", spy)
    monkeypatch.setattr("s4g_ray.pipeline.driver.RunFolder.open", stop)
    with pytest.raises((StoppedError, InputError)) as stopped:
        run(config)
    if stopped.type is InputError:  # there are no references without a query
        assert "sampling.gallery_negatives=2 exceeds the 0 places" in str(stopped.value)
    assert opened == {f"{view}/part-00000.parquet": 1 for view in VIEWS}
