"""Distances of pairs are reported; pairs that no list can mean are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from s4g_ray.arrays import Floats64
from s4g_ray.data.sphere import metres_between, unit_sphere
from s4g_ray.datasets import folder
from s4g_ray.datasets.lists.pair_distances import find_limit
from s4g_ray.errors import InputError
from tests.support.source_trees import rows

# tiles 100 m apart in the west and south, and photos among them
TILE_LAT, TILE_LON = (grid.ravel() for grid in np.mgrid[-41.5:-41.495:6j, -112.0:-111.994:6j])
RNG = np.random.default_rng(3)
LAT = RNG.uniform(-41.5, -41.495, 40)
LON = RNG.uniform(-112.0, -111.994, 40)


def make(root: Path, lat: Floats64, lon: Floats64, columns: str = "lat,lon", key: str = "") -> str:
    """Write the tiles, and photos at lat, lon."""
    root.mkdir()
    for view, where in (("references", (TILE_LAT, TILE_LON)), ("queries", (lat, lon))):
        names = "lat,lon" if view == "references" else columns
        lines = [f"path,{names},key"]
        for number, (one, other) in enumerate(np.transpose(where).tolist()):
            (root / f"{view}-{number}.jpg").touch()
            lines.append(f"{view}-{number}.jpg,{one!r},{other!r},{key or number}")
        (root / f"{view}.csv").write_text("\n".join(lines))
    return str(root)


def test_distances_are_reported_as_a_plain_loop_measures_them(tmp_path: Path) -> None:
    notes: list[str] = []
    source = make(tmp_path / "s", LAT, LON)
    folder.convert(source, str(tmp_path / "d"), report=notes.append)
    metres = [metres_between(a, b, TILE_LAT, TILE_LON).min() for a, b in zip(LAT, LON, strict=True)]
    assert notes == [
        f"queries from their tiles: {np.median(metres):.0f} m (median), 95 % within"
        f" {np.percentile(metres, 95):.0f} m, the farthest {max(metres):.0f} m"
    ]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda lat, lon: (lat, -lon), "longitudes have the wrong sign"),
        (lambda lat, lon: (-lat, lon), "latitudes have the wrong sign"),
        (lambda lat, lon: (lat + 3, lon), "correct their positions, or the tiles'"),
    ],
)
def test_a_list_with_a_fault_is_refused_with_the_fault(
    tmp_path: Path, fault: Callable[..., tuple[Floats64, Floats64]], message: str
) -> None:
    lat, lon = fault(LAT, LON)
    metres = np.array(
        [metres_between(a, b, TILE_LAT, TILE_LON).min() for a, b in zip(lat, lon, strict=True)]
    )
    farthest = int(metres.argmax())
    source = make(tmp_path / "s", lat, lon)
    place = (
        rf"queries\.csv, line {farthest + 2}: 'queries-{farthest}\.jpg' is"
        rf" {metres[farthest] / 1000:,.0f} km from its tile"
    )
    with pytest.raises(InputError, match=place) as refused:
        folder.convert(source, str(tmp_path / "d"))
    assert "Of 40 queries, 40 are farther than 1,0" in str(refused.value)
    assert message in str(refused.value)
    assert "--max-distance-m" in str(refused.value)
    kept = folder.convert(source, str(tmp_path / "d"), max_distance_m=float("inf"))
    assert len(rows(kept, "queries", "id")) == 40


@pytest.mark.parametrize("list_of", ["queries", "references"])
def test_swapped_coordinates_of_either_list_are_recognized(tmp_path: Path, list_of: str) -> None:
    root = tmp_path / "s"
    root.mkdir()
    for view in ("references", "queries"):
        names = "lon,lat" if view == list_of else "lat,lon"
        (root / f"{view}.csv").write_text(f"path,{names}\na.jpg,12.5,41.25\nb.jpg,12.501,41.25\n")
    (root / "a.jpg").touch()
    (root / "b.jpg").touch()
    with pytest.raises(
        InputError,
        match=r"\nread the other way, 2 of 2 .*: in one .* latitude and longitude are swapped$",
    ):
        folder.convert(str(root), str(tmp_path / "d"))


def test_far_pairs_are_left_out_by_a_limit(tmp_path: Path) -> None:
    lat = LAT.copy()
    lat[7] += 1
    source = make(tmp_path / "s", lat, LON)
    with pytest.raises(InputError, match="Of 40 queries, 1 is farther"):
        folder.convert(source, str(tmp_path / "d"))
    notes: list[str] = []
    dataset = folder.convert(source, str(tmp_path / "d"), max_distance_m=500, report=notes.append)
    assert [id_ for (id_,) in rows(dataset, "queries", "id")] == [n for n in range(40) if n != 7]
    assert notes[0] == "queries left out because no tile is within 500 m: 1"


def test_pairs_of_equal_keys_are_measured_to_the_nearest_tile_of_the_place(tmp_path: Path) -> None:
    notes: list[str] = []
    source = make(tmp_path / "s", LAT, LON, key="one")
    folder.convert(source, str(tmp_path / "d"), pair="key", report=notes.append)
    nearest: list[str] = []
    source = make(tmp_path / "n", LAT, LON)
    folder.convert(source, str(tmp_path / "e"), report=nearest.append)
    assert notes[0] == nearest[0]
    lat = LAT.copy()
    lat[3] -= 1
    source = make(tmp_path / "f", lat, LON, key="one")
    with pytest.raises(InputError, match=r"queries\.csv, line 5: 'queries-3\.jpg' is 111 km from"):
        folder.convert(source, str(tmp_path / "g"), pair="key")


@pytest.mark.parametrize(
    ("lat", "lon", "limit"),
    [
        ([0.0], [0.0], 1000.0),  # one tile has no neighbor
        ([0.0, 0.0], [5.0, 5.0], 1000.0),  # of two years: no spacing
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], 10 * 111_195.0),
        ([0.0, 0.0, 0.0], [179.5, -179.5, -178.5], 10 * 111_195.0),
        ([0.0, 0.0, 0.0], [0.0, 1e-5, 2e-5], 1000.0),
    ],
)
def test_the_limit_follows_the_tiles_spacing(
    lat: list[float], lon: list[float], limit: float
) -> None:
    assert find_limit(cKDTree(unit_sphere(lat, lon))) == pytest.approx(limit, rel=1e-5)
