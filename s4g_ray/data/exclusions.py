"""Define Exclusions: places that are never negatives of each other.

Tasks that mine and plan import this module, so scipy's tree, which they do not need, is imported
inside the functions that build it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from s4g_ray.arrays import Bools, Ints
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import chord_of, metres_between, unit_sphere
from s4g_ray.errors import InputError

# Others within an exclusion radius. A search for a place's neighbors passes over all of them.
MAX_NEAR_PLACES = 20_000
SAMPLED_PLACES = 100_000  # places that check_radius draws at random to count near ones among
SAMPLED_CENTRES = 1000  # drawn places around which check_radius counts


@dataclass(frozen=True)
class PlacePairs:
    """A symmetric set of pairs of places: for each pair (a, b) also (b, a). Sorted, each once."""

    first: Ints
    second: Ints

    @classmethod
    def from_arrays(cls, first: Ints, second: Ints) -> PlacePairs:
        """Make the set of first[n], second[n] and their reverse, without pairs of equal places."""
        both = np.stack([np.concatenate([first, second]), np.concatenate([second, first])], axis=1)
        unique = np.unique(both[both[:, 0] != both[:, 1]], axis=0)
        return cls(unique[:, 0], unique[:, 1])

    def __len__(self) -> int:
        return len(self.first)

    def ranges(self, first: Ints) -> tuple[Ints, Ints]:
        """Return starts and ends, in the shape of `first`.

        second[start:end], ascending, are the partners of each place.
        """
        starts = np.searchsorted(self.first, first)
        ends = np.searchsorted(self.first, first, side="right")
        return starts, ends

    def contains(self, first: Ints, second: Ints) -> Bools:
        """Check whether each pair of first[...] and second[...] is in the set; shapes broadcast."""
        if not len(self):
            return np.zeros(np.broadcast_shapes(first.shape, second.shape), dtype=bool)
        places, keys = self._keys
        rows_first = np.minimum(np.searchsorted(places, first), len(places) - 1)
        rows_second = np.minimum(np.searchsorted(places, second), len(places) - 1)
        wanted = rows_first * len(places) + rows_second
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        known = (places[rows_first] == first) & (places[rows_second] == second)
        return np.asarray(known & (keys[at] == wanted))

    @cached_property
    def _keys(self) -> tuple[Ints, Ints]:
        """Compute the distinct places, and one number for each pair, ascending as the pairs are."""
        places = np.unique(self.first)
        rows_first = np.searchsorted(places, self.first)
        rows_second = np.searchsorted(places, self.second)
        return places, rows_first * len(places) + rows_second


@dataclass(frozen=True)
class Exclusions:
    """Pairs of places that are never negatives of each other, since they show the same ground.

    semi_positives: pairs that the data set names. In addition, all places within `radius_m` of
    each other are excluded, by the coordinates of `places`; a place without coordinates is near
    no other. Memory is O(places).
    """

    places: Places
    semi_positives: PlacePairs
    radius_m: float

    def near(self, first: Ints, second: Ints) -> Bools:
        """Check whether first[...] and second[...] lie within the radius; shapes broadcast."""
        found = np.zeros(np.broadcast_shapes(first.shape, second.shape), dtype=bool)
        if not (self.radius_m > 0 and len(self.places)):
            return found
        rows_first = self.places.rows(first)
        rows_second = self.places.rows(second)
        apart = self.places.xyz[rows_first] - self.places.xyz[rows_second]
        is_known = (rows_first >= 0) & (rows_second >= 0)
        squares = np.einsum("...i,...i", apart, apart)
        close = is_known & (squares <= chord_of(self.radius_m) ** 2)
        a = np.broadcast_to(rows_first, found.shape)[close]
        b = np.broadcast_to(rows_second, found.shape)[close]
        lat = self.places.lat
        lon = self.places.lon
        found[close] = metres_between(lat[a], lon[a], lat[b], lon[b]) <= self.radius_m
        return found

    @property
    def max_partners(self) -> int:
        """Compute the largest number of others that a place is kept apart from.

        Places up to 6 micrometres beyond the radius are counted too.
        """
        from scipy.spatial import cKDTree

        places = self.places
        semi = self.semi_positives
        num_near = np.zeros(len(places), dtype=np.int64)
        known = np.isfinite(places.xyz).all(axis=1)
        if self.radius_m > 0 and known.any():
            points = places.xyz[known]
            num_near[known] = cKDTree(points).query_ball_point(
                points, chord_of(self.radius_m), workers=-1, return_length=True
            )
            num_near[known] -= 1  # itself
        named, of_pair = np.unique(semi.first, return_inverse=True)
        is_far = ~self.near(semi.first, semi.second)
        num_named = np.bincount(of_pair, weights=is_far, minlength=len(named)).astype(np.int64)
        rows = places.rows(named)
        num_named[rows >= 0] += num_near[rows[rows >= 0]]
        return int(max(num_near.max(initial=0), num_named.max(initial=0)))

    def contains(self, first: Ints, second: Ints) -> Bools:
        """Check whether first[...] and second[...] are excluded, by name or by distance."""
        return self.semi_positives.contains(first, second) | self.near(first, second)


def check_radius(places: Places, radius_m: float) -> None:
    """Raise InputError when the median place has more than MAX_NEAR_PLACES within the radius.

    The number is estimated from a sample of the places.
    """
    from scipy.spatial import cKDTree

    if radius_m <= 0 or len(places) <= MAX_NEAR_PLACES:
        return
    rng = np.random.default_rng(0)
    rows = rng.choice(len(places), min(len(places), SAMPLED_PLACES), replace=False)
    points = unit_sphere(places.lat[rows], places.lon[rows])
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return
    num_near = cKDTree(points).query_ball_point(
        points[:SAMPLED_CENTRES], chord_of(radius_m), workers=-1, return_length=True
    )
    num_near -= 1  # itself
    median = float(np.median(num_near)) * len(places) / len(rows)
    if median > MAX_NEAR_PLACES:
        raise InputError(
            f"sampling.exclude_radius_m={radius_m:g} keeps the median place apart from"
            f" {median:,.0f} of {len(places) - 1:,} others; at most {MAX_NEAR_PLACES:,} are"
            " possible; lower it"
        )
