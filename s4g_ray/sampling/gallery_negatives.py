"""Gallery negatives: references without a query that join a batch as negatives of all its queries."""

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

GALLERY_STREAM = (
    0x67616C  # keeps this choice's random stream apart from others of the same (seed, epoch)
)


@dataclass(frozen=True)
class GalleryStats:
    """What became of the batches' slots. num_mined + num_drawn + num_missing == num_slots."""

    num_slots: int
    num_mined: int  # a neighbor of a place of the batch
    num_drawn: int  # at random, where the graph gave too few
    num_missing: int  # nothing was left that may join the batch


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
    """The gallery references of each batch: place ids[B, batch_size] -> reference ids[B, num], -1 where none is left.

    `graph` holds the nearest gallery places of places with pairs, as rows of references.places. A batch takes
    the first neighbor of each of its places, in random order, then the second of each, and so on; what is still
    missing is drawn from the rest of the gallery (all of it without a graph).
    No place stands twice in a batch, and none that `exclusions` bar from any of its places, for each is a
    negative of every query; a few micrometres beyond their radius are barred too. Of a place with several
    references one is drawn.

    What a batch gets depends on its places, its number, seed and epoch alone. Memory beyond the result is
    O(gallery + places). Raises ValueError when `exclusions` with a radius do not know a place of the gallery, or
    the graph has rows that it has not.
    """
    tables = _tables(graph, references, exclusions)
    pool, seen = np.arange(len(references.places)), np.full(len(references.places), -1)
    chosen = np.full((len(batch_places), num), -1, dtype=np.int64)  # rows of the references
    num_mined = 0
    for batch, places in enumerate(batch_places):
        rng = np.random.default_rng((seed, epoch, batch, GALLERY_STREAM))
        num_mined += _choose(chosen[batch], rng.permutation(places), batch, tables, seen, pool, rng)
    num_missing = int((chosen < 0).sum())
    stats = GalleryStats(chosen.size, num_mined, chosen.size - num_mined - num_missing, num_missing)
    return np.append(references.ids, -1)[chosen], stats


class _Tables(NamedTuple):
    """What the choice reads, as the compiled functions take it."""

    gallery: IdLookup  # of G places
    starts: Ints  # [G + 1]; the references of gallery place i are rows starts[i]..starts[i + 1] - 1
    asking: IdLookup  # of P places
    neighbors: Rows32  # [P, K] of gallery places, -1 pads
    semi_first: Ints  # ascending
    semi_second: Ints
    positioned: IdLookup  # of N places
    xyz: Floats64  # [N + 1, 3] of the positioned places; the last, NaN, stands for the position of all others
    gallery_xyz: Floats64  # [G, 3]
    reach: float  # the squared chord up to which places bar each other, -1 for no distance


def _tables(
    graph: CompactGraph | None, references: GalleryReferences, exclusions: Exclusions | None
) -> _Tables:
    none = np.zeros(0, dtype=np.int64)
    graph = CompactGraph(none, np.zeros((0, 0), dtype=np.int32)) if graph is None else graph
    if graph.rows.max(initial=-1) >= len(references.places):
        raise ValueError(
            "the graph is not in rows of the gallery's places; make it with"
            " CompactGraph.read(uri, places, width, among=references.places.ids)"
        )
    exclusions = (
        Exclusions(references.places, PlacePairs.from_arrays(none, none), 0.0)
        if exclusions is None
        else exclusions
    )
    gallery, radius = references.places.ids, exclusions.radius_m
    known = exclusions.places if radius > 0 else Places(none, np.zeros(0), np.zeros(0))
    rows = known.rows(gallery)
    if radius > 0 and (rows < 0).any():
        raise ValueError(
            f"exclusions within {radius:g} m do not know {int((rows < 0).sum())} of {len(gallery)} gallery places;"
            " make them of the places with pairs and of the gallery together"
        )
    xyz = np.vstack([unit_sphere(known.lat, known.lon), np.full((1, 3), np.nan)])
    return _Tables(
        IdLookup.from_ids(gallery),
        np.append(np.searchsorted(references.place_ids, gallery), len(references)),
        IdLookup.from_ids(graph.places),
        graph.rows,
        np.ascontiguousarray(exclusions.semi_positives.first),
        np.ascontiguousarray(exclusions.semi_positives.second),
        IdLookup.from_ids(known.ids),
        xyz,
        xyz[rows],
        chord_of(radius) ** 2 if radius > 0 else -1.0,
    )


@numba.njit(cache=True)
def _choose(
    out: Ints,
    places: Ints,
    batch: int,
    tables: _Tables,
    seen: Ints,
    pool: Ints,
    rng: np.random.Generator,
) -> int:  # pragma: no cover (compiled)
    """Fill `out` with rows of references, as far as they go; returns how many are neighbors.

    seen[G]: the last batch that looked at a gallery place, or that it is barred from. pool[G]: 0..G-1, before
    and after.
    """
    slots, around = _enter(places, batch, tables, seen)
    size, tried = 0, 0
    for rank in range(tables.neighbors.shape[1]):
        for row in slots:
            if row >= 0 and size < len(out):
                place = tables.neighbors[row, rank]
                if place >= 0 and _may_join(place, batch, around, tables, seen):
                    out[size] = rng.integers(tables.starts[place], tables.starts[place + 1])
                    size += 1
    mined = size
    while size < len(out) and tried < len(pool):
        other = rng.integers(tried, len(pool))
        place = pool[other]
        pool[other], pool[tried] = pool[tried], place
        tried += 1
        if _may_join(place, batch, around, tables, seen):
            out[size] = rng.integers(tables.starts[place], tables.starts[place + 1])
            size += 1
    for i in range(tried):
        if pool[i] >= tried:
            pool[pool[i]] = pool[i]
    pool[:tried] = np.arange(tried)
    return mined


@numba.njit(cache=True)
def _enter(
    places: Ints, batch: int, tables: _Tables, seen: Ints
) -> tuple[Ints, Floats64]:  # pragma: no cover (compiled)
    """The batch's places as rows of neighbors, and their xyz; bars their semi-positives, and the places themselves."""
    slots = np.empty(len(places), np.int64)
    around = np.empty((len(places), 3), np.float64)
    for i, place in enumerate(places):
        slots[i] = find_row(tables.asking, place)
        around[i] = tables.xyz[find_row(tables.positioned, place)]
        start = np.searchsorted(tables.semi_first, place)
        end = np.searchsorted(tables.semi_first, place, side="right")
        for other in tables.semi_second[start:end]:
            barred = find_row(tables.gallery, other)
            if barred >= 0:
                seen[barred] = batch
        own = find_row(tables.gallery, place)
        if own >= 0:
            seen[own] = batch
    return slots, around


@numba.njit(cache=True)
def _may_join(
    place: int, batch: int, around: Floats64, tables: _Tables, seen: Ints
) -> bool:  # pragma: no cover (compiled)
    """Whether a gallery place is new to the batch and not within reach of its places; it is not asked for again."""
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
