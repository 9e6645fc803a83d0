"""Text columns against the Python lists that they replace."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from s4g_ray.data.tables.arrow_texts import read_paths, read_texts, sort_by_id
from s4g_ray.data.tables.text_column import TextColumn, shrink
from s4g_ray.storage import files

PATHS = {
    "one": ["a.jpg"],
    "loose": [f"images/{i:03d}.jpg" for i in range(50)],
    "absolute": [f"/disk/é{i}.jpg" for i in range(50)],
    "mixed": ["a/0.jpg", "/b/1.jpg", "s3://c/ü.jpg", "", "a", "a/0.jpg"],
    "shards": [f"shards/{i // 20}.tar" for i in range(100)],
    "one shard": ["s3://b/shard.tar"] * 30,
    "half repeated": [f"{i // 2}.jpg" for i in range(40)],
    "none": [],
}


def read(paths: Sequence[str]) -> TextColumn:
    """Read paths from a column in two chunks, one of them a slice."""
    half = len(paths) // 2
    second = pa.array(["cut off", *paths[half:]]).slice(1)
    return read_paths(pa.chunked_array([pa.array(paths[:half], pa.string()), second]), "/data/")


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
def test_paths_are_those_that_joining_each_gives(paths: list[str]) -> None:
    column = read(paths)
    wanted = [files.join("/data/", path) for path in paths]
    assert list(column) == wanted
    assert list(TextColumn.from_texts(wanted)) == wanted
    for made in (column, TextColumn.from_texts(wanted)):
        assert [made[i] for i in range(-len(made), 0)] == wanted
        for row in (len(wanted), -len(wanted) - 1):
            with pytest.raises(IndexError):
                made[row]


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
def test_rows_and_slices_are_those_of_a_list(paths: list[str]) -> None:
    column = read(paths)
    wanted = list(column)
    rows = np.random.default_rng(0).integers(0, max(len(wanted), 1), 2 * len(wanted))
    taken = column.take(rows)
    assert list(taken) == [wanted[row] for row in rows]
    for part in (slice(0, 3), slice(2, 2), slice(5, 9), slice(len(wanted), None), slice(None)):
        assert list(column.take(part)) == column[part] == wanted[part]
        assert list(taken.take(part)) == list(taken)[part]
    assert column[::-2] == wanted[::-2]


def test_what_repeats_is_kept_once() -> None:
    shards = read(PATHS["shards"])
    assert shards.prefix == "/data/shards/"
    assert bytes(shards.heap) == b"0.tar1.tar2.tar3.tar4.tar"
    assert shards.codes is not None
    loose = read(PATHS["loose"])
    assert (loose.prefix, loose.codes) == ("/data/images/0", None)
    assert len(loose.heap) == 50 * len("00.jpg")
    assert len(read(["same.jpg"] * 1000).heap) == 0


def test_a_pickled_slice_holds_its_own_texts_alone() -> None:
    for name in ("loose", "shards"):
        part = read(PATHS[name]).take(slice(20, 25))
        assert len(pickle.dumps(part)) < 600
        assert list(pickle.loads(pickle.dumps(part))) == read(PATHS[name])[20:25]


def test_integers_are_halved_only_where_they_fit() -> None:
    for value, dtype in ((2**31 - 1, "int32"), (2**31, "int64"), (-(2**31) - 1, "int64")):
        shrunk = shrink(np.array([0, value]))
        assert (str(shrunk.dtype), shrunk.tolist()) == (dtype, [0, value])
    assert shrink(np.zeros(0, np.int64)).dtype == np.int32


def test_tables_are_sorted_by_id_and_sorted_ones_stay_as_they_are() -> None:
    table = pa.table({"id": [3, 1, 2], "uri": ["c", "a", "b"]})
    found = sort_by_id(table)
    assert (found["id"].to_pylist(), list(read_texts(found["uri"]))) == ([1, 2, 3], ["a", "b", "c"])
    assert sort_by_id(found) is found
