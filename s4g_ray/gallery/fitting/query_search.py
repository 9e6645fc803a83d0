"""Read the queries of a data set, and search a gallery for them as `s4g locate` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import KDTree

from s4g_ray.arrays import Floats32, Floats64, Ints
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.images import Pixels, list_image_files
from s4g_ray.data.sphere import EARTH_RADIUS_M, unit_sphere
from s4g_ray.errors import BadImageError, InputError, StoreError
from s4g_ray.gallery.fitting.held_out import HeldOut, concatenate
from s4g_ray.gallery.locate import needed_size, read_model_data
from s4g_ray.gallery.photos.photo import decode_photo
from s4g_ray.gallery.photos.turned_views import find_view_kind, list_turns, turn_photo
from s4g_ray.gallery.search.candidates import find_cells, join_turns
from s4g_ray.storage.byte_ranges import read_ranges

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Gallery

BATCH = 64  # views that are encoded at once
REGION_SAMPLE = 400  # tiles that stand for the gallery on the ground
FIRST_TILES = 20_000  # by which the spacing of tiles is measured


@dataclass(frozen=True)
class QuerySearch:
    """Searches a gallery for queries of a data set, num_found candidates each."""

    gallery: Gallery
    num_found: int
    turns: int

    @cached_property
    def default_size_m(self) -> float:
        """Return the side in metres that stands for tiles of unknown size."""
        return measure_spacing(self.gallery)

    def search(
        self,
        dataset: GeoDataset,
        queries: ImageTable,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        by_place: bool = True,
    ) -> tuple[HeldOut, int]:
        """Search for queries; returns them with their candidates, and how many are unreadable.

        by_place: the ids of the data set's references are those of the gallery's tiles. Raises
        InputError when none can be read.
        """
        true_ids = find_true_ids(self.gallery, dataset if by_place else None, queries)
        parts: list[HeldOut] = []
        num_bad = 0
        step = max(1, BATCH // self.turns)
        for start in range(0, len(queries), step):
            rows = np.arange(start, min(start + step, len(queries)))
            images = read_queries(queries, rows, needed_size(self.gallery))
            good = np.array([image is not None for image in images])
            num_bad += int((~good).sum())
            if good.any():
                pictures = [image for image in images if image is not None]
                parts.append(
                    self._search_batch(pictures, queries, rows[good], true_ids[rows[good]])
                )
            if on_progress is not None:
                on_progress(int(rows[-1]) + 1, len(queries))
        if not parts:
            raise InputError(f"{dataset.uri}: none of its {len(queries)} queries can be read")
        return concatenate(parts), num_bad

    def _search_batch(
        self, pictures: Sequence[Pixels], queries: ImageTable, rows: Ints, true_ids: Ints
    ) -> HeldOut:
        kind = find_view_kind(read_model_data(self.gallery))
        turns = list_turns(self.turns)
        views = [turn_photo(picture, turn, kind) for picture in pictures for turn in turns]
        embeddings: Floats32 = self.gallery.encode(views, view="queries")
        ids, scores = self.gallery.search(embeddings, self.num_found)
        shape = (len(pictures), len(turns), -1)
        found = join_turns(ids.reshape(shape), scores.reshape(shape), self.num_found)
        lat, lon, size_m = find_cells(found, self.gallery.tiles)
        size_m = np.where((found.ids >= 0) & np.isnan(size_m), self.default_size_m, size_m)
        by_turn = embeddings.reshape(*shape[:2], -1)
        return HeldOut(
            ids=found.ids,
            scores=found.scores,
            lat=lat,
            lon=lon,
            size_m=size_m,
            queries=by_turn[np.arange(len(pictures)), found.turns[:, 0]],
            true_lat=np.asarray(queries.lat[rows], np.float64),
            true_lon=np.asarray(queries.lon[rows], np.float64),
            true_ids=true_ids,
            places=np.asarray(queries.place_ids[rows], np.int64),
            rows=rows,
        )


def read_queries(
    queries: ImageTable, rows: Ints, least: tuple[int, int] | None
) -> list[Pixels | None]:
    """Read images of rows as pixels [H, W, 3]; None for one that cannot be read.

    Raises StoreError when the object store fails.
    """
    image_files = list_image_files(queries, rows.tolist())
    found: list[Pixels | None] = []
    for data in read_ranges([(file.uri, file.offset, file.length) for file in image_files]):
        if isinstance(data, StoreError):
            raise data
        if not isinstance(data, bytes):
            found.append(None)
            continue
        try:
            found.append(decode_photo(data, least=least, values=queries.values).pixels)
        except BadImageError:
            found.append(None)
    return found


def find_true_ids(gallery: Gallery, dataset: GeoDataset | None, queries: ImageTable) -> Ints:
    """Find a tile of the gallery for the place of each query -> ids[M], -1 without one.

    The tile nearest to the query, if its square holds it; or else, where tiles or queries lack
    coordinates or sizes, a reference of the data set that has the same place.
    """
    tiles = gallery.tiles
    sizes = np.where(np.isfinite(tiles.size_m), tiles.size_m, measure_spacing(gallery))
    by_ground = _find_on_ground(gallery, sizes, queries)
    has_ground = bool(np.isfinite(tiles.lat).all() and np.isfinite(tiles.size_m).all())
    if dataset is None:
        return by_ground
    is_known = (by_ground >= 0) | (np.isfinite(queries.lat) & has_ground)
    return np.where(is_known, by_ground, _find_by_place(gallery, dataset, queries))


def _find_by_place(gallery: Gallery, dataset: GeoDataset, queries: ImageTable) -> Ints:
    """Return the id of a reference of the same place that the gallery holds; -1 without one."""
    table = dataset.references.to_table(columns=["id", "place_id"])
    ids = table["id"].to_numpy()
    places = table["place_id"].to_numpy()
    is_held = np.isin(ids, gallery.tiles.ids)
    ids, places = ids[is_held], places[is_held]
    order = np.argsort(places, kind="stable")
    found = np.full(len(queries), -1, np.int64)
    if len(ids):
        at = np.minimum(np.searchsorted(places[order], queries.place_ids), len(ids) - 1)
        same = places[order][at] == queries.place_ids
        found[same] = ids[order][at[same]]
    return found


def _find_on_ground(gallery: Gallery, sizes: Floats64, queries: ImageTable) -> Ints:
    """Return the id of the nearest tile that holds each query's position; -1 without one.

    sizes: of the gallery's tiles, in metres.
    """
    tiles = gallery.tiles
    found = np.full(len(queries), -1, np.int64)
    known = np.flatnonzero(np.isfinite(tiles.lat))
    asked = np.flatnonzero(np.isfinite(queries.lat))
    if not len(known) or not len(asked):
        return found
    tree = KDTree(unit_sphere(tiles.lat[known], tiles.lon[known]))
    nearest = tree.query(unit_sphere(queries.lat[asked], queries.lon[asked]))
    chord = np.asarray(nearest[0], np.float64)
    rows = known[np.asarray(nearest[1], np.int64)]
    is_within = chord * EARTH_RADIUS_M <= np.sqrt(0.5) * sizes[rows]
    found[asked[is_within]] = tiles.ids[rows[is_within]]
    return found


def sample_region(gallery: Gallery) -> Floats64:
    """Return lat, lon [S, 2] of a sample of the gallery's tiles."""
    tiles = gallery.tiles
    known = np.flatnonzero(np.isfinite(tiles.lat) & np.isfinite(tiles.lon))
    if len(known) > REGION_SAMPLE:
        known = np.random.default_rng(0).choice(known, REGION_SAMPLE, replace=False)
    return np.stack([tiles.lat[known], tiles.lon[known]], axis=1)


def measure_spacing(gallery: Gallery) -> float:
    """Return the side in metres that stands for tiles of unknown size.

    The median size of the others, or else the median distance between neighbors.
    """
    tiles = gallery.tiles
    sizes = tiles.size_m[np.isfinite(tiles.size_m)]
    if len(sizes):
        return float(np.median(sizes))
    known = np.flatnonzero(np.isfinite(tiles.lat) & np.isfinite(tiles.lon))
    if len(known) < 2:
        return 1.0
    points = unit_sphere(tiles.lat[known], tiles.lon[known])
    found = KDTree(points).query(points[:FIRST_TILES], k=2)
    chord = np.asarray(found[0], np.float64)[:, 1]
    return max(float(np.median(chord)) * EARTH_RADIUS_M, 1.0)
