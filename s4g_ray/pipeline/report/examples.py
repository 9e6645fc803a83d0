"""Examples of the report: retrievals and mined negatives, with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from s4g_ray.arrays import Ints
from s4g_ray.config.data_schema import Size
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import load_raw, resize
from s4g_ray.data.sphere import format_metres, metres_between
from s4g_ray.data.tables.neighbor_graph import read_graph
from s4g_ray.errors import BadImageError
from s4g_ray.evaluation.query_results import QueryResults, read_source_ids
from s4g_ray.storage import files
from s4g_ray.storage.manifest import latest_version

NUM_EXAMPLES = 8
NUM_TOP = 5
NUM_WRONG = 3  # references beside a mistake
LONGEST_NAME = 30  # characters of a file's name
THUMBNAIL = (96, 96)
WIDEST = 168  # pixels, of a panorama's thumbnail


@dataclass(frozen=True)
class Tile:
    """A picture with its caption: kind is query, right, semi-positive, wrong or negative.

    details: lines below the caption. source: the whole path of the picture's file.
    """

    image: str
    caption: str
    kind: str
    details: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Example:
    """A row of pictures: a query, its own reference (if shown apart), those found for it."""

    title: str
    tiles: list[Tile] = field(default_factory=list)


def find_retrievals(results: QueryResults, config: RunConfig) -> Iterator[Example]:
    """Yield queries with their best references: half with the right place among them."""
    rng = np.random.default_rng((config.seed, 1))
    right = results.is_right()
    kinds = _kinds_of(results)
    found = rng.permutation(np.flatnonzero(right.any(axis=1)))[: NUM_EXAMPLES // 2]
    missed = rng.permutation(np.flatnonzero(~right.any(axis=1)))[: NUM_EXAMPLES - len(found)]
    queries = results.queries
    for row in [*sorted(found), *sorted(missed)]:
        tiles = [Tile(_thumbnail(queries, row, config.data.query_size), "query", "query")]
        for rank, reference in enumerate(results.top[row]):
            if reference < 0:
                break
            caption = f"{rank + 1}. {format_metres(results.errors_m(rank)[row])}"
            picture = _thumbnail(results.gallery, reference)
            tiles.append(Tile(picture, caption, str(kinds[row, rank])))
        if results.own[row] >= 0 and not right[row].any():
            own = _thumbnail(results.gallery, results.own[row])
            tiles.append(Tile(own, "its own, missed", "right"))
        yield Example(_position(queries, row), tiles)


def find_hardest(results: QueryResults, config: RunConfig) -> Iterator[Example]:
    """Yield the queries that a wrong reference outscores their own one by most, largest first.

    One query of a place: others of it tend to be mistaken alike. Queries whose first reference is
    semi-positive are left out: it shows their ground.
    """
    kinds = _kinds_of(results)
    is_wrong = (kinds[:, 0] == "wrong") & (results.own >= 0)
    rows = np.flatnonzero(is_wrong)
    margins = results.scores[rows, 0] - results.own_scores[rows]
    rows = rows[np.argsort(-margins, kind="stable")]
    _, first = np.unique(results.queries.place_ids[rows], return_index=True)
    rows = rows[np.sort(first)[:NUM_EXAMPLES]]
    namer = ImageNamer(results.dataset)
    gallery = results.gallery
    wrong = [row[row >= 0][:NUM_WRONG] for row in results.top[rows]]
    namer.read("queries", results.queries.ids[rows])
    namer.read("references", gallery.ids[np.concatenate([results.own[rows], *wrong])])
    for row, references in zip(rows.tolist(), wrong, strict=True):
        picture = _thumbnail(results.queries, row, config.data.query_size)
        details, source = namer.describe("queries", results.queries, row)
        tiles = [Tile(picture, "query", "query", details, source)]
        own = results.own[row]
        details, source = namer.describe("references", gallery, own)
        caption = f"its own: rank {results.ranks[0, row]:,}, {results.own_scores[row]:.2f}"
        tiles.append(Tile(_thumbnail(gallery, own), caption, "right", details, source))
        for rank, reference in enumerate(references):
            if kinds[row, rank] == "right":
                continue  # stands before them
            metres = format_metres(results.errors_m(rank)[row])
            caption = f"{rank + 1}. {results.scores[row, rank]:.2f}, {metres}"
            details, source = namer.describe("references", gallery, reference)
            picture = _thumbnail(gallery, reference)
            tiles.append(Tile(picture, caption, str(kinds[row, rank]), details, source))
        yield Example(_position(results.queries, row), tiles)


def _kinds_of(results: QueryResults) -> NDArray[np.str_]:
    """Return what each of top[Q, k] is: right, semi-positive or wrong."""
    others = np.where(results.is_semi_positive(), "semi-positive", "wrong")
    return np.where(results.is_right(), "right", others)


class ImageNamer:
    """Names images for people: by id and file, or by source_id where a file holds many images."""

    def __init__(self, dataset: GeoDataset) -> None:
        self._dataset = dataset
        self._source_ids: dict[tuple[View, int], str | None] = {}

    def read(self, view: View, ids: Ints) -> None:
        """Read what `describe` needs of some rows."""
        chosen = np.unique(ids)
        names = read_source_ids(self._dataset, view, chosen)
        for one, name in zip(chosen.tolist(), names, strict=True):
            self._source_ids[view, one] = name

    def describe(self, view: View, table: ImageTable, row: int) -> tuple[tuple[str, ...], str]:
        """Return the lines that name an image of a table, and the whole path of its file."""
        uri = table.uris[int(row)]
        name = uri.rsplit("/", 1)[-1]
        source_id = self._source_ids[view, int(table.ids[row])]
        if table.lengths[row] >= 0:
            uri = f"{uri}, byte {table.offsets[row]}"
            name = source_id or f"{name} @ {table.offsets[row]}"
        return (f"id {table.ids[row]}", shorten_middle(name, LONGEST_NAME)), uri


def shorten_middle(text: str, length: int) -> str:
    """Return a text of at most `length` characters: its start and its end around three dots."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def find_mined_examples(uri: str, config: RunConfig, dataset: GeoDataset) -> Iterator[Example]:
    """Yield train places with the neighbors that the last mining round found for them."""
    version = latest_version(files.join(uri, "neighbors"), "v")
    if not version:
        return
    # the first part: examples need a few places alone
    graph = next(read_graph(files.join(uri, f"neighbors/v={version:04d}")))
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
            lat = references.lat
            lon = references.lon
            metres = metres_between(lat[own], lon[own], lat[other], lon[other])
            caption = format_metres(float(metres))
            if graph.scores is not None:
                caption += f", score {graph.scores[row, rank]:.2f}"
            tiles.append(Tile(_thumbnail(references, other), caption, "negative"))
        yield Example(_position(queries, query), tiles)


def _thumbnail(table: ImageTable, row: int, shape: Size = THUMBNAIL) -> str:
    """Return an image of a table as a data URI, in the proportions of `shape` (height, width)."""
    scale = min(THUMBNAIL[0] / shape[0], WIDEST / shape[1])
    size = (max(1, round(scale * shape[0])), max(1, round(scale * shape[1])))
    try:
        image = to_pil_image(resize(load_raw(table, int(row)), size))
    except BadImageError:  # listed in bad_images.jsonl
        image = Image.new("RGB", size[::-1], "#d1d5db")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return encode_data_uri(buffer.getvalue())


def encode_data_uri(jpeg: bytes) -> str:
    """Encode an image as the data URI of a JPEG."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _position(table: ImageTable, row: int) -> str:
    lat = table.lat[row]
    lon = table.lon[row]
    if not np.isfinite(lat):
        return f"place {table.place_ids[row]}"
    north = "N" if lat >= 0 else "S"
    east = "E" if lon >= 0 else "W"
    return f"{abs(lat):.4f}° {north}, {abs(lon):.4f}° {east}"
