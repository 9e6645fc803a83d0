"""Draw an answer: the photo, the tiles of its candidates, and a map of the gallery, as a PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from s4g_ray.data.area import extent_of_squares
from s4g_ray.data.sphere import METRES_A_DEGREE, format_metres, metres_between, wrap_longitudes
from s4g_ray.gallery.answer import Answer, Candidate
from s4g_ray.gallery.gallery import Gallery
from s4g_ray.gallery.search.ground_shapes import circle_geometry, square_geometry
from s4g_ray.gallery.search.map_view import MAX_TILES, MapView

Pixels = NDArray[np.uint8]
Bounds = tuple[float, float, float, float]  # west, south, east, north in degrees

NUM_SHOWN = 4  # candidates
MAP_PIXELS = 1000  # of the longer side of the background
GREEN = "#16a34a"
RED = "#dc2626"
BLUE = "#2563eb"


def draw_answer(
    gallery: Gallery,
    photo: Pixels,
    answer: Answer,
    truth: tuple[float, float],
    *,
    attribution: str = "",
) -> bytes:
    """Draw a located photo beside its candidates, on a map of the gallery's tiles -> PNG.

    photo[H, W, 3]; truth: latitude and longitude. Raises ValueError for a photo without a position.
    """
    if answer.lat is None or answer.lon is None:
        raise ValueError(f"{answer.photo} is not located")
    away_m = float(metres_between(answer.lat, answer.lon, *truth))
    figure = Figure(figsize=(12, 7.5))
    figure.suptitle(_describe(answer, away_m), x=0.02, ha="left", fontsize=14)
    parts = figure.add_gridspec(
        1, 2, width_ratios=[1, 1.35], left=0.02, right=0.98, bottom=0.12, top=0.9, wspace=0.12
    )
    pictures = parts[0].subgridspec(3, 2, height_ratios=[1.5, 1, 1], hspace=0.28, wspace=0.06)
    _show(figure.add_subplot(pictures[0, :]), photo, "photo")
    for rank, candidate in enumerate(answer.candidates[:NUM_SHOWN]):
        axes = figure.add_subplot(pictures[1 + rank // 2, rank % 2])
        _show(axes, gallery.read_tile(candidate.id), _caption(rank, candidate, truth))
    _draw_map(figure.add_subplot(parts[1]), gallery, answer, truth)
    if attribution:
        figure.text(0.99, 0.015, attribution, ha="right", fontsize=8, color="#6b7280")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _describe(answer: Answer, away_m: float) -> str:
    name = answer.photo.rsplit("/", 1)[-1]
    text = f"{name}: {answer.lat:.4f}, {answer.lon:.4f}"
    if answer.radius_90_m is not None:
        text += f", 90 % within {format_metres(answer.radius_90_m)}"
    return f"{text}; the truth is {format_metres(away_m)} away"


def _caption(rank: int, candidate: Candidate, truth: tuple[float, float]) -> str:
    away = format_metres(float(metres_between(candidate.lat, candidate.lon, *truth)))
    if candidate.probability is None:
        return f"{rank + 1}: {away} from the truth"
    return f"{rank + 1}: {candidate.probability:.0%}, {away} from the truth"


def _show(axes: Any, picture: Pixels, title: str) -> None:
    axes.imshow(picture, interpolation="bicubic")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _draw_map(axes: Any, gallery: Gallery, answer: Answer, truth: tuple[float, float]) -> None:
    """Draw the gallery's ground, and where the answer is small on it, a part of it enlarged."""
    bounds = find_bounds(gallery)
    _draw_ground(axes, gallery, answer, truth, bounds)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(useOffset=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=4, frameon=False, fontsize=9)
    near = find_near_bounds(answer, truth, bounds)
    if near is None or near[3] - near[1] > (bounds[3] - bounds[1]) / 4:
        return
    is_west = near[0] + near[2] < bounds[0] + bounds[2]
    is_south = near[1] + near[3] < bounds[1] + bounds[3]
    corner = (0.55 if is_west else 0.03, 0.65 if is_south else 0.03, 0.42, 0.32)
    inset = axes.inset_axes(corner, zorder=6)
    _draw_ground(inset, gallery, answer, truth, near)
    inset.set(xticks=[], yticks=[])
    axes.indicate_inset_zoom(inset, edgecolor="black", alpha=0.8)


def _draw_ground(
    axes: Any, gallery: Gallery, answer: Answer, truth: tuple[float, float], bounds: Bounds
) -> None:
    """Draw the tiles within bounds, the candidates' squares, the circles, the answer, the truth."""
    west, south, east, north = bounds
    background = compose_background(gallery, bounds)
    axes.imshow(background, extent=(west, east, south, north), aspect="auto", alpha=0.85)
    for rank, candidate in reversed(list(enumerate(answer.candidates[:NUM_SHOWN], 1))):
        square = square_geometry(candidate.lat, candidate.lon, candidate.size_m)
        _draw_outline(axes, square, bounds, color="white", linewidth=1.4)
        half = candidate.size_m / 2 / METRES_A_DEGREE
        style = {"fontsize": 9, "color": "black", "ha": "center", "va": "center"}
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "linewidth": 0}
        spot = (turn_into(bounds, candidate.lon), candidate.lat + half)
        axes.text(*spot, str(rank), bbox=box, clip_on=True, **style)
    radii = (("50 %", answer.radius_50_m, "--"), ("90 %", answer.radius_90_m, "-"))
    for name, radius_m, line in radii:
        if radius_m is not None:
            circle = circle_geometry(answer.lat or 0.0, answer.lon or 0.0, radius_m)
            label = f"{name} within {format_metres(radius_m)}"
            look: dict[str, Any] = {"color": BLUE, "linewidth": 2, "linestyle": line}
            _draw_outline(axes, circle, bounds, label=label, **look)
    mark: dict[str, Any] = {"edgecolors": "white", "linewidths": 1.2, "zorder": 5}
    at = turn_into(bounds, answer.lon or 0.0)
    axes.scatter([at], [answer.lat], s=90, color=RED, label="answer", **mark)
    at = turn_into(bounds, truth[1])
    axes.scatter([at], [truth[0]], s=200, color=GREEN, marker="*", label="truth", **mark)
    axes.set(xlim=(west, east), ylim=(south, north))
    axes.set_aspect(1 / np.cos(np.radians((south + north) / 2)))


def _draw_outline(
    axes: Any,
    geometry: dict[str, Any],
    bounds: Bounds,
    *,
    label: str | None = None,
    **style: Any,
) -> None:
    """Draw the rings of a Polygon or MultiPolygon, each in the turn of the bounds."""
    is_single = geometry["type"] == "Polygon"
    for polygon in [geometry["coordinates"]] if is_single else geometry["coordinates"]:
        lon, lat = np.array(polygon[0]).T
        middle = float(lon.min() + lon.max()) / 2
        axes.plot(lon + turn_into(bounds, middle) - middle, lat, label=label, **style)
        label = None


def find_bounds(gallery: Gallery) -> Bounds:
    """Return the degrees around all tiles; east is above 180 across the antimeridian."""
    tiles = gallery.tiles
    return extent_of_squares(tiles.lat, tiles.lon, tiles.size_m)


def turn_into(bounds: Bounds, lon: float) -> float:
    """Return a longitude in the turn of the bounds: the one nearest to their middle."""
    west, _, east, _ = bounds
    middle = (west + east) / 2
    return middle + float(wrap_longitudes(lon - middle))


def find_near_bounds(answer: Answer, truth: tuple[float, float], whole: Bounds) -> Bounds | None:
    """Return the degrees around an answer's circle, the truth and the first candidate's tile.

    They are in the turn of the whole map's. None without a position.
    """
    if answer.lat is None or answer.lon is None:
        return None
    away_m = float(metres_between(answer.lat, answer.lon, *truth))
    tile_m = answer.candidates[0].size_m if answer.candidates else 0.0
    half_m = max(1.6 * (answer.radius_90_m or 0.0), 1.3 * away_m, 0.65 * tile_m)
    half = half_m / METRES_A_DEGREE
    half_lon = half / float(np.cos(np.radians(answer.lat)))
    lon = turn_into(whole, answer.lon)
    return (lon - half_lon, answer.lat - half, lon + half_lon, answer.lat + half)


def compose_background(gallery: Gallery, bounds: Bounds) -> Pixels:
    """Paste tiles that cover the bounds into one picture, grey where none is: [H, W, 3].

    Rows are latitudes, columns longitudes; the longer side of the ground has MAP_PIXELS.
    """
    west, south, east, north = bounds
    shrink = float(np.cos(np.radians((south + north) / 2)))
    scale = MAP_PIXELS / max(north - south, (east - west) * shrink)  # pixels a degree of latitude
    size = (round((east - west) * shrink * scale), round((north - south) * scale))
    canvas = Image.new("RGB", size, (225, 225, 225))
    tiles = gallery.tiles
    for row in MapView(tiles.lat, tiles.lon, tiles.size_m).rows(bounds, MAX_TILES):
        half_lat = float(tiles.size_m[row]) / 2 / METRES_A_DEGREE
        half_lon = half_lat / np.cos(np.radians(float(tiles.lat[row])))
        lon = turn_into(bounds, float(tiles.lon[row]))
        left = round((lon - half_lon - west) * shrink * scale)
        right = round((lon + half_lon - west) * shrink * scale)
        top = round((north - float(tiles.lat[row]) - half_lat) * scale)
        bottom = round((north - float(tiles.lat[row]) + half_lat) * scale)
        tile = Image.fromarray(gallery.read_tile(int(tiles.ids[row])))
        canvas.paste(tile.resize((max(right - left, 1), max(bottom - top, 1))), (left, top))
    return np.asarray(canvas)
