"""Define the two sides of a search: queries, and a gallery that is read part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from s4g_ray.arrays import Bools, Floats, Floats64, Ints
from s4g_ray.data.pairs import Pairs
from s4g_ray.data.sphere import chord_of, metres_between, unit_sphere

ROWS_AT_ONCE = 1 << 16  # references of a part that is cut from an array


@dataclass(frozen=True)
class GalleryPart:
    """Some references: vectors[n, D], place_ids[n], latlon[n, 2] in degrees, distractors[n]."""

    vectors: Floats
    place_ids: Ints
    latlon: Floats64 | None = None
    distractors: Bools | None = None

    def take(self, chosen: Bools | slice) -> GalleryPart:
        """Return the part of the chosen references; without copies where those are all."""
        if isinstance(chosen, np.ndarray) and chosen.all():
            return self
        return GalleryPart(
            self.vectors[chosen],
            self.place_ids[chosen],
            None if self.latlon is None else self.latlon[chosen],
            None if self.distractors is None else self.distractors[chosen],
        )

    def drop_distractors(self) -> GalleryPart:
        """Return the part without its distractors."""
        return self if self.distractors is None else self.take(~self.distractors)


# Reads all parts of a gallery, from the first; called for each pass.
GalleryParts = Callable[[], Iterator[GalleryPart]]


def cut_gallery(whole: GalleryPart) -> GalleryParts:
    """Cut a gallery that is in memory into parts of ROWS_AT_ONCE; at least one, without copies."""

    def read() -> Iterator[GalleryPart]:
        for start in range(0, max(len(whole.vectors), 1), ROWS_AT_ONCE):
            yield whole.take(slice(start, start + ROWS_AT_ONCE))

    return read


class RowsByPlace:
    """Finds which of some rows belong to the places of references: rows[m] and places[m]."""

    def __init__(self, rows: Ints, places: Ints) -> None:
        order = np.argsort(places, kind="stable")
        self._pairs = Pairs(places[order], rows[order])

    def find(self, part_places: Ints) -> Pairs:
        """Pair rows with the references of their places, part_places[n], sorted by row."""
        found = self._pairs.expand(part_places)
        order = np.argsort(found.columns, kind="stable")
        return Pairs(found.columns[order], found.rows[order])


class NearbyReferences:
    """Finds the references of a part near queries, from coordinates in degrees."""

    def __init__(self, queries: Floats64, radius_m: float) -> None:
        """queries[Q, 2]; NaN where unknown."""
        self._queries = queries
        self._reach = chord_of(radius_m)
        self._located = np.flatnonzero(np.isfinite(queries).all(axis=1))
        self._tree = cKDTree(unit_sphere(*queries[self._located].T))

    def find(self, references: Floats64) -> tuple[Pairs, Floats64]:
        """Pair queries with references[n, 2] near them, sorted by query; and their metres."""
        known = np.flatnonzero(np.isfinite(references).all(axis=1))
        lists: Any = []
        if len(known) and len(self._located):
            points = unit_sphere(*references[known].T)
            # most references are near no query: only those that are get a list
            distances, _ = self._tree.query(points, distance_upper_bound=self._reach)
            near = np.isfinite(distances)
            known = known[near]
            lists = self._tree.query_ball_point(points[near], self._reach)
        else:
            known = known[:0]
        counts = [len(found) for found in lists]
        columns = np.repeat(known, counts)
        found = np.fromiter((row for rows in lists for row in rows), np.int64, sum(counts))
        rows = self._located[found]
        order = np.argsort(rows, kind="stable")
        pairs = Pairs(rows[order], columns[order])
        metres = metres_between(*self._queries[pairs.rows].T, *references[pairs.columns].T)
        return pairs, metres
