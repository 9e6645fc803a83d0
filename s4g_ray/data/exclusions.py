"""Exclusions: places that are never negatives of each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from s4g_ray.arrays import Bools, Ints
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import chord_of, metres_between, unit_sphere
from s4g_ray.errors import InputError

MOST_NEAR = 20_000  # others within an exclusion radius: a place's neighbors are found by looking past all of them
COUNTED, AROUND = 100_000, 1000  # places, drawn at random, that are counted around so many of these


@dataclass(frozen=True)
class PlacePairs:
    """A symmetric set of pairs of places: for each pair (a, b) also (b, a). Sorted, each once."""

    first: Ints
    second: Ints

    @classmethod
    def from_arrays(cls, first: Ints, second: Ints) -> PlacePairs:
        """The set of first[n], second[n] and their reverse; pairs of a place with itself are left out."""
        both = np.stack([np.concatenate([first, second]), np.concatenate([second, first])], axis=1)
        unique = np.unique(both[both[:, 0] != both[:, 1]], axis=0)
        return cls(unique[:, 0], unique[:, 1])

    def __len__(self) -> int:
        return len(self.first)

    def ranges(self, first: Ints) -> tuple[Ints, Ints]:
        """starts, ends (shape of `first`): second[start:end], ascending, are the partners of each place."""
        return np.searchsorted(self.first, first), np.searchsorted(self.first, first, side="right")

    def contains(self, first: Ints, second: Ints) -> Bools:
        """Whether each pair of first[...] and second[...] (shapes that broadcast) is in the set."""
        if not len(self):
            return np.zeros(np.broadcast_shapes(first.shape, second.shape), dtype=bool)
        places, keys = self._keys
        a, b = (np.minimum(np.searchsorted(places, x), len(places) - 1) for x in (first, second))
        wanted = a * len(places) + b
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.asarray((places[a] == first) & (places[b] == second) & (keys[at] == wanted))

    @cached_property
    def _keys(self) -> tuple[Ints, Ints]:
        """The places, and a number for each pair, ascending as the pairs are."""
        places = np.unique(self.first)
        return places, np.searchsorted(places, self.first) * len(places) + np.searchsorted(
            places, self.second
        )


@dataclass(frozen=True)
class Exclusions:
    """Pairs of places that are never negatives of each other: they show the same ground.

    semi_positives: pairs that the data set names. Beside them all places within `radius_m` of each other are
    excluded, by the coordinates of `places`; a place without coordinates is near none. Memory is O(places).
    """

    places: Places
    semi_positives: PlacePairs
    radius_m: float

    def near(self, first: Ints, second: Ints) -> Bools:
        """Whether each first[...] and second[...] (shapes that broadcast) lie within the radius."""
        found = np.zeros(np.broadcast_shapes(first.shape, second.shape), dtype=bool)
        if not (self.radius_m > 0 and len(self.places)):
            return found
        a, b = self.places.rows(first), self.places.rows(second)
        apart = self.places.xyz[a] - self.places.xyz[b]
        close = (
            (a >= 0)
            & (b >= 0)
            & (np.einsum("...i,...i", apart, apart) <= chord_of(self.radius_m) ** 2)
        )
        a, b = np.broadcast_to(a, found.shape)[close], np.broadcast_to(b, found.shape)[close]
        lat, lon = self.places.lat, self.places.lon
        found[close] = metres_between(lat[a], lon[a], lat[b], lon[b]) <= self.radius_m
        return found

    @property
    def max_partners(self) -> int:
        """The largest number of others that a place is kept apart from (6 micrometres beyond the radius count too)."""
        from scipy.spatial import cKDTree

        places, semi = self.places, self.semi_positives
        around = np.zeros(len(places), dtype=np.int64)
        known = np.isfinite(places.xyz).all(axis=1)
        if self.radius_m > 0 and known.any():
            points, chord = places.xyz[known], chord_of(self.radius_m)
            around[known] = cKDTree(points).query_ball_point(
                points, chord, workers=-1, return_length=True
            )
            around[known] -= 1  # itself
        named, of_pair = np.unique(semi.first, return_inverse=True)
        far = np.bincount(
            of_pair, weights=~self.near(semi.first, semi.second), minlength=len(named)
        ).astype(np.int64)
        rows = places.rows(named)
        far[rows >= 0] += around[rows[rows >= 0]]
        return int(max(around.max(initial=0), far.max(initial=0)))

    def contains(self, first: Ints, second: Ints) -> Bools:
        """Whether each pair of first[...] and second[...] (shapes that broadcast) is excluded, for either reason."""
        return self.semi_positives.contains(first, second) | self.near(first, second)


def check_radius(places: Places, radius_m: float) -> None:
    """Raises InputError when the median place has more than MOST_NEAR others within the radius, by a sample."""
    from scipy.spatial import cKDTree

    if radius_m <= 0 or len(places) <= MOST_NEAR:
        return
    rows = np.random.default_rng(0).choice(len(places), min(len(places), COUNTED), replace=False)
    points = unit_sphere(places.lat[rows], places.lon[rows])
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return
    near = (
        cKDTree(points).query_ball_point(
            points[:AROUND], chord_of(radius_m), workers=-1, return_length=True
        )
        - 1
    )
    median = float(np.median(near)) * len(places) / len(rows)
    if median > MOST_NEAR:
        raise InputError(
            f"sampling.exclude_radius_m={radius_m:g} keeps the median place apart from {median:,.0f} of"
            f" {len(places) - 1:,} others; at most {MOST_NEAR:,} are possible; lower it"
        )
