"""Examples of the report: retrievals and mined negatives, with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from s4g_ray.arrays import Floats32, Floats64, Ints
from s4g_ray.config.data_schema import Size
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.images import load_raw, resize
from s4g_ray.data.schema import gallery_splits
from s4g_ray.data.sphere import format_metres, metres_between
from s4g_ray.data.tables.embedding_table import read_embedded_rows, read_embedding_parts
from s4g_ray.data.tables.neighbor_graph import read_graph
from s4g_ray.errors import BadImageError
from s4g_ray.evaluation.top_references import find_top_references
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import latest_version

NUM_EXAMPLES = 8
NUM_TOP = 5
THUMBNAIL = (96, 96)
WIDEST = 168  # pixels, of a panorama's thumbnail


@dataclass(frozen=True)
class Tile:
    """A picture with its caption: kind is query, right, wrong or negative."""

    image: str
    caption: str
    kind: str


@dataclass(frozen=True)
class Example:
    """A row of pictures: a query, its own reference (if shown apart), those found for it."""

    title: str
    tiles: list[Tile] = field(default_factory=list)


@dataclass(frozen=True)
class RankedQueries:
    """The last evaluation's rankings: top[Q, NUM_TOP] rows of the gallery, best first."""

    queries: ImageTable
    gallery: ImageTable
    top: Ints

    @classmethod
    def read(cls, uri: str, config: RunConfig, dataset: GeoDataset, epoch: int) -> RankedQueries:
        """Read the rankings of an epoch's evaluation from its embedding tables, part by part."""
        split = config.data.test_split
        folder = files.join(uri, f"embeddings/v={epoch:04d}")
        embedded, queries = read_embedded_rows(folder, "queries", dataset.table("queries", [split]))
        table = dataset.table("references", gallery_splits(split))
        rows: list[Ints] = [np.zeros(0, np.int64)]  # of the table, in the order of the parts

        def read_vectors() -> Iterator[Floats32]:
            for part in read_embedding_parts(folder, "references"):
                found = rows_of(table.ids, part.ids)
                rows.append(found[found >= 0])
                yield part.vectors[found >= 0]

        top = find_top_references(embedded.vectors, read_vectors(), NUM_TOP)
        return cls(queries, table.take(np.concatenate(rows)), top)

    def errors_m(self, rank: int = 0) -> Floats64:
        """Return the metres from each query to the reference at a rank."""
        found = self.top[:, rank]
        return metres_between(
            self.queries.lat, self.queries.lon, self.gallery.lat[found], self.gallery.lon[found]
        )

    def examples(self, config: RunConfig) -> Iterator[Example]:
        """Yield queries with their best references: half with the right place among them."""
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
