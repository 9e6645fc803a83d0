"""Find the direction in which usual queries differ from those that come from outside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_expit

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.gallery.fitting.held_out import HeldOut, deal_folds

NUM_FOLDS = 5
# of the mean variance, added to each; the one that tells held-out queries apart best is taken
SHRINKAGES = (0.5, 2.5, 12.0)


@dataclass(frozen=True)
class Typicality:
    """The direction[D] that tells queries from inside and outside apart, and values on it.

    inside[M], outside[N]: of the queries that it was found on, each by a direction that was found
    without it. A direction tells its own queries apart better than others, so that a model fitted
    on those values would trust it too much.
    """

    direction: Floats64
    inside: Floats64
    outside: Floats64
    shrinkage: float


def find_typicality(
    inside: HeldOut, outside: HeldOut, shrinkages: tuple[float, ...] = SHRINKAGES
) -> Typicality:
    """Find the direction that tells queries[M, D] from inside and outside apart.

    Fisher's linear discriminant with a shrunk covariance (Friedman 1989); the shrinkage has the
    best likelihood in cross-validation. The direction is 0, and says nothing, where both are the
    same queries, with their true tiles left out of the candidates: nothing tells them apart; and
    where either come from a single place: no other is left to find a direction without them.
    """
    is_same = np.array_equal(inside.queries, outside.queries)
    if is_same or _count_places(inside) < 2 or _count_places(outside) < 2:
        nothing = np.zeros(inside.queries.shape[1])
        return Typicality(nothing, np.zeros(len(inside)), np.zeros(len(outside)), shrinkages[0])
    found = [_cross_fit(inside, outside, shrinkage) for shrinkage in shrinkages]
    return min(found, key=_held_out_loss)


def _cross_fit(inside: HeldOut, outside: HeldOut, shrinkage: float) -> Typicality:
    """Find the direction on all queries, and the value of each by one found without it."""
    everything = np.ones(len(inside), bool)
    others = np.ones(len(outside), bool)
    direction, middle = _discriminant(inside, outside, everything, others, shrinkage)
    values = np.zeros(len(inside))
    other_values = np.zeros(len(outside))
    fold = deal_folds(inside.places, NUM_FOLDS)
    other_fold = deal_folds(outside.places, NUM_FOLDS)
    for number in range(NUM_FOLDS):
        kept = fold != number
        other_kept = other_fold != number
        found, between = _discriminant(inside, outside, kept, other_kept, shrinkage)
        shift = float(direction @ middle - found @ between)
        values[~kept] = inside.queries[~kept] @ found + shift
        other_values[~other_kept] = outside.queries[~other_kept] @ found + shift
    return Typicality(direction, values, other_values, shrinkage)


def _count_places(queries: HeldOut) -> int:
    return len(np.unique(queries.places))


def _held_out_loss(found: Typicality) -> float:
    """Compute the mean logistic loss of cross-fitted values, both kinds weighing the same."""
    middle = (found.inside.mean() + found.outside.mean()) / 2
    spread = max(float(np.concatenate([found.inside, found.outside]).std()), 1e-12)
    gap = (found.inside.mean() - found.outside.mean()) / spread
    # the slope of the log-odds between two normal distributions with their pooled variance
    pooled = (found.inside.var() + found.outside.var()) / 2 / spread**2
    slope = gap / max(float(pooled), 1e-6)
    own = log_expit(slope * (found.inside - middle) / spread).mean()
    others = log_expit(-slope * (found.outside - middle) / spread).mean()
    return -float(own + others) / 2


def _discriminant(
    inside: HeldOut, outside: HeldOut, own: Bools, others: Bools, shrinkage: float
) -> tuple[Floats64, Floats64]:
    """Return the direction[D] towards usual queries, and the point[D] halfway."""
    usual = inside.queries[own].astype(np.float64)
    unusual = outside.queries[others].astype(np.float64)
    dim = usual.shape[1]
    centre, other_centre = usual.mean(axis=0), unusual.mean(axis=0)
    usual -= centre
    unusual -= other_centre
    covariance = (usual.T @ usual / len(usual) + unusual.T @ unusual / len(unusual)) / 2
    ridge = shrinkage * float(np.trace(covariance)) / dim + 1e-9
    direction = np.linalg.solve(covariance + ridge * np.eye(dim), centre - other_centre)
    return direction, (centre + other_centre) / 2
