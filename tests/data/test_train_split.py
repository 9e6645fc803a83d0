from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s4g_ray.data.dataset import write_dataset
from s4g_ray.data.pairs import join_pairs
from s4g_ray.data.train_split import TrainSplit
from tests.conftest import tables, tiny_config


def split_of(folder: Path, references: pa.Table, queries: pa.Table) -> TrainSplit:
    dataset = write_dataset(str(folder), references, queries, name="n")
    return TrainSplit.read(tiny_config(folder / "run", dataset.uri), dataset)


def test_a_place_with_one_query_and_one_reference_takes_48_bytes(tmp_path: Path) -> None:
    split = split_of(tmp_path, *tables(50))
    pairs = split.pairs
    places = split.places
    arrays: list[Any] = [split.query_ids, split.reference_ids, split.reference_places]
    arrays += [pairs.query_ids, pairs.reference_ids, pairs.place_ids]
    arrays += [places.ids, places.lat, places.lon]
    assert sum({id(array): array.nbytes for array in arrays}.values()) == 48 * 50


@pytest.mark.parametrize("seed", range(5))
def test_a_split_of_places_in_any_order_holds_what_plain_loops_find(
    seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    references, queries = tables(30)
    number = references.column_names.index("place_id")
    reference_places = rng.integers(100, 120, 30) if seed else rng.permutation(30) + 100
    query_places = rng.choice(reference_places, 30)
    references = references.set_column(number, "place_id", pa.array(reference_places))
    queries = queries.set_column(number, "place_id", pa.array(query_places))
    split = split_of(tmp_path, references, queries)
    wanted = [
        (query, reference, place)
        for query, place in enumerate(query_places.tolist())
        for reference, other in enumerate(reference_places.tolist())
        if place == other
    ]
    pairs = split.pairs
    columns = (pairs.query_ids, pairs.reference_ids, pairs.place_ids)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == wanted
    paired = [n for n, place in enumerate(reference_places.tolist()) if place in query_places]
    assert split.reference_ids.tolist() == paired
    assert split.reference_places.tolist() == reference_places[paired].tolist()
    assert split.places.ids.tolist() == sorted(set(query_places.tolist()))
    lat = np.linspace(-10.0, 10.0, 30)
    for place, found in zip(split.places.ids, split.places.lat, strict=True):
        assert found == lat[np.flatnonzero(reference_places == place)[0]]


def test_pairs_share_no_array_that_has_other_rows() -> None:
    ids = np.arange(4)
    pairs = join_pairs(ids, np.array([5, 6, 7, 9]), ids + 10, np.array([7, 6, 5, 9]))
    assert pairs.query_ids is ids
    assert pairs.reference_ids.tolist() == [12, 11, 10, 13]
