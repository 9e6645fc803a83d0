"""Fit a Calibration on held-out queries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_expit

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import FEATURES, Calibration, NoneModel
from s4g_ray.gallery.fitting.held_out import HeldOut

NUM_OFFSETS = 16
NOMINAL = (0.5, 0.9)  # shares of true positions that the radii hold
FEWEST_QUERIES = 20  # on which something can be fitted at all
RIDGE = 0.02  # on the weights of the logistic model, whose features have unit variance
LIKELY_SIDE_SHARE = 0.38  # mean distance of a uniform point in a square from its centre
# of the limit on queries from inside that are not located: the other half differs by chance
CAUTION = 0.7


def fit(
    inside: HeldOut,
    outside: HeldOut,
    *,
    num_candidates: int,
    region: Floats64,
    default_size_m: float,
    turns: int = 1,
    outside_share: float = 0.1,
    max_false_none: float = 0.1,
) -> Calibration:
    """Fit a calibration on queries from inside and outside the gallery.

    region[S, 2]: lat, lon of a sample of the gallery's tiles. outside_share: of the queries to
    come, expected before looking; it moves probabilities, not which queries are located.
    max_false_none: the largest share of queries from inside that are not located. Raises InputError
    for fewer than FEWEST_QUERIES of either.
    """
    for name, queries in (("inside", inside), ("outside", outside)):
        if len(queries) < FEWEST_QUERIES:
            raise InputError(
                f"{len(queries)} queries from {name} the gallery are too few to fit on; give at"
                f" least {2 * FEWEST_QUERIES}, half of which are fitted on"
            )
    mean = inside.queries.mean(axis=0)
    mean /= max(float(np.linalg.norm(mean)), 1e-12)
    nothing = NoneModel(
        (0.0,) * len(FEATURES), (0.0,) * len(FEATURES), (1.0,) * len(FEATURES), 0, 0
    )
    calibration = Calibration(
        temperature=1.0,
        rest_logit=0.0,
        none=nothing,
        offsets=_fit_offsets(inside, default_size_m),
        levels=NOMINAL,
        num_candidates=num_candidates,
        turns=turns,
        default_size_m=default_size_m,
        outside_share=outside_share,
        mean_query=tuple(mean.tolist()),
        region=tuple((float(lat), float(lon)) for lat, lon in region),
    )
    calibration = _fit_shares(calibration, inside)
    calibration = _fit_none(calibration, inside, outside, max_false_none)
    return _fit_levels(calibration, inside)


def _fit_shares(calibration: Calibration, inside: HeldOut) -> Calibration:
    """Fit temperature and weight of the rest: the likelihood of the right candidates."""
    right = inside.right()
    rows = np.arange(len(right))

    def with_parameters(values: Floats64) -> Calibration:
        return replace(
            calibration,
            temperature=float(np.exp(values[0])),
            rest_logit=float(values[1]),
        )

    def loss(values: Floats64) -> float:
        shares, rest = with_parameters(values).shares(inside.scores)
        likelihood = np.where(right >= 0, shares[rows, np.maximum(right, 0)], rest)
        prior = 1e-3 * float(values[1] ** 2)  # without a query beyond its list, it has no limit
        return float(-np.log(np.maximum(likelihood, 1e-12)).mean()) + prior

    spread = float(np.std(inside.scores[np.isfinite(inside.scores)]))
    start = np.array([np.log(max(spread / 2, 1e-4)), 1.0])
    found = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-6})
    return with_parameters(found.x)


def _fit_none(
    calibration: Calibration, inside: HeldOut, outside: HeldOut, max_false_none: float
) -> Calibration:
    """Fit the logistic model of lying outside, both kinds of queries weighing the same."""
    own = calibration.features(inside.scores, inside.queries)
    others = calibration.features(outside.scores, outside.queries)
    both = np.concatenate([own, others])
    center = both.mean(axis=0)
    scale = np.maximum(both.std(axis=0), 1e-6)
    model = NoneModel(
        (0.0,) * len(FEATURES), tuple(center.tolist()), tuple(scale.tolist()), 0.0, 0.0
    )
    labels = np.repeat([-1.0, 1.0], [len(own), len(others)])
    weights = np.repeat([0.5 / len(own), 0.5 / len(others)], [len(own), len(others)])

    def with_parameters(values: Floats64) -> NoneModel:
        return replace(model, weights=tuple(values[:-1].tolist()), bias=float(values[-1]))

    def loss(values: Floats64) -> float:
        odds = with_parameters(values).log_odds(both)
        ridge = RIDGE / 2 * float((values[:-1] ** 2).sum())
        return float(-(weights * log_expit(labels * odds)).sum()) + ridge

    found = minimize(loss, np.zeros(len(FEATURES) + 1), method="L-BFGS-B")
    model = with_parameters(found.x)
    prior = np.log(calibration.outside_share / (1 - calibration.outside_share))
    model = replace(model, bias=model.bias + float(prior))
    threshold = _choose_threshold(model.log_odds(own), model.log_odds(others), max_false_none)
    return replace(calibration, none=replace(model, threshold=threshold))


def _choose_threshold(own: Floats64, others: Floats64, max_false_none: float) -> float:
    """Choose the log-odds above which a query is not located.

    As many from outside as possible are found while at most max_false_none of those from inside
    are; halfway, where there is room between both.
    """
    least = float(np.quantile(own, 1 - CAUTION * max_false_none))
    most = float(np.quantile(others, 0.05))
    return max(least, (least + most) / 2)


def _fit_levels(calibration: Calibration, inside: HeldOut) -> Calibration:
    """Fit the levels of mass at which the radii hold their nominal shares of true positions."""
    held = np.array(mass_at_truth(calibration, inside))
    if len(held) < FEWEST_QUERIES:
        return calibration
    low, high = (
        float(np.quantile(held, min(nominal * (1 + 1 / len(held)), 1.0))) for nominal in NOMINAL
    )
    return replace(calibration, levels=(low, max(low, high)))


def mass_at_truth(calibration: Calibration, queries: HeldOut) -> list[float]:
    """Compute the probability within the distance of each located query's true position."""
    odds = calibration.none.log_odds(calibration.features(queries.scores, queries.queries))
    shares, rest = calibration.shares(queries.scores)
    found = []
    for row in range(len(queries)):
        if odds[row] > calibration.none.threshold or not np.isfinite(queries.true_lat[row]):
            continue
        mass = calibration.ground_mass(
            shares[row], float(rest[row]), queries.lat[row], queries.lon[row], queries.size_m[row]
        )
        if mass is not None:
            found.append(
                mass.level_at(mass.distance_to(queries.true_lat[row], queries.true_lon[row]))
            )
    return found


def _fit_offsets(inside: HeldOut, default_size_m: float) -> tuple[float, ...]:
    """Fit how far true positions lie from the centres of right tiles, in tile sides."""
    right: Ints = inside.right()
    rows = np.flatnonzero(right >= 0)
    size = inside.size_m[rows, right[rows]]
    away = inside.distances()[rows, right[rows]] / np.where(np.isfinite(size), size, default_size_m)
    away = away[np.isfinite(away)]
    levels = (np.arange(NUM_OFFSETS) + 0.5) / NUM_OFFSETS
    if len(away) < FEWEST_QUERIES:  # as of points that are uniform in a square
        return tuple((np.sqrt(levels) * LIKELY_SIDE_SHARE * 1.5).tolist())
    return tuple(np.quantile(away, levels).tolist())
