"""Choose gallery negatives: references without a query, as negatives of all queries of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np

from s4g_ray.arrays import Floats64, Ints, Rows32
from s4g_ray.data.exclusions import Exclusions, PlacePairs
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import chord_of, unit_sphere
from s4g_ray.data.train_split import GalleryReferences
from s4g_ray.sampling.compact_graph import CompactGraph, IdLookup, find_row

# keeps this choice's random stream apart from others of the same (seed, epoch)
GALLERY_STREAM = 0x67616C


@dataclass(frozen=True)
class GalleryStats:
    """Counts of the batches' slots: num_mined + num_drawn + num_missing == num_slots."""

    num_slots: int
    num_mined: int  # filled with a neighbor of a place of the batch
    num_drawn: int  # filled at random, where the graph has too few neighbors
    num_missing: int  # empty: no reference was left that may join the batch


def choose_gallery(
    batch_places: Ints,
    graph: CompactGraph | None,
    references: GalleryReferences,
    *,
    num: int,
    seed: int,
    epoch: int,
    exclusions: Exclusions | None = None,
) -> tuple[Ints, GalleryStats]:
    """Choose gallery references for each batch: place ids[B, batch_size] -> reference ids[B, num].

    -1 where no reference is left. `graph` holds the nearest gallery places of places with pairs, as
    rows of references.places. A batch takes the first neighbor of each of its places, in random
    order, then the second of each, and so on; slots that are still empty are drawn from the rest of
    the gallery (all of it without a graph). No place is twice in a batch, and none that
    `exclusions` exclude from any of its places, because each reference is a negative of every
    query; places a few micrometres beyond their radius are excluded too. Of a place with several
    references one is drawn.

    The choice for a batch depends only on its places, its number, seed and epoch. Memory beyond the
    result is O(gallery + places). Raises ValueError when `exclusions` with a radius lack a place of
    the gallery, or when the graph has rows that the gallery lacks.
    """
    tables = _build_tables(graph, references, exclusions)
    pool = np.arange(len(references.places))
    seen = np.full(len(references.places), -1)
    chosen = np.full((len(batch_places), num), -1, dtype=np.int64)  # rows of the references
    num_mined = 0
    for batch, places in enumerate(batch_places):
        rng = np.random.default_rng((seed, epoch, batch, GALLERY_STREAM))
        shuffled = rng.permutation(places)
        num_mined += _choose_rows(chosen[batch], shuffled, batch, tables, seen, pool, rng)
    num_missing = int((chosen < 0).sum())
    stats = GalleryStats(chosen.size, num_mined, chosen.size - num_mined - num_missing, num_missing)
    ids = np.full(chosen.shape, -1, dtype=np.int64)
    ids[chosen >= 0] = references.ids[chosen[chosen >= 0]]
    return ids, stats


class _Tables(NamedTuple):
    """The arrays that the compiled functions read."""

    gallery: IdLookup  # of G places
    starts: Ints  # [G + 1]: gallery place i has the references starts[i]..starts[i + 1] - 1
    with_neighbors: IdLookup  # of P places
    neighbors: Rows32  # [P, K] of gallery places, -1 pads
    semi_first: Ints  # ascending
    semi_second: Ints
    positioned: IdLookup  # of N places
    xyz: Floats64  # [N + 1, 3] of the positioned places; the last, NaN, is that of all others
    gallery_xyz: Floats64  # [G, 3]
    reach: float  # the squared chord up to which places exclude each other, -1 for no distance


def _build_tables(
    graph: CompactGraph | None, references: GalleryReferences, exclusions: Exclusions | None
) -> _Tables:
    """Build the tables. Raises ValueError as choose_gallery does."""
    none = np.zeros(0, dtype=np.int64)
    if graph is None:
        graph = CompactGraph(none, np.zeros((0, 0), dtype=np.int32))
    if graph.rows.max(initial=-1) >= len(references.places):
        raise ValueError(
            "the graph is not in rows of the gallery's places; make it with"
            " CompactGraph.read(uri, places, width, among=references.places.ids)"
        )
    if exclusions is None:
        exclusions = Exclusions(references.places, PlacePairs.from_arrays(none, none), 0.0)
    gallery = references.places.ids
    radius = exclusions.radius_m
    known = exclusions.places if radius > 0 else Places(none, np.zeros(0), np.zeros(0))
    rows = known.rows(gallery)
    num_unknown = int((rows < 0).sum())
    if radius > 0 and num_unknown:
        raise ValueError(
            f"exclusions within {radius:g} m lack {num_unknown} of {len(gallery)} gallery places;"
            " make them of the places with pairs and of the gallery together"
        )
    xyz = np.vstack([unit_sphere(known.lat, known.lon), np.full((1, 3), np.nan)])
    return _Tables(
        gallery=IdLookup.from_ids(gallery),
        starts=np.append(np.searchsorted(references.place_ids, gallery), len(references)),
        with_neighbors=IdLookup.from_ids(graph.places),
        neighbors=graph.rows,
        semi_first=np.ascontiguousarray(exclusions.semi_positives.first),
        semi_second=np.ascontiguousarray(exclusions.semi_positives.second),
        positioned=IdLookup.from_ids(known.ids),
        xyz=xyz,
        gallery_xyz=xyz[rows],
        reach=chord_of(radius) ** 2 if radius > 0 else -1.0,
    )


@numba.njit(cache=True)
def _choose_rows(
    out: Ints,
    places: Ints,
    batch: int,
    tables: _Tables,
    seen: Ints,
    pool: Ints,
    rng: np.random.Generator,
) -> int:  # pragma: no cover (compiled)
    """Fill `out` with rows of references, as far as there are any; return the number of neighbors.

    seen[G]: the last batch that tried a gallery place, or from which it is excluded. pool[G]:
    0..G-1, before and after.
    """
    neighbor_rows, around = _exclude_places(places, batch, tables, seen)
    size = 0
    num_tried = 0
    for rank in range(tables.neighbors.shape[1]):
        for row in neighbor_rows:
            if row >= 0 and size < len(out):
                place = tables.neighbors[row, rank]
                if place >= 0 and _may_join(place, batch, around, tables, seen):
                    out[size] = rng.integers(tables.starts[place], tables.starts[place + 1])
                    size += 1
    num_mined = size
    while size < len(out) and num_tried < len(pool):
        other = rng.integers(num_tried, len(pool))
        place = pool[other]
        pool[other] = pool[num_tried]
        pool[num_tried] = place
        num_tried += 1
        if _may_join(place, batch, around, tables, seen):
            out[size] = rng.integers(tables.starts[place], tables.starts[place + 1])
            size += 1
    for i in range(num_tried):
        if pool[i] >= num_tried:
            pool[pool[i]] = pool[i]
    pool[:num_tried] = np.arange(num_tried)
    return num_mined


@numba.njit(cache=True)
def _exclude_places(
    places: Ints, batch: int, tables: _Tables, seen: Ints
) -> tuple[Ints, Floats64]:  # pragma: no cover (compiled)
    """Exclude the batch's places and their semi-positives, by setting `seen` of them.

    Returns the places as rows of neighbors, and their xyz.
    """
    neighbor_rows = np.empty(len(places), np.int64)
    around = np.empty((len(places), 3), np.float64)
    for i, place in enumerate(places):
        neighbor_rows[i] = find_row(tables.with_neighbors, place)
        around[i] = tables.xyz[find_row(tables.positioned, place)]
        start = np.searchsorted(tables.semi_first, place)
        end = np.searchsorted(tables.semi_first, place, side="right")
        for other in tables.semi_second[start:end]:
            excluded = find_row(tables.gallery, other)
            if excluded >= 0:
                seen[excluded] = batch
        own = find_row(tables.gallery, place)
        if own >= 0:
            seen[own] = batch
    return neighbor_rows, around


@numba.njit(cache=True)
def _may_join(
    place: int, batch: int, around: Floats64, tables: _Tables, seen: Ints
) -> bool:  # pragma: no cover (compiled)
    """Return whether a gallery place is new to the batch and beyond the reach of its places.

    The place is marked as seen.
    """
    if seen[place] == batch:
        return False
    seen[place] = batch
    if tables.reach < 0:
        return True
    x, y, z = tables.gallery_xyz[place]
    for i in range(len(around)):
        if (around[i, 0] - x) ** 2 + (around[i, 1] - y) ** 2 + (
            around[i, 2] - z
        ) ** 2 <= tables.reach:
            return False
    return True
