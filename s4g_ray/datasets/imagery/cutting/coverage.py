"""Describe the ground that tiles cover: the union of their squares, as km2, GeoJSON and a map.

A tile's square is taken as a rectangle of longitudes and latitudes: as wide as the tile along the
parallel of its centre, as high as the tile along its meridian.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Floats64
from s4g_ray.datasets.imagery.world_grid import FLATTENING, SEMI_MAJOR_M

ECCENTRICITY_2 = FLATTENING * (2 - FLATTENING)
TOUCH = 1e-6  # share of a tile's width: neighbors nearer than this touch
TURN = np.array([360.0, 0.0])  # degrees of longitude, latitude
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


@dataclass(frozen=True)
class Squares:
    """The squares of some cells: centres lat[N], lon[N] in degrees, sides of size_m metres."""

    lat: Floats64
    lon: Floats64
    size_m: float


def half_sides(lat: Floats64, size_m: float) -> tuple[Floats64, Floats64]:
    """Return half the side of squares at lat[N] in degrees of latitude and of longitude."""
    sine = np.sin(np.radians(lat))
    root = np.sqrt(1 - ECCENTRICITY_2 * sine**2)
    meridian = SEMI_MAJOR_M * (1 - ECCENTRICITY_2) / root**3
    parallel = SEMI_MAJOR_M / root * np.cos(np.radians(lat))
    half_lat = np.degrees(size_m / 2 / meridian)
    half_lon = np.degrees(size_m / 2 / np.maximum(parallel, 1e-9))
    return half_lat, np.minimum(half_lon, 180.0)


def union_squares(squares: Squares) -> Any:
    """Return the union as a shapely geometry in lon, lat; cut at the antimeridian.

    Neighbors of a row are joined to one rectangle first: 10^6 tiles are a few thousand rectangles.
    """
    if not len(squares.lat):
        return shapely.MultiPolygon()
    order = np.lexsort((squares.lon, squares.lat))
    lat = squares.lat[order]
    lon = squares.lon[order]
    half_lat, half_lon = half_sides(lat, squares.size_m)
    starts = np.ones(len(lat), bool)
    starts[1:] = (np.diff(lat) != 0) | (np.diff(lon) > 2 * half_lon[1:] * (1 + TOUCH))
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(lat)) - 1
    west = lon[first] - half_lon[first]
    east = lon[last] + half_lon[first]
    south = np.maximum(lat[first] - half_lat[first], -90)
    north = np.minimum(lat[first] + half_lat[first], 90)
    whole = east - west >= 360
    west[whole] = -180
    east[whole] = 180
    boxes = [shapely.box(np.maximum(west, -180), south, np.minimum(east, 180), north)]
    for over, shift in ((west < -180, 360), (east > 180, -360)):
        low = np.maximum(west[over] + shift, -180)
        high = np.minimum(east[over] + shift, 180)
        boxes.append(shapely.box(low, south[over], high, north[over]))
    return shapely.union_all(np.concatenate(boxes))


def measure_km2(geometry: Any) -> float:
    """Return the area on the WGS 84 ellipsoid of rectangles of longitudes and latitudes.

    Exact where every edge runs along a parallel or a meridian: by the cylindrical equal-area
    projection.
    """
    eccentricity = ECCENTRICITY_2**0.5

    def project(points: NDArray[np.float64]) -> NDArray[np.float64]:
        sine = np.sin(np.radians(points[:, 1]))
        scaled = eccentricity * sine
        log = np.log((1 - scaled) / (1 + scaled)) / (2 * eccentricity)
        authalic = (1 - ECCENTRICITY_2) * (sine / (1 - scaled**2) - log)
        x = np.radians(points[:, 0]) * SEMI_MAJOR_M
        return np.stack([x, authalic * SEMI_MAJOR_M / 2], axis=1)

    return float(shapely.area(shapely.transform(geometry, project))) / 1e6


def to_geojson(kept: Mapping[float, Any], counts: Mapping[float, int]) -> dict[str, Any]:
    """Return a FeatureCollection: for each size, the union of its tiles and their number."""
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(geometry)),
            "properties": {
                "size_m": size_m,
                "tiles": counts[size_m],
                "ground_km2": round(measure_km2(geometry), 6),
            },
        }
        for size_m, geometry in kept.items()
    ]
    return {"type": "FeatureCollection", "features": features}


def draw_map(
    kept: Mapping[float, Any], dropped: Any, footprint: Any, counts: Mapping[float, int], name: str
) -> bytes:
    """Draw the tiles of each size, dropped cells and the outline of the imagery -> a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    geometries = _beside_each_other([*kept.values(), dropped, footprint])
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, geometries[-2], facecolor="0.8", edgecolor="none", label="dropped")
    for number, (size_m, geometry) in enumerate(zip(kept, geometries, strict=False)):
        color = COLORS[number % len(COLORS)]
        label = f"{count_noun(counts[size_m], 'tile')} of {size_m:g} m"
        _draw(axes, geometry, facecolor=color, edgecolor=color, alpha=0.5, label=label)
    _draw(axes, geometries[-1], facecolor="none", edgecolor="black", lw=0.8, label="imagery")
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_aspect(1 / max(0.05, float(np.cos(np.radians((low + high) / 2)))))
    axes.ticklabel_format(useOffset=False)
    axes.tick_params(axis="x", rotation=30)
    axes.set_xlabel("longitude, degrees")
    axes.set_ylabel("latitude, degrees")
    axes.set_title(name, parse_math=False)
    figure.legend(loc="outside lower center", ncols=3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _beside_each_other(geometries: Sequence[Any]) -> list[Any]:
    """Shift western longitudes by 360 degrees where that brings everything nearer together."""
    west, _, east, _ = shapely.total_bounds(geometries)
    shifted = [_shift_west(geometry) for geometry in geometries]
    new_west, _, new_east, _ = shapely.total_bounds(shifted)
    return shifted if new_east - new_west < east - west - 1e-9 else list(geometries)


def _shift_west(geometry: Any) -> Any:
    parts = shapely.get_parts(geometry)
    moved = [
        shapely.transform(part, lambda points: points + TURN)
        if shapely.bounds(part)[2] <= 0
        else part
        for part in parts
    ]
    return shapely.GeometryCollection(moved)


def _draw(axes: Any, geometry: Any, **style: Any) -> None:
    """Add the polygons of a geometry as one patch with holes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    rings = [
        np.asarray(ring.coords)[:, :2]
        for polygon in shapely.get_parts(geometry)
        if polygon.geom_type == "Polygon"
        for ring in (polygon.exterior, *polygon.interiors)
    ]
    if rings:
        path = Path.make_compound_path(*(Path(ring, closed=True) for ring in rings))
        axes.add_patch(PathPatch(path, **style))
