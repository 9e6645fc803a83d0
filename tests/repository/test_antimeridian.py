"""All that sorts, cuts, averages or draws longitudes knows the circle.

Each function gives for data turned about the Earth's axis, over the antimeridian, what it gives for
the same data at longitude 10, turned by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from s4g_ray.arrays import Floats64
from s4g_ray.cli.galleries import locate_picture
from s4g_ray.data.area import Area, extent_of_squares, join_extents
from s4g_ray.data.batches.common_ground import share_common_ground
from s4g_ray.data.sphere import span_longitudes, unroll_longitudes, wrap_longitudes
from s4g_ray.datasets.imagery.cutting.coverage import Squares, measure_km2, union_squares
from s4g_ray.datasets.inspection.inventory import compute_extent
from s4g_ray.datasets.landsat import split_places
from s4g_ray.datasets.landsat_pictures import LandsatOptions
from s4g_ray.datasets.lists.pairing import choose_eastern_strip
from s4g_ray.gallery.ground_mass import GroundMass
from s4g_ray.gallery.search.candidates import Found, best_positions, group_cells
from s4g_ray.gallery.search.ground_shapes import circle_geometry, square_geometry
from s4g_ray.gallery.search.map_view import MapView
from s4g_ray.gallery.store.tiles import Tiles
from s4g_ray.pipeline.report.map_frame import MapFrame, split_areas
from s4g_ray.pipeline.report.region_map import great_circle
from s4g_ray.sampling.geographic_neighbors import geographic_neighbors
from s4g_ray.serving.locator import find_bounds

Turn = Callable[[Any], Any]
NUM_POINTS = 120
SIZE_M = 3000.0


def draw_points() -> tuple[Floats64, Floats64]:
    """Draw points about longitude 10, in steps that whole degrees leave exact; some are alike."""
    rng = np.random.default_rng(7)
    lat = np.round(rng.uniform(-19, -16, NUM_POINTS) * 1024) / 1024
    lon = np.round((10 + rng.uniform(-1.5, 1.5, NUM_POINTS)) * 64) / 64
    return lat, lon


class Turned:
    """The points turned by whole degrees. Longitudes of results are turned back by `back`."""

    def __init__(self, degrees: int) -> None:
        self.degrees = degrees
        self.lat, at_10 = draw_points()
        self.lon = self.to(at_10)
        self.size_m = np.full(NUM_POINTS, SIZE_M)

    def to(self, lon: Any) -> Any:
        """Return longitudes about 10 where the points are."""
        return wrap_longitudes(np.asarray(lon) + self.degrees)

    def back(self, lon: Any) -> Any:
        """Return longitudes about the points as if they lay about 10."""
        return wrap_longitudes(np.asarray(lon) - self.degrees)

    def tiles(self) -> Tiles:
        return Tiles(np.arange(NUM_POINTS), self.lat, self.lon, self.size_m)

    def found(self) -> tuple[Found, Floats64, Floats64, Floats64]:
        """Return the points as candidates of photos, ten each."""
        ids = np.arange(NUM_POINTS).reshape(-1, 10)
        scores = np.linspace(1, 0.5, NUM_POINTS, dtype=np.float32).reshape(-1, 10)
        shape = (-1, 10)
        found = Found(ids, scores, np.zeros_like(ids))
        sizes = np.full(ids.shape, 60_000.0)  # so that near ones are joined
        return found, self.lat.reshape(shape), self.lon.reshape(shape), sizes


def judge_extent(world: Turned, extent: Any) -> list[float]:
    west, south, east, north = extent
    return [world.back(west), south, (east - west) % 360, north]


def judge_box(world: Turned, box: Mapping[str, float]) -> dict[str, float]:
    edges = {name: float(world.back(box[name])) for name in ("west", "east")}
    return {**box, **edges}


def judge_best(world: Turned) -> list[Any]:
    found, lat, lon, sizes = world.found()
    group = group_cells(found, lat, lon, sizes, 5)
    best_lat, best_lon = best_positions(found, lat, lon, group)
    return [group, best_lat, world.back(best_lon)]


def judge_frame(world: Turned) -> list[Any]:
    frame = MapFrame.around(world.lat, world.lon)
    plane = frame.to_plane(world.lat, world.lon)
    boxes = frame.boxes(world.lat, world.lon, world.size_m)
    inside = frame.contains(world.lat, world.to(np.linspace(0, 20, NUM_POINTS)))
    sides = [frame.half_width_m, frame.half_height_m]
    return [frame.lat, world.back(frame.lon), sides, *plane, boxes, inside]


def judge_mass(world: Turned) -> list[Any]:
    mass = GroundMass.spread(
        np.full(10, 0.1),
        0.0,
        world.lat[:10],
        world.lon[:10],
        world.size_m[:10],
        np.array([0.1, 0.2]),
        np.empty((0, 2)),
    )
    assert mass is not None
    return [mass.lat, world.back(mass.lon), mass.radius(0.5), mass.radius(0.9)]


def judge_shapes(world: Turned) -> list[float]:
    """Return the sum of the areas of a geometry's rings, which lie on one side of 180 each."""
    areas = []
    for lon in world.to([9.99, 10.0, 10.01]):
        for geometry in (square_geometry(-17, lon, 9000), circle_geometry(-17, lon, 9000)):
            is_single = geometry["type"] == "Polygon"
            total = 0.0
            for (ring,) in [geometry["coordinates"]] if is_single else geometry["coordinates"]:
                x, y = np.array(ring).T
                assert (np.abs(x) <= 180).all()
                assert np.ptp(x) < 1
                total += 0.5 * float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))
            areas.append(round(total, 6))  # corners are rounded to 1e-7 degrees
    return areas


def judge_ground(world: Turned) -> Any:
    squares = torch.tensor(np.stack([world.lat, world.lon, world.size_m * 10], axis=1))
    return share_common_ground(squares[:, None], squares[None]).numpy()


def judge_path(world: Turned) -> list[Any]:
    start, end = (-17.0, float(world.to(9.5))), (-17.5, float(world.to(10.5)))
    lat, lon = great_circle(start, end, float(world.to(10.0)))
    # drawn by its distance from the middle of the map, without a jump
    return [lat, wrap_longitudes(lon - world.to(10.0))]


def judge_picture(world: Turned) -> list[Any]:
    gallery: Any = SimpleNamespace(tiles=world.tiles())
    bounds = locate_picture.find_bounds(gallery)
    drawn = [locate_picture.turn_into(bounds, lon) - bounds[0] for lon in world.lon]
    assert min(drawn) > 0
    assert max(drawn) < bounds[2] - bounds[0]
    return [*judge_extent(world, bounds), drawn]


def judge_area(world: Turned) -> list[Any]:
    def ring(*corners: tuple[float, float]) -> list[list[float]]:
        return [[float(world.to(lon)), lat] for lon, lat in corners]

    border = ring((9.25, -18.5), (10.75, -18.0), (10.5, -16.25), (9.5, -16.5))
    hole = ring((9.9, -17.5), (10.1, -17.5), (10.0, -17.0))
    geojson = {"type": "Polygon", "coordinates": [border, hole]}
    areas = [
        Area.circle(-17.3, float(world.to(10.1)), 60_000),
        Area.bounds(float(world.to(9.3)), -18, float(world.to(10.4)), -16.5),
        Area.polygon([border]),
        Area.from_geojson(geojson),
    ]
    inside = [area.contains(world.lat, world.lon) for area in areas]
    assert all(0 < part.sum() < NUM_POINTS for part in inside)
    return [*inside, *(judge_extent(world, area.extent) for area in areas)]


def judge_view(world: Turned) -> list[Any]:
    view = MapView(world.lat, world.lon, np.full(NUM_POINTS, 40_000.0))
    west, east = (float(world.to(lon)) for lon in (9.5, 10.5))
    return [view.rows((west, -18.0, east, -17.0), 500)]


CASES: dict[str, Callable[[Turned], Any]] = {
    "unroll_longitudes": lambda w: w.back(unroll_longitudes(w.lon)),
    "order of unroll_longitudes": lambda w: np.argsort(unroll_longitudes(w.lon), kind="stable"),
    "mean of unroll_longitudes": lambda w: w.back(unroll_longitudes(w.lon).mean()),
    "span_longitudes": lambda w: w.back(span_longitudes(w.lon)),
    "held-out strip": lambda w: choose_eastern_strip(w.lon, 0.2),
    "landsat's held-out part": lambda w: split_places(LandsatOptions(), w.lat, w.lon) == "test",
    "landsat's train part": lambda w: split_places(LandsatOptions(), w.lat, w.lon) == "train",
    "extent of check": lambda w: list(judge_box(w, compute_extent(w.lat, w.lon)).values()),
    "extent_of_squares": lambda w: judge_extent(w, extent_of_squares(w.lat, w.lon, w.size_m)),
    "join_extents": lambda w: judge_extent(
        w, join_extents([(lon, -1.0, lon + 0.5, 1.0) for lon in w.lon])
    ),
    "areas": judge_area,
    "frame of the report's map": judge_frame,
    "lines of the report's map": judge_path,
    "areas of the report's map": lambda w: split_areas(w.lat, w.lon),
    "bounds of a gallery": lambda w: judge_extent(w, w.tiles().bounds()),
    "bounds of the service": lambda w: judge_extent(w, find_bounds(w.lat, w.lon, w.size_m)),
    "tiles of a map view": judge_view,
    "picture of an answer": judge_picture,
    "GeoJSON of an answer": judge_shapes,
    "candidates and their mean": judge_best,
    "ground of probabilities": judge_mass,
    "common ground of tiles": judge_ground,
    "ground of tiles in km2": lambda w: measure_km2(union_squares(Squares(w.lat, w.lon, SIZE_M))),
    "nearest places": lambda w: geographic_neighbors(w.lat, w.lon, 3)[1],
}


def flatten(result: Any) -> list[Any]:
    """Return the arrays of a result in one list."""
    if isinstance(result, list | tuple):
        return [array for part in result for array in flatten(part)]
    return [np.asarray(result)]


@pytest.mark.parametrize("degrees", [170, -191])
@pytest.mark.parametrize("name", CASES)
def test_data_turned_over_the_antimeridian_gives_the_turned_result(name: str, degrees: int) -> None:
    world = Turned(degrees)
    assert (world.lon.min(), world.lon.max()) == pytest.approx((-180, 180), abs=0.2)
    wanted = flatten(CASES[name](Turned(0)))
    found = flatten(CASES[name](world))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-6)
        else:
            np.testing.assert_array_equal(one, other)
