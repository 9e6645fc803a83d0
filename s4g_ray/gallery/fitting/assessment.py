"""Assess a calibration on queries that it was not fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.data.sphere import metres_between
from s4g_ray.gallery.calibration import Calibration, Judgement
from s4g_ray.gallery.fitting.held_out import HeldOut

NUM_BINS = 10


@dataclass(frozen=True)
class Assessment:
    """Errors of a calibration on held-out queries from inside and outside the gallery.

    ece, brier: over both kinds, those from outside weighing as calibrated (outside_share). Shares
    lie in 0..1. coverage and radii: of located queries from inside; None when no position is known.
    """

    num_inside: int
    num_outside: int
    recall_at_1: float  # of queries from inside, whether located or not
    ece: float  # expected calibration error of the best candidate's probability
    brier: float  # of all candidates, the rest and `none`: 0..2
    share_located: float  # of queries from inside
    recall_at_1_located: float
    none_inside: float
    none_outside: float
    coverage_50: float | None
    coverage_90: float | None
    median_radius_50_m: float | None
    median_radius_90_m: float | None
    median_error_m: float | None


def assess(calibration: Calibration, inside: HeldOut, outside: HeldOut) -> Assessment:
    """Assess a calibration on M queries from inside the gallery and others from outside."""
    judged = _judge(calibration, inside)
    others = _judge(calibration, outside)
    right = inside.right()
    best = np.array([int(np.argmax(j.probabilities)) for j in judged])
    is_right = (right >= 0) & (best == right)
    located = np.array([j.is_located for j in judged])
    confidence = np.array([j.probabilities.max() for j in judged])
    other_confidence = np.array([j.probabilities.max() for j in others])
    share = calibration.outside_share
    weights = np.repeat(
        [(1 - share) / len(judged), share / len(others)], [len(judged), len(others)]
    )
    ece = expected_calibration_error(
        np.concatenate([confidence, other_confidence]),
        np.concatenate([is_right, np.zeros(len(others), bool)]),
        weights,
    )
    brier = np.concatenate(
        [
            [_brier(j, int(r), is_inside=True) for j, r in zip(judged, right, strict=True)],
            [_brier(j, -1, is_inside=False) for j in others],
        ]
    )
    coverage = _cover(judged, inside)
    return Assessment(
        num_inside=len(judged),
        num_outside=len(others),
        recall_at_1=float(is_right.mean()),
        ece=ece,
        brier=float((weights * brier).sum()),
        share_located=float(located.mean()),
        recall_at_1_located=float(is_right[located].mean()) if located.any() else 0.0,
        none_inside=float(1 - located.mean()),
        none_outside=float(np.mean([not j.is_located for j in others])),
        **coverage,
    )


def expected_calibration_error(
    confidence: Floats64, is_right: Bools, weights: Floats64 | None = None
) -> float:
    """Compute the expected calibration error over NUM_BINS bins of like weight (Guo et al. 2017).

    confidence[M] in 0..1, is_right[M], weights[M] -> mean gap between confidence and accuracy.
    """
    number = np.unique(confidence, return_inverse=True)[1]
    weight = np.ones(len(confidence)) if weights is None else weights
    ends = np.cumsum(np.bincount(number, weight)) / weight.sum()
    # equal values share a bin
    bins = np.minimum((ends * NUM_BINS * (1 - 1e-12)).astype(int), NUM_BINS - 1)[number]
    gaps = np.bincount(bins, weight * (confidence - is_right), minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / weight.sum())


def _judge(calibration: Calibration, queries: HeldOut) -> list[Judgement]:
    return calibration.judge(
        queries.scores, queries.lat, queries.lon, queries.size_m, queries.queries
    )


def _brier(judgement: Judgement, right: int, *, is_inside: bool) -> float:
    """Compute the squared error of all probabilities of one query."""
    told = np.concatenate(
        [
            judgement.probabilities,
            [judgement.rest_probability, judgement.none_probability],
        ]
    )
    truth = np.zeros(len(told))
    truth[right if right >= 0 else (-2 if is_inside else -1)] = 1.0
    return float(((told - truth) ** 2).sum())


def _cover(judged: list[Judgement], inside: HeldOut) -> dict[str, float | None]:
    """Compute the shares of true positions within the radii, and medians."""
    found = [
        (
            float(metres_between(j.lat, j.lon, inside.true_lat[i], inside.true_lon[i])),
            j.radius_50_m,
            j.radius_90_m,
        )
        for i, j in enumerate(judged)
        if j.lat is not None
        and j.lon is not None
        and j.radius_50_m is not None
        and np.isfinite(inside.true_lat[i])
    ]
    names = (
        "coverage_50",
        "coverage_90",
        "median_radius_50_m",
        "median_radius_90_m",
        "median_error_m",
    )
    if not found:
        return dict.fromkeys(names)
    error, small, large = np.array(found, np.float64).T
    values = (
        (error <= small).mean(),
        (error <= large).mean(),
        np.median(small),
        np.median(large),
        np.median(error),
    )
    return {name: float(value) for name, value in zip(names, values, strict=True)}
