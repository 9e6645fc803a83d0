"""Places along a curve that fills the sphere: S2's leaf cells (s2geometry.io), Hilbert curves on a cube's faces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.sphere import unit_sphere

LEVELS = 30  # a cell is about 1 cm wide
_SWAP, _INVERT = 1, 2  # how a square's curve lies against the face's axes
_POSITION = np.array(
    [[0, 1, 3, 2], [0, 3, 1, 2], [2, 3, 1, 0], [2, 1, 3, 0]], np.uint64
)  # of a quarter, by its 2 i + j
_TURN = np.array(
    [_SWAP, 0, 0, _INVERT | _SWAP], np.uint64
)  # of the curve within a quarter, by its position


def cell_ids(lat: Floats64, lon: Floats64) -> NDArray[np.uint64]:
    """lat[N], lon[N] in degrees -> the id of the S2 leaf cell of each: places that follow each other lie near."""
    face, u, v = _on_cube(unit_sphere(lat, lon))
    i, j = _cells(u), _cells(v)
    orientation = face & np.uint64(_SWAP)
    position = np.zeros(len(face), np.uint64)
    for level in range(LEVELS - 1, -1, -1):
        shift, one = np.uint64(level), np.uint64(1)
        quarter = (i >> shift & one) << one | j >> shift & one
        step = _POSITION[orientation, quarter]
        position = position << np.uint64(2) | step
        orientation ^= _TURN[step]
    return face << np.uint64(61) | position << np.uint64(1) | np.uint64(1)


def order_along_curve(ids: Ints, lat: Floats64, lon: Floats64) -> Ints:
    """ids[N], lat[N], lon[N] (NaN: unknown) -> row numbers along the curve, then those without coordinates, by id."""
    known = np.isfinite(lat)
    cells = np.full(len(ids), np.iinfo(np.uint64).max, np.uint64)
    cells[known] = cell_ids(lat[known], lon[known])
    return np.lexsort((ids, cells))


def _on_cube(xyz: Floats64) -> tuple[NDArray[np.uint64], Floats64, Floats64]:
    """xyz[N, 3] -> face[N], and where it meets that face of the cube, both in -1..1."""
    rows, axis = np.arange(len(xyz)), np.abs(xyz).argmax(axis=1)
    face = axis + 3 * (xyz[rows, axis] < 0)
    x, y, z = (xyz / xyz[rows, axis][:, None]).T
    # on the three faces behind, dividing by a negative number has turned both axes
    u = np.choose(face, [y, -x, -x, z, z, -y])
    v = np.choose(face, [z, z, -y, y, -x, -x])
    return face.astype(np.uint64), u, v


def _cells(side: Floats64) -> NDArray[np.uint64]:
    """-1..1 on a face -> 0..2^30 - 1, stretched so that cells are about equally large on the sphere."""
    root = 0.5 * np.sqrt(1 + 3 * np.abs(side))
    stretched = np.where(side >= 0, root, 1 - root)
    cells: NDArray[np.uint64] = np.clip(stretched * 2**LEVELS, 0, 2**LEVELS - 1).astype(np.uint64)
    return cells
