"""Find nearest places on the sphere, with a k-d tree over places sorted along a Morton curve."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats64, Ints, by_rows
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import EARTH_RADIUS_M, chord_of, metres_between, unit_sphere
from s4g_ray.data.tables.neighbor_graph import blocks_of

Metres = np.float32 | np.float64
PAIRS_AT_ONCE = 2**20  # of a query place and a found place, in one call of the tree
SAMPLE = 1000  # query places by which the number of excluded neighbors is estimated
LEAF_PLACES = 32  # 1M places, k=128: 8.2 s, against 10.6 s with scipy's 16


def curve_order(xyz: Floats64) -> Ints:
    """Order xyz[N, 3] on the unit sphere along a Morton curve through cells of 6 m."""
    code = np.zeros(len(xyz), np.uint64)
    for axis in range(3):
        cells = ((xyz[:, axis] + 1) * (2**20 - 0.5)).astype(np.uint64)
        code |= _spread_bits(cells) << np.uint64(axis)
    return np.argsort(code, kind="stable")


def _spread_bits(cells: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Move the 21 low bits of each number to every third bit of 63."""
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        cells = (cells | cells << np.uint64(shift)) & np.uint64(mask)
    return cells


class ExclusionFilter:
    """Finds the excluded ones of found neighbors; checks only those that may be excluded."""

    def __init__(self, exclusions: Exclusions, *sets: Places) -> None:
        """Prepare a filter; `sets` are the places that search and those that are found."""
        self._exclusions = exclusions
        # two places are always near up to the first chord, and never beyond the second
        self._sure_chord = -1.0
        self._possible_chord = -1.0
        if exclusions.radius_m > 0:
            moved = np.concatenate([_metres_moved(places, exclusions.places) for places in sets])
            border = chord_of(exclusions.radius_m)
            self._possible_chord = np.inf if (moved > 0).any() else border
            if (moved == 0).all():
                self._sure_chord = border * (1 - 3e-9) - 3e-12

    def __call__(self, ids: Ints, found: Ints, chords: Floats64) -> Bools:
        """Return whether each found[b, w] is excluded from ids[b]; chords[b, w] between them."""
        first = self._exclusions.semi_positives.first
        is_named = np.searchsorted(first, ids, side="right") > np.searchsorted(first, ids)
        is_excluded = chords <= self._sure_chord
        may_be_excluded = (chords <= self._possible_chord) | is_named[:, None]
        rows, columns = np.nonzero(may_be_excluded & ~is_excluded)
        is_excluded[rows, columns] = self._exclusions.contains(ids[rows], found[rows, columns])
        return is_excluded


def _metres_moved(places: Places, known: Places) -> Floats64:
    """Return metres between the positions of places here and in `known`; NaN where it lacks one."""
    if known is places:
        return np.zeros(1)
    rows = known.rows(places.ids)
    metres = np.full(len(places), np.nan)
    here = np.flatnonzero(rows >= 0)
    there = rows[here]
    metres[here] = metres_between(
        places.lat[here], places.lon[here], known.lat[there], known.lon[there]
    )
    return metres


class PlaceTree:
    """Places to be found.

    order[N]: their rows along a space-filling curve; ids[N] and xyz[N, 3] in that order.
    """

    def __init__(
        self, ids: Ints, lat: Floats64, lon: Floats64, dtype: type[Metres] = np.float32
    ) -> None:
        """Build the tree. dtype: of the metres that searches return; all is computed in float64."""
        from scipy.spatial import cKDTree  # here, as in exclusions.py: tasks start without it

        xyz = unit_sphere(lat, lon)
        self.order = curve_order(xyz)
        self.ids = ids[self.order]
        self.xyz = xyz[self.order]
        self._dtype = dtype
        self._tree = cKDTree(self.xyz, leafsize=LEAF_PLACES)

    def search(
        self,
        ids: Ints,
        xyz: Floats64,
        k: int,
        excluded: ExclusionFilter | None = None,
        block: int | None = None,
    ) -> Iterator[tuple[slice, Ints, NDArray[Metres]]]:
        """Find the nearest places of ids[n] at xyz[n, 3], block by block.

        Yields for each block its rows, neighbors[b, k] and metres[b, k]. The place itself and
        places that `excluded` finds are left out; pads (-1, infinitely far) where there are fewer.
        """
        width = k + 1
        if excluded is not None:
            sample = slice(None, None, max(1, len(ids) // SAMPLE))
            _, _, num_used = self._find_nearest(ids[sample], xyz[sample], k, width, excluded)
            width = _choose_width(num_used, width)
        for rows in blocks_of(len(ids), width, block):
            neighbors, metres, _ = self._find_nearest(ids[rows], xyz[rows], k, width, excluded)
            yield rows, neighbors, metres

    def _find_nearest(
        self, ids: Ints, xyz: Floats64, k: int, width: int, excluded: ExclusionFilter | None
    ) -> tuple[Ints, NDArray[Metres], Ints]:
        """Return neighbors[b, k], metres[b, k], and num_used[b]: the nearest that were examined.

        The search asks for `width` places, and again for twice as many where a place has fewer than
        k neighbors.
        """
        neighbors = np.full((len(ids), k), -1, np.int64)
        metres = np.full((len(ids), k), np.inf, self._dtype)
        num_used = np.zeros(len(ids), np.int64)
        unfilled = np.arange(len(ids))
        width = min(width, len(self.ids))
        while len(unfilled) and width:
            for part in blocks_of(len(unfilled), width, max(1, PAIRS_AT_ONCE // width)):
                rows = unfilled[part]
                self._fill_rows(ids, xyz, width, excluded, neighbors, metres, num_used, rows)
            unfilled = unfilled[(neighbors[unfilled, -1] < 0) & (width < len(self.ids))]
            width = min(2 * width, len(self.ids))
        return neighbors, metres, num_used

    def _fill_rows(
        self,
        ids: Ints,
        xyz: Floats64,
        width: int,
        excluded: ExclusionFilter | None,
        neighbors: Ints,
        metres: NDArray[Metres],
        num_used: Ints,
        rows: Ints,
    ) -> None:
        """Fill `rows` of the last arrays from the `width` nearest places of each."""
        distances, columns = self._tree.query(xyz[rows], k=width, workers=-1)
        chords = np.reshape(distances, (-1, width))
        found = np.reshape(columns, (-1, width))
        asking = ids[rows]
        is_excluded = np.zeros((len(rows), 0), np.bool_)
        if excluded is not None:
            is_excluded = excluded(asking, self.ids[found], chords)

        def keep_range(first: int, last: int) -> None:
            _keep_neighbors(
                first,
                last,
                asking,
                self.ids,
                found,
                chords,
                is_excluded,
                rows,
                neighbors,
                metres,
                num_used,
            )

        by_rows(keep_range, len(rows))


def _choose_width(num_used: Ints, least: int) -> int:
    """Choose the width of a search for places that need num_used[n].

    The chosen width costs least, counting a second search of twice the width where it is too small.
    """
    widths = np.unique(np.maximum(num_used, least))
    share_again = (num_used > widths[:, None]).mean(axis=1)
    return int(widths[np.argmin(widths * (1 + 2 * share_again))])


@numba.njit(cache=True, nogil=True)
def _keep_neighbors(
    first: int,
    last: int,
    asking: Ints,
    ids: Ints,
    found: Ints,
    chords: Floats64,
    is_excluded: Bools,
    rows: Ints,
    neighbors: Ints,
    metres: NDArray[Metres],
    num_used: Ints,
) -> None:  # pragma: no cover (compiled)
    """Write the neighbors of the places asking[first:last] into rows[first:last] of the results.

    found[b, w] are rows of ids[N], nearest first, at chords[b, w]. The place itself and places
    with is_excluded[b, w] (or [b, 0]: none) are left out.
    """
    for i in range(first, last):
        row = rows[i]
        num_kept = 0
        column = 0
        while column < found.shape[1] and num_kept < neighbors.shape[1]:
            place = ids[found[i, column]]
            if place != asking[i] and not (is_excluded.shape[1] and is_excluded[i, column]):
                neighbors[row, num_kept] = place
                half = min(chords[i, column] / 2, 1.0)
                # below 13 km the series is exact to 1e-13, and takes a fifth of the time
                angle = half * (1 + half * half / 6) if half < 1e-3 else np.arcsin(half)
                metres[row, num_kept] = 2 * EARTH_RADIUS_M * angle
                num_kept += 1
            column += 1
        num_used[row] = column
