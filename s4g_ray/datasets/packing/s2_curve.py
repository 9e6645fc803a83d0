"""Order places along a curve that fills the sphere.

The curve is that of S2's leaf cells (s2geometry.io): Hilbert curves on the faces of a cube.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.sphere import unit_sphere

LEVELS = 30  # a cell is about 1 cm wide
# flags of an orientation: how the curve of a square is turned against the axes of its face
_SWAP = 1
_INVERT = 2
# [orientation, 2 i + j] -> the position of a quarter along the curve
_POSITION = np.array([[0, 1, 3, 2], [0, 3, 1, 2], [2, 3, 1, 0], [2, 1, 3, 0]], np.uint64)
# [position] -> the flags that change within a quarter
_TURN = np.array([_SWAP, 0, 0, _INVERT | _SWAP], np.uint64)


def cell_ids(lat: Floats64, lon: Floats64) -> NDArray[np.uint64]:
    """lat[N], lon[N] in degrees -> the id of each place's S2 leaf cell.

    Places whose ids follow each other are near each other.
    """
    face, u, v = _project_to_cube(unit_sphere(lat, lon))
    i = _to_cells(u)
    j = _to_cells(v)
    orientation = face & np.uint64(_SWAP)
    position = np.zeros(len(face), np.uint64)
    one = np.uint64(1)
    for level in range(LEVELS - 1, -1, -1):
        shift = np.uint64(level)
        quarter = (i >> shift & one) << one | j >> shift & one
        step = _POSITION[orientation, quarter]
        position = position << np.uint64(2) | step
        orientation ^= _TURN[step]
    return face << np.uint64(61) | position << one | one


def order_along_curve(ids: Ints, lat: Floats64, lon: Floats64) -> Ints:
    """ids[N], lat[N], lon[N] (NaN: unknown) -> row numbers in the order of the curve.

    Rows of one cell are in the order of their ids; rows without coordinates come last, by id.
    """
    known = np.isfinite(lat)
    cells = np.full(len(ids), np.iinfo(np.uint64).max, np.uint64)
    cells[known] = cell_ids(lat[known], lon[known])
    return np.lexsort((ids, cells))


def _project_to_cube(xyz: Floats64) -> tuple[NDArray[np.uint64], Floats64, Floats64]:
    """xyz[N, 3] -> face[N] of the cube, and the coordinates u[N], v[N] on it, both in -1..1."""
    rows = np.arange(len(xyz))
    axis = np.abs(xyz).argmax(axis=1)
    face = axis + 3 * (xyz[rows, axis] < 0)
    x, y, z = (xyz / xyz[rows, axis][:, None]).T
    # on the three faces behind, dividing by a negative number has turned both axes
    u = np.choose(face, [y, -x, -x, z, z, -y])
    v = np.choose(face, [z, z, -y, y, -x, -x])
    return face.astype(np.uint64), u, v


def _to_cells(side: Floats64) -> NDArray[np.uint64]:
    """Convert -1..1 on a face to 0..2^30 - 1; cells have about equal areas on the sphere."""
    root = 0.5 * np.sqrt(1 + 3 * np.abs(side))
    stretched = np.where(side >= 0, root, 1 - root)
    cells: NDArray[np.uint64] = np.clip(stretched * 2**LEVELS, 0, 2**LEVELS - 1).astype(np.uint64)
    return cells
