"""Assess a calibration on queries that it was not fitted on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.data.sphere import metres_between
from s4g_ray.gallery.calibration import Calibration, Judgement
from s4g_ray.gallery.fitting.held_out import HeldOut
from s4g_ray.gallery.fitting.sampling_errors import (
    resampled_error,
    share_interval,
    standard_error,
)

NUM_BINS = 10


@dataclass(frozen=True)
class Assessment:
    """Errors of a calibration on held-out queries from inside and outside the gallery.

    ece, brier: over both kinds, those from outside weighing as calibrated (outside_share). Shares
    lie in 0..1. coverage and radii: of located queries from inside; None when no position is known.
    reliability: for each bin of the ECE the means `confidence` and `accuracy`, weighed as there,
    and the number of `queries`. An `error` is a standard error, an `interval` one of 95 %: by how
    much these figures may differ from those of all queries of the kind, as queries of the same
    place are alike.
    """

    num_inside: int
    num_outside: int
    num_located: int  # of queries from inside; the others get no answer
    recall_at_1: float  # of queries from inside, whether located or not
    ece: float  # expected calibration error of the best candidate's probability
    ece_error: float
    reliability: tuple[dict[str, float], ...]
    brier: float  # of all candidates, the rest and `none`: 0..2
    brier_error: float
    share_located: float  # of queries from inside
    recall_at_1_located: float
    none_inside: float
    none_inside_interval: tuple[float, float]
    none_outside: float
    none_outside_interval: tuple[float, float]
    num_covered: int  # located queries from inside with a known position: those of the coverage
    coverage_50: float | None
    coverage_50_interval: tuple[float, float] | None
    coverage_90: float | None
    coverage_90_interval: tuple[float, float] | None
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
    confidences = np.concatenate([confidence, other_confidence])
    hits = np.concatenate([is_right, np.zeros(len(others), bool)])
    # places of queries from outside have numbers of their own
    places = np.concatenate([_number(inside.places), -1 - _number(outside.places)])
    brier = np.concatenate(
        [
            [_brier(j, int(r), is_inside=True) for j, r in zip(judged, right, strict=True)],
            [_brier(j, -1, is_inside=False) for j in others],
        ]
    )
    is_none = ~located
    is_other_none = np.array([not j.is_located for j in others])
    return Assessment(
        num_inside=len(judged),
        num_outside=len(others),
        num_located=int(located.sum()),
        recall_at_1=float(is_right.mean()),
        ece=expected_calibration_error(confidences, hits, weights),
        ece_error=resampled_error(
            lambda times: expected_calibration_error(confidences, hits, weights * times), places
        ),
        reliability=reliability_bins(confidences, hits, weights),
        brier=float((weights * brier).sum()),
        brier_error=float(
            np.hypot(
                (1 - share) * standard_error(brier[: len(judged)], inside.places),
                share * standard_error(brier[len(judged) :], outside.places),
            )
        ),
        share_located=float(located.mean()),
        recall_at_1_located=float(is_right[located].mean()) if located.any() else 0.0,
        none_inside=float(is_none.mean()),
        none_inside_interval=share_interval(is_none, inside.places),
        none_outside=float(is_other_none.mean()),
        none_outside_interval=share_interval(is_other_none, outside.places),
        **_cover(judged, inside),
    )


def _number(places: Ints) -> Ints:
    """Number places from 0."""
    return np.asarray(np.unique(places, return_inverse=True)[1], np.int64)


def expected_calibration_error(
    confidence: Floats64, is_right: Bools, weights: Floats64 | None = None
) -> float:
    """Compute the expected calibration error over NUM_BINS bins of like weight (Guo et al. 2017).

    confidence[M] in 0..1, is_right[M], weights[M] -> mean gap between confidence and accuracy.
    """
    weight = np.ones(len(confidence)) if weights is None else weights
    gaps = np.bincount(
        _bin(confidence, weight), weight * (confidence - is_right), minlength=NUM_BINS
    )
    return float(np.abs(gaps).sum() / weight.sum())


def reliability_bins(
    confidence: Floats64, is_right: Bools, weights: Floats64
) -> tuple[dict[str, float], ...]:
    """Return the points of a reliability diagram, over the bins of expected_calibration_error."""
    bins = _bin(confidence, weights)
    points = []
    for number in np.unique(bins):
        rows = bins == number
        means = [
            float(np.average(values[rows], weights=weights[rows]))
            for values in (confidence, is_right)
        ]
        point = {"confidence": means[0], "accuracy": means[1], "queries": int(rows.sum())}
        points.append(point)
    return tuple(points)


def _bin(confidence: Floats64, weight: Floats64) -> Ints:
    """Return the bin of each confidence[M]: NUM_BINS bins of like weight."""
    number = np.unique(confidence, return_inverse=True)[1]
    ends = np.cumsum(np.bincount(number, weight)) / weight.sum()
    # equal values share a bin
    bins = np.minimum((ends * NUM_BINS * (1 - 1e-12)).astype(np.int64), NUM_BINS - 1)
    return np.asarray(bins[number])


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


def _cover(judged: list[Judgement], inside: HeldOut) -> dict[str, Any]:
    """Compute the shares of true positions within the radii, their intervals, and medians."""
    rows = np.array(
        [i for i, j in enumerate(judged) if j.lat is not None and np.isfinite(inside.true_lat[i])],
        np.int64,
    )
    if not len(rows):
        names = [
            name for name in Assessment.__dataclass_fields__ if name.startswith(("cov", "med"))
        ]
        return {"num_covered": 0, **dict.fromkeys(names)}
    columns = [
        (judged[i].lat, judged[i].lon, judged[i].radius_50_m, judged[i].radius_90_m) for i in rows
    ]
    lat, lon, small, large = np.array(columns, np.float64).T
    error = metres_between(lat, lon, inside.true_lat[rows], inside.true_lon[rows])
    places = inside.places[rows]
    return {
        "num_covered": len(rows),
        "coverage_50": float((error <= small).mean()),
        "coverage_50_interval": share_interval(error <= small, places),
        "coverage_90": float((error <= large).mean()),
        "coverage_90_interval": share_interval(error <= large, places),
        "median_radius_50_m": float(np.median(small)),
        "median_radius_90_m": float(np.median(large)),
        "median_error_m": float(np.median(error)),
    }
