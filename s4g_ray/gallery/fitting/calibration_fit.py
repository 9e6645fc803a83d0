"""Fit a Calibration on held-out queries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import minimize

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import Calibration
from s4g_ray.gallery.fitting.held_out import HeldOut, deal_folds
from s4g_ray.gallery.fitting.none_fit import UNFITTED, fit_none
from s4g_ray.gallery.fitting.typical_queries import find_typicality

NUM_OFFSETS = 16
NOMINAL = (0.5, 0.9)  # shares of true positions that the radii hold
FEWEST_QUERIES = 20  # on which something can be fitted at all
LIKELY_SIDE_SHARE = 0.38  # mean distance of a uniform point in a square from its centre
NUM_FOLDS = 5  # by which the levels of the radii are found
# on the log of the temperature, about that of the scores' spread: scores that say nothing would
# let it grow without limit
PRIOR = 1e-3


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
    typicality = find_typicality(inside, outside)
    calibration = Calibration(
        temperature=1.0,
        rest_logit=0.0,
        none=UNFITTED,
        offsets=_fit_offsets(inside, default_size_m),
        levels=NOMINAL,
        num_candidates=num_candidates,
        turns=turns,
        default_size_m=default_size_m,
        outside_share=outside_share,
        typical_query=tuple(typicality.direction.tolist()),
        region=tuple((float(lat), float(lon)) for lat, lon in region),
    )
    calibration = _fit_shares(calibration, inside)
    none, is_located = fit_none(calibration, inside, outside, typicality, max_false_none)
    levels = _choose_levels(cross_fitted_mass(calibration, inside.take(is_located)))
    return replace(calibration, none=none, levels=levels)


def _fit_shares(calibration: Calibration, inside: HeldOut) -> Calibration:
    """Fit temperature and weight of the rest: the likelihood of the right candidates."""
    right = inside.right()
    rows = np.arange(len(right))
    spread = float(np.std(inside.scores[np.isfinite(inside.scores)]))
    start = np.array([np.log(max(spread / 2, 1e-4)), 1.0])

    def with_parameters(values: Floats64) -> Calibration:
        return replace(
            calibration,
            temperature=float(np.exp(values[0])),
            rest_logit=float(values[1]),
        )

    def loss(values: Floats64) -> float:
        shares, rest = with_parameters(values).shares(inside.scores)
        likelihood = np.where(right >= 0, shares[rows, np.maximum(right, 0)], rest)
        prior = PRIOR * float((values[0] - start[0]) ** 2 + values[1] ** 2)
        return float(-np.log(np.maximum(likelihood, 1e-12)).mean()) + prior

    found = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-6})
    return with_parameters(found.x)


def cross_fitted_mass(calibration: Calibration, located: HeldOut) -> list[float]:
    """Compute the mass at the truth of each located query, by shares fitted without it.

    A model's own queries lie nearer to its answers than others do: radii that are chosen on them
    would hold too few.
    """
    fold = deal_folds(located.places, NUM_FOLDS)
    held: list[float] = []
    for number in range(NUM_FOLDS):
        others = located.take(fold != number)
        if not len(others):
            continue
        offsets = _fit_offsets(others, calibration.default_size_m)
        model = _fit_shares(replace(calibration, offsets=offsets), others)
        held.extend(mass_at_truth(model, located.take(fold == number)))
    return held


def _choose_levels(held: list[float]) -> tuple[float, float]:
    """Choose the levels of mass at which radii hold their nominal shares of true positions."""
    if len(held) < FEWEST_QUERIES // 2:
        return NOMINAL
    low, high = (
        float(np.quantile(held, min(nominal * (1 + 1 / len(held)), 1.0))) for nominal in NOMINAL
    )
    return low, max(low, high)


def mass_at_truth(calibration: Calibration, queries: HeldOut) -> list[float]:
    """Compute the probability within the distance of each query's true position, if known."""
    shares, rest = calibration.shares(queries.scores)
    found = []
    for row in np.flatnonzero(np.isfinite(queries.true_lat)):
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
