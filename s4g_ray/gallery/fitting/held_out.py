"""Hold the candidates of queries whose true position is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from s4g_ray.arrays import Bools, Floats32, Floats64, Ints
from s4g_ray.data.sphere import METRES_A_DEGREE, metres_between, wrap_longitudes

APART_SIZES = 1.5  # tiles nearer to the truth, in their sides, are left out to simulate `outside`


@dataclass(frozen=True)
class HeldOut:
    """The k best candidates of M queries, and the truth.

    ids, scores, lat, lon, size_m [M, k]: -1, -inf and NaN for missing ones. queries[M, D]:
    embeddings. true_lat, true_lon [M]: NaN when unknown. true_ids[M]: a tile of the query's place;
    -1 when unknown. places[M]: queries of the same place stay in the same half. rows[M]: of the
    data set's query table.
    """

    ids: Ints
    scores: Floats32
    lat: Floats64
    lon: Floats64
    size_m: Floats64
    queries: Floats32
    true_lat: Floats64
    true_lon: Floats64
    true_ids: Ints
    places: Ints
    rows: Ints

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: Ints | Bools) -> HeldOut:
        """Return some of the queries."""
        return HeldOut(*(getattr(self, field.name)[rows] for field in fields(self)))

    def first(self, num_candidates: int) -> HeldOut:
        """Return the same queries with fewer candidates."""
        return self._with_candidates(np.tile(np.arange(num_candidates), (len(self), 1)))

    def _with_candidates(self, columns: Ints) -> HeldOut:
        per_candidate = ("ids", "scores", "lat", "lon", "size_m")
        return HeldOut(
            *(
                np.take_along_axis(getattr(self, field.name), columns, axis=1)
                if field.name in per_candidate
                else getattr(self, field.name)
                for field in fields(self)
            )
        )

    def distances(self) -> Floats64:
        """Compute metres [M, k] between candidates and truth; NaN when unknown."""
        return metres_between(self.lat, self.lon, self.true_lat[:, None], self.true_lon[:, None])

    def right(self) -> Ints:
        """Find the column of each query's right candidate -> [M]; -1 when it is not among them.

        It is the one whose square holds the truth nearest to its centre, in shares of its side;
        or else a candidate of the query's place.
        """
        with np.errstate(invalid="ignore"):
            holds = self._holds_truth()
            relative = np.where(holds, self.distances() / self.size_m, np.inf)
        nearest = np.argmin(relative, axis=1)
        is_found = np.isfinite(relative[np.arange(len(self)), nearest])
        is_place = (self.ids == self.true_ids[:, None]) & (self.true_ids[:, None] >= 0)
        by_place = np.where(is_place.any(axis=1), is_place.argmax(axis=1), -1)
        return np.where(is_found, nearest, by_place)

    def _holds_truth(self) -> Bools:
        """Return which candidates' squares hold the truth [M, k]."""
        north = (self.true_lat[:, None] - self.lat) * METRES_A_DEGREE
        turns = wrap_longitudes(self.true_lon[:, None] - self.lon)
        east = turns * METRES_A_DEGREE * np.cos(np.radians(self.lat))
        reach = np.maximum(np.abs(north), np.abs(east))
        return np.asarray(reach <= 0.505 * self.size_m)

    def without_truth(self, num_candidates: int) -> HeldOut:
        """Simulate queries from outside: leave out the true tile and its neighbors.

        Keeps the num_candidates best others.
        """
        with np.errstate(invalid="ignore"):
            is_near = self.distances() < APART_SIZES * self.size_m
        is_near |= self.ids == self.true_ids[:, None]
        order = np.argsort(is_near, axis=1, kind="stable")[:, :num_candidates]
        kept = self._with_candidates(order)
        is_left_out = np.take_along_axis(is_near, order, axis=1)
        scores = np.where(is_left_out, np.float32(-np.inf), kept.scores)
        return HeldOut(
            *(
                scores if field.name == "scores" else getattr(kept, field.name)
                for field in fields(kept)
            )
        )


def halves(places: Ints, seed: int = 0) -> tuple[Bools, Bools]:
    """Divide queries by their places at random -> is in the first, is in the second half."""
    names, number = np.unique(places, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    is_first = order[number] < len(names) // 2
    return is_first, ~is_first


def deal_folds(places: Ints, num_folds: int, seed: int = 1) -> Ints:
    """Deal queries to folds at random -> fold[M]; queries of a place share one."""
    number = np.unique(places, return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(int(number.max(initial=-1)) + 1)
    return np.asarray(order[number] % num_folds, np.int64)


def concatenate(parts: Sequence[HeldOut]) -> HeldOut:
    """Join queries with as many candidates each."""
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in HeldOut.__dataclass_fields__
    }
    return HeldOut(**columns)
