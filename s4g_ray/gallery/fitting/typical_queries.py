"""Find the direction in which usual queries differ from those that come from outside."""

from __future__ import annotations

import numpy as np

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.gallery.fitting.held_out import HeldOut

NUM_FOLDS = 5
# of the mean variance, added to each: the held-out error of 1,280 dimensions and 900 queries is
# least between 1 and 5
SHRINKAGE = 2.5


def find_direction(inside: HeldOut, outside: HeldOut) -> Floats64:
    """Find the direction[D] that tells queries[M, D] from inside and outside apart.

    Fisher's linear discriminant with a shrunk covariance (Friedman 1989). It is 0 where both are
    the same queries, with their true tiles left out of the candidates: nothing tells them apart.
    """
    everything = np.ones(len(inside), bool)
    others = np.ones(len(outside), bool)
    return _discriminant(inside, outside, everything, others)[0]


def cross_fitted_typicality(inside: HeldOut, outside: HeldOut) -> tuple[Floats64, Floats64]:
    """Project queries on a direction that was found without them -> values of inside, outside.

    A direction tells the queries that it was found on apart better than others, so that a model
    fitted on their values would trust it too much.
    """
    direction, middle = _discriminant(
        inside, outside, np.ones(len(inside), bool), np.ones(len(outside), bool)
    )
    own = np.zeros(len(inside))
    others = np.zeros(len(outside))
    own_fold = _folds(inside)
    other_fold = _folds(outside)
    for fold in range(NUM_FOLDS):
        found, between = _discriminant(inside, outside, own_fold != fold, other_fold != fold)
        shift = float(direction @ middle - found @ between)
        own[own_fold == fold] = inside.queries[own_fold == fold] @ found + shift
        others[other_fold == fold] = outside.queries[other_fold == fold] @ found + shift
    return own, others


def _folds(queries: HeldOut) -> Floats64:
    """Deal queries to folds by their places."""
    number = np.unique(queries.places, return_inverse=True)[1]
    folds: Floats64 = np.random.default_rng(1).permutation(number.max() + 1)[number] % NUM_FOLDS
    return folds


def _discriminant(
    inside: HeldOut, outside: HeldOut, own: Bools, others: Bools
) -> tuple[Floats64, Floats64]:
    """Return the direction[D] towards usual queries, and the point[D] halfway."""
    usual = inside.queries[own].astype(np.float64)
    unusual = outside.queries[others].astype(np.float64)
    dim = usual.shape[1]
    if np.array_equal(inside.queries, outside.queries) or not len(usual) or not len(unusual):
        return np.zeros(dim), np.zeros(dim)
    centre, other_centre = usual.mean(axis=0), unusual.mean(axis=0)
    usual -= centre
    unusual -= other_centre
    covariance = (usual.T @ usual / len(usual) + unusual.T @ unusual / len(unusual)) / 2
    ridge = SHRINKAGE * float(np.trace(covariance)) / dim + 1e-9
    direction = np.linalg.solve(covariance + ridge * np.eye(dim), centre - other_centre)
    return direction, (centre + other_centre) / 2
