from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues
from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets import folder
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from tests.support.source_trees import rows

STEP = 0.001  # degrees between the centres of tiles, 111 m at the equator
SIDE = 6


def write_region(
    target: Path, size_m: float | None = 223.0, values: ImageValues = AS_STORED
) -> GeoDataset:
    """Write SIDE * SIDE tiles at the equator that overlap by half, and one split for all."""
    row, column = (axis.ravel() for axis in np.mgrid[:SIDE, :SIDE])
    ids = 10**15 + row * 1000 + column
    columns: dict[str, Any] = {
        "id": ids[::-1],
        "place_id": ids[::-1],
        "uri": ["shards/a.tar"] * len(ids),
        "offset": np.arange(len(ids)) * 1024,
        "length": np.full(len(ids), 100),
        "lat": (row * STEP)[::-1],
        "lon": (column * STEP)[::-1],
        "split": ["gallery"] * len(ids),
        "source_id": [f"t{number}" for number in range(len(ids))],
    }
    if size_m is not None:
        columns["size_m"] = np.full(len(ids), size_m)
    queries = pa.table({name: pa.array([], pa.string()) for name in ("uri", "split")})
    for name in ("id", "place_id"):
        queries = queries.append_column(name, pa.array([], pa.int64()))
    return write_dataset(str(target), pa.table(columns), queries, name="region", values=values)


def write_photos(root: Path, points: list[tuple[float, float]], splits: list[str] | None) -> str:
    root.mkdir()
    lines = ["path,lat,lon,set"]
    for number, (lat, lon) in enumerate(points):
        (root / f"{number}.jpg").touch()
        lines.append(f"{number}.jpg,{lat},{lon},{splits[number] if splits else ''}")
    (root / "queries.csv").write_text("\n".join(lines))
    return str(root)


def test_photos_go_to_the_nearest_tile_that_holds_them_and_others_are_semi_positive(
    tmp_path: Path,
) -> None:
    region = write_region(tmp_path / "region")
    rng = np.random.default_rng(3)
    points = [tuple(point) for point in rng.uniform(-0.004, 0.009, (60, 2)).tolist()]
    notes: list[str] = []
    dataset = folder.convert(
        write_photos(tmp_path / "photos", points, None),
        str(tmp_path / "paired"),
        references=region.uri,
        test_fraction=0.34,
        report=notes.append,
    )
    tiles = rows(region, "references", "id", "lat", "lon")
    expected = []
    for number, (lat, lon) in enumerate(points):
        metres = {id_: float(metres_between(lat, lon, y, x)) for id_, y, x in tiles}
        half = 223.0 / 2 / 111_195
        holding = {i for i, y, x in tiles if max(abs(lat - y), abs(lon - x)) <= half}
        if holding:
            place = min(holding, key=metres.__getitem__)
            expected.append((number, place, sorted(holding - {place}) or None))
    found = rows(dataset, "queries", "id", "place_id", "semi_positives")
    assert found == expected
    assert 10 < len(found) < 50
    assert f"queries left out because no tile holds their place: {60 - len(found)}" in notes
    # the easternmost two columns of six are test, tiles without photos too
    split = dict(rows(dataset, "references", "id", "split"))
    assert all((split[i] == "test") == (i % 1000 >= 4) for i in split)
    assert all(one == split[place] for place, one in rows(dataset, "queries", "place_id", "split"))


def test_tiles_keep_ids_sizes_and_byte_ranges_of_the_region(tmp_path: Path) -> None:
    region = write_region(tmp_path / "region")
    source = write_photos(tmp_path / "photos", [(0.0, 0.0), (0.004, 0.004)], None)
    dataset = folder.convert(source, str(tmp_path / "paired"), references=region.uri)
    names = ("id", "place_id", "offset", "length", "lat", "lon", "source_id", "size_m")
    assert rows(dataset, "references", *names) == rows(region, "references", *names)
    assert {uri for (uri,) in rows(dataset, "references", "uri")} == {
        files.join(region.uri, "shards/a.tar")
    }
    assert open_dataset(dataset.uri).fingerprint == dataset.fingerprint


def test_tiles_keep_the_stretch_and_bands_of_the_region(tmp_path: Path) -> None:
    region = write_region(tmp_path / "region", values=ImageValues("0,3000", (4, 3, 2)))
    source = write_photos(tmp_path / "photos", [(0.0, 0.0)], None)
    paired = folder.convert(source, str(tmp_path / "paired"), references=region.uri)
    assert open_dataset(paired.uri).values == paired.values == region.values
    assert paired.values.bands == (4, 3, 2)


def test_a_tile_has_the_split_of_its_photos_held_out_ones_first(tmp_path: Path) -> None:
    region = write_region(tmp_path / "region")
    points = [(0.0, 0.0), (0.0001, 0.0), (0.003, 0.003), (0.005, 0.001)]
    source = write_photos(tmp_path / "photos", points, ["train", "test", "train", "val"])
    notes: list[str] = []
    dataset = folder.convert(
        source,
        str(tmp_path / "paired"),
        references=region.uri,
        split_column="set",
        report=notes.append,
    )
    first = 10**15
    split = dict(rows(dataset, "references", "id", "split"))
    assert [id_ for id_, one in split.items() if one != "gallery"] == [
        *(first, first + 3003, first + 5001)
    ]
    assert [split[first], split[first + 3003], split[first + 5001]] == ["test", "train", "val"]
    assert rows(dataset, "queries", "id", "split") == [(1, "test"), (2, "train"), (3, "val")]
    assert notes == [
        "queries from their tiles: 0 m (median), 95 % within 9 m, the farthest 11 m",
        "train queries left out because their place has no train reference: 1",
    ]


def test_a_distance_or_an_unknown_size_takes_the_nearest_centre(tmp_path: Path) -> None:
    points = [(0.0, -0.0015), (0.0, -0.009)]
    source = write_photos(tmp_path / "photos", points, None)
    region = write_region(tmp_path / "region")
    near = folder.convert(source, str(tmp_path / "near"), references=region.uri, max_distance_m=200)
    assert rows(near, "queries", "id", "place_id") == [(0, 10**15)]
    unknown = write_region(tmp_path / "unknown", size_m=None)
    both = folder.convert(source, str(tmp_path / "both"), references=unknown.uri)
    assert rows(both, "queries", "id", "place_id") == [(0, 10**15), (1, 10**15)]
    assert rows(both, "queries", "id", "semi_positives") == [(0, None), (1, None)]


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    region = write_region(tmp_path / "region")
    source = write_photos(tmp_path / "photos", [(0.0, 0.0)], None)
    with pytest.raises(InputError, match=re.escape("--pair key needs a list of the tiles")):
        folder.convert(source, str(tmp_path / "a"), references=region.uri, pair="key")
    far = write_photos(tmp_path / "far", [(50.0, 0.0)], None)
    with pytest.raises(InputError, match="no queries are left to convert"):
        folder.convert(far, str(tmp_path / "b"), references=region.uri)
    with pytest.raises(InputError, match="is missing"):
        folder.convert(source, str(tmp_path / "c"), references=str(tmp_path / "nothing"))
