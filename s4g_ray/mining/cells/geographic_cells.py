"""Divide places into geographic cells of bounded size, each with the cells that adjoin it.

Pure functions: no Ray, no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats32, Ints, Rows32
from s4g_ray.data.places import Places
from s4g_ray.data.sphere import unit_sphere32, widest_axis

NUM_ADJOINING = 8  # as many as a square has around it
CANDIDATES = 4 * NUM_ADJOINING  # cells of near centres, among which the nearest boxes are found


@dataclass(frozen=True)
class GeoCells:
    """Cells of places, numbered so that consecutive ones are mostly near.

    cell_of[P]: the cell of each place. sizes[C]: places of each cell. adjoining[C, A]: the nearest
    other cells, at most NUM_ADJOINING, ascending.
    """

    cell_of: Rows32
    sizes: Ints
    adjoining: Rows32

    @classmethod
    def from_places(cls, places: Places, max_places: int) -> GeoCells:
        """Divide located places into cells of at most `max_places`, by halving a k-d tree."""
        xyz = unit_sphere32(places.lat, places.lon)
        order = np.arange(len(places), dtype=np.int32)
        edges = [0]
        pending = [(0, len(places))]
        while pending:
            start, end = pending.pop()
            if end - start <= max_places:
                edges.append(end)
                continue
            half = (start + end) // 2
            _halve(xyz, order[start:end], half - start)
            pending += [(half, end), (start, half)]  # the first half comes first
        starts = np.array(edges[:-1])
        sizes = np.diff(edges)
        cell_of = np.empty(len(places), dtype=np.int32)
        cell_of[order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        # a gather of one axis at a time: a copy of 4 bytes a place
        lows = [np.minimum.reduceat(xyz[order, axis], starts) for axis in range(3)]
        highs = [np.maximum.reduceat(xyz[order, axis], starts) for axis in range(3)]
        return cls(cell_of, sizes, _find_adjoining(np.stack(lows, 1), np.stack(highs, 1)))

    def __len__(self) -> int:
        return len(self.sizes)

    def around(self, cells: Ints) -> Ints:
        """Return some cells and those that adjoin them, each once, ascending."""
        return np.unique(np.concatenate([cells, self.adjoining[cells].ravel()])).astype(np.int64)


def _halve(xyz: Floats32, order: NDArray[np.int32], half: int) -> None:
    """Reorder rows of points so that the first `half` lie below the others, on the longest axis."""
    along = xyz[order, widest_axis(xyz, order)]
    order[:] = order[np.argpartition(along, half)]


def _find_adjoining(lows: Floats32, highs: Floats32) -> Rows32:
    """Return the cells [C, A] whose boxes lows[C, 3]..highs[C, 3] are nearest to each cell's.

    Of equally near boxes those with the nearest centre come first. Found among the CANDIDATES cells
    with the nearest centres.
    """
    from scipy.spatial import cKDTree  # here: tasks import this module, and need no tree

    count = len(lows)
    num_adjoining = min(NUM_ADJOINING, count - 1)
    centres = (lows + highs) / 2
    apart, near = cKDTree(centres).query(centres, min(count, CANDIDATES + 1))
    apart = np.reshape(apart, (count, -1))
    near = np.reshape(near, (count, -1))
    own = np.arange(count)[:, None]
    between = np.maximum(lows[near] - highs[own], lows[own] - highs[near])
    gaps = np.square(np.maximum(between, 0)).sum(axis=2)
    gaps[near == own] = np.inf
    order = np.lexsort((near, apart, gaps))[:, :num_adjoining]
    return np.sort(np.take_along_axis(near, order, 1), axis=1).astype(np.int32)
