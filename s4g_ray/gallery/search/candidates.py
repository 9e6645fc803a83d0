"""Join the candidates of turned views, and those of overlapping cells on the ground."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Floats32, Floats64, Ints
from s4g_ray.data.sphere import EARTH_RADIUS_M, unit_sphere
from s4g_ray.gallery.store.tiles import Tiles

# cells nearer than this share of a tile's side show the same place. Half a tile, and a little more:
# neighbors that overlap by half lie exactly half a tile apart, or a rounding off it
MERGED_SHARE = 0.55


@dataclass(frozen=True)
class Found:
    """The best tiles of M photos, best first: ids, scores and turns [M, k].

    ids: -1 beyond the last one, with a score of -inf. turns: number of the view that found it.
    """

    ids: Ints
    scores: Floats32
    turns: Ints


def join_turns(ids: Ints, scores: Floats32, k: int) -> Found:
    """Join the answers ids, scores [M, T, k'] of T views: each tile once, by its best view."""
    num_photos, _, depth = ids.shape
    flat_ids = ids.reshape(num_photos, -1)
    flat_scores = scores.reshape(num_photos, -1)
    if ids.shape[1] == 1:
        return Found(flat_ids[:, :k], flat_scores[:, :k], np.zeros_like(flat_ids[:, :k]))
    order = np.argsort(-flat_scores, axis=1, kind="stable")
    by_score = np.take_along_axis(flat_ids, order, axis=1)
    by_id = np.argsort(by_score, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(by_score, by_id, axis=1)
    repeats = np.zeros(flat_ids.shape, bool)
    repeats[:, 1:] = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    is_repeat = np.zeros_like(repeats)
    np.put_along_axis(is_repeat, by_id, repeats, axis=1)
    is_repeat |= by_score < 0
    first = np.argsort(is_repeat, axis=1, kind="stable")[:, :k]  # keeps the order by score
    is_empty = np.take_along_axis(is_repeat, first, axis=1)
    chosen = np.take_along_axis(order, first, axis=1)
    return Found(
        np.where(is_empty, -1, np.take_along_axis(flat_ids, chosen, axis=1)),
        np.where(is_empty, -np.inf, np.take_along_axis(flat_scores, chosen, axis=1)),
        chosen // depth,
    )


def find_cells(found: Found, tiles: Tiles) -> tuple[Floats64, Floats64, Floats64]:
    """Return lat, lon and size_m [M, k] of the tiles that were found; NaN beyond the last one."""
    is_found = found.ids >= 0
    rows = np.zeros(found.ids.shape, np.int64)
    rows[is_found] = tiles.rows(found.ids[is_found])
    lat, lon, size_m = (
        np.where(is_found, np.asarray(column, np.float64)[rows], np.nan)
        for column in (tiles.lat, tiles.lon, tiles.size_m)
    )
    return lat, lon, size_m


def group_cells(found: Found, lat: Floats64, lon: Floats64, size_m: Floats64, top: int) -> Ints:
    """Group candidates that show the same ground -> group[M, k], 0 the best, -1 in none.

    Greedy by score: the best tile that is in no group begins one, with all others whose centres lie
    within MERGED_SHARE of the smaller side; up to `top` groups. lat, lon, size_m [M, k]: a tile of
    which one is unknown is a group of its own.
    """
    xyz = unit_sphere(lat, lon)
    group = np.full(found.ids.shape, -1, np.int64)
    is_free = found.ids >= 0
    rows = np.arange(len(xyz))
    with np.errstate(invalid="ignore"):  # of unknown coordinates
        for number in range(top):
            if not is_free.any():
                break
            best = np.argmax(is_free, axis=1)
            away_m = np.linalg.norm(xyz - xyz[rows, best][:, None], axis=2) * EARTH_RADIUS_M
            reach_m = MERGED_SHARE * np.minimum(size_m, size_m[rows, best][:, None])
            joined = is_free & (away_m < reach_m)
            joined[rows, best] = is_free[rows, best]
            group[joined] = number
            is_free &= ~joined
    return group


def list_groups(group: Ints) -> list[list[int]]:
    """Return the numbers of the cells of each group of one photo, group[k], the best first."""
    groups: list[list[int]] = [[] for _ in range(int(group.max(initial=-1)) + 1)]
    for cell, number in enumerate(group.tolist()):
        if number >= 0:
            groups[number].append(cell)
    return groups


def best_positions(
    found: Found, lat: Floats64, lon: Floats64, group: Ints
) -> tuple[Floats64, Floats64]:
    """Return lat, lon [M]: the mean of the best group's cells, weighted by how they stand out.

    A cell's weight is its score above the lowest that was found. NaN where a coordinate is unknown.
    """
    scores = found.scores.astype(np.float64)
    lowest = np.min(scores, axis=1, where=np.isfinite(scores), initial=np.inf)
    is_best = group == 0
    weights = np.subtract(scores, lowest[:, None], where=is_best, out=np.zeros_like(scores))
    is_flat = ~(weights.sum(axis=1) > 0)
    weights[is_flat] = is_best[is_flat]
    xyz = np.where(is_best[..., None], unit_sphere(lat, lon), 0.0)
    x, y, z = np.einsum("mk,mkd->dm", weights, xyz)
    return np.degrees(np.arctan2(z, np.hypot(x, y))), np.degrees(np.arctan2(y, x))
