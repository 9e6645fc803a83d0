"""Measure how far queries lie from their tiles; refuse pairs that no list can mean.

Swapped coordinates and lost signs are recognized: with them, the queries lie near tiles.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.spatial import cKDTree

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.sphere import EARTH_RADIUS_M, chord_of, format_metres, unit_sphere
from s4g_ray.datasets.lists.image_lists import ImageList
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.errors import InputError

ALWAYS_NEAR_M = 1000.0  # never refused
SPACINGS = 10  # refused beyond so many times the distance between neighboring tiles
SAMPLE = 5000  # tiles whose neighbors are found, and far queries that are explained
NEIGHBORS = 8  # of a tile, of which some may have its own position
SAME_PLACE = 1e-9  # on the unit sphere: 6 mm
FAULTS: dict[str, Callable[[Floats64, Floats64], tuple[Floats64, Floats64]]] = {
    "latitude and longitude are swapped": lambda lat, lon: (lon, lat),
    "longitudes have the wrong sign (west is negative)": lambda lat, lon: (lat, -lon),
    "latitudes have the wrong sign (south is negative)": lambda lat, lon: (-lat, lon),
}


def report_distances(
    source_folder: SourceFolder,
    photos: ImageList,
    metres: Floats64,
    make_tree: Callable[[], cKDTree],
    max_distance_m: float | None,
) -> Bools:
    """Report metres[N] between photos and their tiles (NaN: unknown) -> which [N] are too far.

    make_tree: of the tiles, on the unit sphere; called when it is needed. Those beyond
    max_distance_m are too far. Without it, raises InputError where one is farther than
    ALWAYS_NEAR_M and than SPACINGS times the distance between neighboring tiles: the message names
    the farthest, and the likely reason.
    """
    far = np.zeros(len(metres), bool)
    if max_distance_m is not None:
        far = np.asarray(metres > max_distance_m)
    elif np.nanmax(metres) > ALWAYS_NEAR_M:
        tree = make_tree()
        limit = find_limit(tree)
        if (metres > limit).any():
            raise InputError(_describe_far(photos, metres, tree, limit))
    if far.any():
        source_folder.add_note(
            f"queries left out because no tile is within {max_distance_m:g} m: {int(far.sum()):,}"
        )
    measured = metres[np.isfinite(metres) & ~far]
    if len(measured):
        farthest = measured.max()
        median, most = np.percentile(measured, (50, 95), overwrite_input=True)
        source_folder.add_note(
            f"queries from their tiles: {format_metres(median)} (median), 95 % within"
            f" {format_metres(most)}, the farthest {format_metres(farthest)}"
        )
    return far


def find_limit(tree: cKDTree) -> float:
    """Return the metres beyond which a query is too far from its tile, by the tiles' spacing.

    tree: of the tiles, on the unit sphere.
    """
    points = tree.data[:: max(1, len(tree.data) // SAMPLE)]
    chords = tree.query(points, k=range(1, min(NEIGHBORS, len(tree.data)) + 1), workers=-1)[0]
    spacing = np.where(chords > SAME_PLACE, chords, np.inf).min(axis=1)
    known = spacing[np.isfinite(spacing)]
    if not len(known):
        return ALWAYS_NEAR_M
    metres = 2 * EARTH_RADIUS_M * float(np.arcsin(min(np.median(known) / 2, 1.0)))
    return max(ALWAYS_NEAR_M, SPACINGS * metres)


def _describe_far(photos: ImageList, metres: Floats64, tree: cKDTree, limit: float) -> str:
    rows = np.flatnonzero(metres > limit)
    farthest = int(rows[metres[rows].argmax()])
    path = photos.column("path")[farthest].as_py()
    reason = "the least limit"
    if limit > ALWAYS_NEAR_M:
        reason = f"{SPACINGS} times the distance between neighboring tiles"
    fault = explain_far(photos, rows, tree, limit) or "correct their positions, or the tiles'"
    # the likely reason is the end, where it is seen in a terminal
    return (
        f"{photos.locate(farthest)}: {path!r} is {format_metres(metres[farthest])} from its tile."
        f" Of {count_noun(len(photos), 'query', 'queries')}, {len(rows):,}"
        f" {'is' if len(rows) == 1 else 'are'} farther than {format_metres(limit)} ({reason});"
        f" --max-distance-m {np.ceil(limit):.0f} leaves them out, inf keeps all\n{fault}"
    )


def explain_far(photos: ImageList, rows: Ints, tree: cKDTree, limit: float) -> str:
    """Return the fault by which at least half of some photos would lie near tiles, or ""."""
    rows = rows[:: max(1, len(rows) // SAMPLE)]
    near_chord = chord_of(limit)
    for fault, correct in FAULTS.items():
        lat, lon = correct(photos.lat[rows], photos.lon[rows])
        valid = (np.abs(lat) <= 90) & (np.abs(lon) <= 180)
        chords = tree.query(unit_sphere(lat[valid], lon[valid]), workers=-1)[0]
        num_near = int(np.count_nonzero(chords <= near_chord))
        if num_near * 2 >= len(rows):
            return (
                f"read the other way, {num_near:,} of {len(rows):,} of them are near tiles: in one"
                f" of the two lists {fault}"
            )
    return ""
