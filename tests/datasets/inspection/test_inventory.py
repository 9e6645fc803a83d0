from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.arrays import group
from s4g_ray.data.dataset import open_dataset
from s4g_ray.data.image_table import View
from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets.inspection.image_files import run_in_parallel
from s4g_ray.datasets.inspection.inventory import (
    Inventory,
    compute_extent,
    count_distinct,
    find_nearest_references,
    find_queries_near_train,
)
from tests.support.inspected_datasets import clean_tables, write_small


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_a_plain_loop(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = clean_tables()
    for table in tables.values():
        table |= {
            "id": list(range(120)),
            "uri": [f"{i}.png" for i in range(120)],
            "place_id": rng.integers(0, 12, 120).tolist(),
            "lat": rng.uniform(88.0, 90.0, 120).tolist(),
            "lon": rng.uniform(-180, 180, 120).tolist(),
            "split": ["train"] * 60 + rng.choice(["test", "val"], 60).tolist(),
        }
    tables["references"]["split"][100:] = ["gallery"] * 20
    tables["references"]["place_id"][:12] = list(range(12))
    rows = Inventory.read(open_dataset(write_small(tmp_path / "d", tables, images=False)))

    def metres(a: int, b: int) -> float:
        return float(metres_between(rows.lat[a], rows.lon[a], rows.lat[b], rows.lon[b]))

    def split(row: int) -> str:
        view: View = "queries" if rows.is_query[row] else "references"
        return str(tables[view]["split"][rows.ids[row]])

    wanted: dict[int, float] = {}
    for query in range(120, 240):
        galleries = {split(query)}
        if split(query) != "train":
            galleries.add("gallery")
        of_place = [
            reference
            for reference in range(120)
            if rows.place_ids[reference] == rows.place_ids[query] and split(reference) in galleries
        ]
        if of_place:
            wanted[query] = min(metres(query, reference) for reference in of_place)
    queries, nearest = find_nearest_references(rows)
    assert (rows.place_ids[queries] == rows.place_ids[nearest]).all()
    found = {
        int(query): metres(query, reference)
        for query, reference in zip(queries, nearest, strict=True)
    }
    assert found == pytest.approx(wanted)
    for held_out in ("val", "test"):
        by_query = {
            query: min(metres(query, other) for other in range(120, 180))
            for query in range(180, 240)
            if split(query) == held_out
        }
        # the distance of one of the queries: it counts as within the radius
        radius = float(np.median(list(by_query.values())))
        queries, _, distances = find_queries_near_train(rows, held_out, radius)
        expected = {query: distance for query, distance in by_query.items() if distance <= radius}
        assert dict(zip(queries.tolist(), distances, strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("lon", "west", "east", "degrees"),
    [
        ([179.0, -179.5, 178.0, -178.0], 178.0, -178.0, 4.0),
        ([-10.0, 20.0, 5.0], -10.0, 20.0, 30.0),
        ([0.0, 90.0, 180.0, -80.0], -80.0, 180.0, 260.0),
        ([12.5], 12.5, 12.5, 0.0),
    ],
)
def test_the_extent_is_the_smallest_interval_of_longitudes(
    lon: list[float], west: float, east: float, degrees: float
) -> None:
    lat = np.linspace(-60.0, 10.0, len(lon)) if len(lon) > 1 else np.zeros(1)
    box = compute_extent(lat, np.array(lon))
    assert (box["west"], box["east"]) == (west, east)
    assert box["km_east_west"] == pytest.approx(degrees * 111.195, rel=1e-5)
    # 10 degrees north and further, or 70 degrees for one point
    north = compute_extent(lat + 70.0, np.array(lon))
    expected = degrees * 111.195 * np.cos(np.radians(10.0))
    assert north["km_east_west"] == pytest.approx(expected, rel=1e-5)


def test_grouping_agrees_with_sets() -> None:
    rng = np.random.default_rng(0)
    a, b, values = rng.integers(0, 5, (3, 200))
    groups = group(a, b)
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    assert len(set(groups.tolist())) == len(pairs)
    assert groups.max() + 1 == len(pairs)
    members: dict[int, set[int]] = {}
    for number, value in zip(groups.tolist(), values.tolist(), strict=True):
        members.setdefault(number, set()).add(value)
    assert count_distinct(groups, values).tolist() == [
        len(members[number]) for number in groups.tolist()
    ]


def test_parallel_work_keeps_its_order_and_submits_few_calls_ahead() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return item * item

    results = run_in_parallel(
        work, list(range(100)), num_threads=2, on_progress=lambda done, total: None
    )
    assert next(results) == 0
    assert len(started) <= 8
    assert list(results) == [i * i for i in range(1, 100)]
