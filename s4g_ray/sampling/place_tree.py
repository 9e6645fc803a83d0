"""Nearest places on the sphere: a k-d tree over places that are sorted along a space-filling curve."""

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
PAIRS_AT_ONCE = 2**20  # asked for
SAMPLE = 1000  # places that show how many neighbors are barred
LEAF_PLACES = 32  # 1M places, k=128: 8.2 s, against 10.6 s with scipy's 16


def curve_order(xyz: Floats64) -> Ints:
    """xyz[N, 3] on the unit sphere -> the order of the points along a Morton curve through cells of 6 m."""
    code = np.zeros(len(xyz), np.uint64)
    for axis in range(3):
        cells = ((xyz[:, axis] + 1) * (2**20 - 0.5)).astype(np.uint64)
        code |= _spread(cells) << np.uint64(axis)
    return np.argsort(code, kind="stable")


def _spread(cells: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The 21 low bits of each number, moved to every third bit of 63."""
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        cells = (cells | cells << np.uint64(shift)) & np.uint64(mask)
    return cells


class BarredNeighbors:
    """Decides which of found neighbors exclusions bar, looking only at those that they may."""

    def __init__(self, exclusions: Exclusions, *sets: Places) -> None:
        """`sets`: the places that ask and those that are found."""
        self._exclusions = exclusions
        self._surely, self._maybe = (
            -1.0,
            -1.0,
        )  # chords: two places are near up to one, and never beyond the other
        if exclusions.radius_m > 0:
            moved = np.concatenate([_moved(places, exclusions.places) for places in sets])
            border = chord_of(exclusions.radius_m)
            self._maybe = np.inf if (moved > 0).any() else border
            self._surely = border * (1 - 3e-9) - 3e-12 if (moved == 0).all() else -1.0

    def __call__(self, ids: Ints, found: Ints, chords: Floats64) -> Bools:
        """ids[b], found[b, w] and chords[b, w] between them -> whether each is barred."""
        first = self._exclusions.semi_positives.first
        named = np.searchsorted(first, ids, side="right") > np.searchsorted(first, ids)
        barred = chords <= self._surely
        rows, columns = np.nonzero(((chords <= self._maybe) | named[:, None]) & ~barred)
        barred[rows, columns] = self._exclusions.contains(ids[rows], found[rows, columns])
        return barred


def _moved(places: Places, known: Places) -> Floats64:
    """Metres from where places lie to where `known` has them; NaN where it has not."""
    if known is places:
        return np.zeros(1)
    rows = known.rows(places.ids)
    metres = np.full(len(places), np.nan)
    mine, theirs = np.flatnonzero(rows >= 0), rows[rows >= 0]
    metres[mine] = metres_between(
        places.lat[mine], places.lon[mine], known.lat[theirs], known.lon[theirs]
    )
    return metres


class PlaceTree:
    """Places to be found: order[N], their rows along a space-filling curve; ids[N] and xyz[N, 3] in that order."""

    def __init__(
        self, ids: Ints, lat: Floats64, lon: Floats64, dtype: type[Metres] = np.float32
    ) -> None:
        """dtype: of the metres that are found; all is reckoned in float64."""
        from scipy.spatial import cKDTree  # not at the top, as in places.py

        xyz = unit_sphere(lat, lon)
        self.order = curve_order(xyz)
        self.ids, self.xyz = ids[self.order], xyz[self.order]
        self._dtype = dtype
        self._tree = cKDTree(self.xyz, leafsize=LEAF_PLACES)

    def search(
        self,
        ids: Ints,
        xyz: Floats64,
        k: int,
        bars: BarredNeighbors | None = None,
        block: int | None = None,
    ) -> Iterator[tuple[slice, Ints, NDArray[Metres]]]:
        """ids[n] and xyz[n, 3] -> for each block of them, rows, neighbors[b, k], metres[b, k].

        Those are the nearest places, the asking one and what `bars` bar left out; pads (-1, infinitely far) where
        there are fewer.
        """
        width = k + 1
        if bars is not None:
            sample = slice(None, None, max(1, len(ids) // SAMPLE))
            width = _best_width(self._nearest(ids[sample], xyz[sample], k, width, bars)[2], width)
        for rows in blocks_of(len(ids), width, block):
            yield rows, *self._nearest(ids[rows], xyz[rows], k, width, bars)[:2]

    def _nearest(
        self, ids: Ints, xyz: Floats64, k: int, width: int, bars: BarredNeighbors | None
    ) -> tuple[Ints, NDArray[Metres], Ints]:
        """neighbors[b, k], metres[b, k], used[b]: how many of the nearest were looked at to find them.

        `width` are asked for; a place that is left short of k asks again for twice as many.
        """
        neighbors, metres = (
            np.full((len(ids), k), -1, np.int64),
            np.full((len(ids), k), np.inf, self._dtype),
        )
        used, asking = np.zeros(len(ids), np.int64), np.arange(len(ids))
        width = min(width, len(self.ids))
        while len(asking) and width:
            for part in blocks_of(len(asking), width, max(1, PAIRS_AT_ONCE // width)):
                self._ask(ids, xyz, width, bars, neighbors, metres, used, asking[part])
            asking = asking[(neighbors[asking, -1] < 0) & (width < len(self.ids))]
            width = min(2 * width, len(self.ids))
        return neighbors, metres, used

    def _ask(
        self,
        ids: Ints,
        xyz: Floats64,
        width: int,
        bars: BarredNeighbors | None,
        neighbors: Ints,
        metres: NDArray[Metres],
        used: Ints,
        rows: Ints,
    ) -> None:
        """Fill some rows of what is found from the `width` nearest places of each."""
        distances, columns = self._tree.query(xyz[rows], k=width, workers=-1)
        chords, found = np.reshape(distances, (-1, width)), np.reshape(columns, (-1, width))
        asking = ids[rows]
        barred = (
            np.zeros((len(rows), 0), np.bool_)
            if bars is None
            else bars(asking, self.ids[found], chords)
        )
        answers = neighbors, metres, used
        by_rows(
            lambda first, last: _keep(
                first, last, asking, self.ids, found, chords, barred, rows, *answers
            ),
            len(rows),
        )


def _best_width(used: Ints, least: int) -> int:
    """How many to ask for when some need used[n], so that one question or a second of twice the width cost least."""
    widths = np.unique(np.maximum(used, least))
    again = (used > widths[:, None]).mean(axis=1)
    return int(widths[np.argmin(widths * (1 + 2 * again))])


@numba.njit(cache=True, nogil=True)
def _keep(
    first: int,
    last: int,
    asking: Ints,
    names: Ints,
    found: Ints,
    chords: Floats64,
    barred: Bools,
    rows: Ints,
    neighbors: Ints,
    metres: NDArray[Metres],
    used: Ints,
) -> None:  # pragma: no cover (compiled)
    """Of questions first..last, put what is found into the rows that asked: neither itself nor barred."""
    for i in range(first, last):
        row, kept, column = rows[i], 0, 0
        while column < found.shape[1] and kept < neighbors.shape[1]:
            name = names[found[i, column]]
            if name != asking[i] and not (barred.shape[1] and barred[i, column]):
                neighbors[row, kept] = name
                half = min(chords[i, column] / 2, 1.0)
                # below 13 km the series is exact to 1e-13, and takes a fifth of the time
                angle = half * (1 + half * half / 6) if half < 1e-3 else np.arcsin(half)
                metres[row, kept] = 2 * EARTH_RADIUS_M * angle
                kept += 1
            column += 1
        used[row] = column
