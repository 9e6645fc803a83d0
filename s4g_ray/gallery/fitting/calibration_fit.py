"""Fit a Calibration on held-out queries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.errors import InputError
from s4g_ray.gallery.calibration import Calibration
from s4g_ray.gallery.fitting.held_out import HeldOut, deal_folds
from s4g_ray.gallery.fitting.none_fit import UNFITTED, fit_none
from s4g_ray.gallery.fitting.typical_queries import SHRINKAGES, find_typicality

NUM_OFFSETS = 16
NOMINAL = (0.5, 0.9)  # shares of true positions that the radii hold
FEWEST_QUERIES = 20  # on which something can be fitted at all
LIKELY_SIDE_SHARE = 0.38  # mean distance of a uniform point in a square from its centre
NUM_FOLDS = 5  # by which the levels of the radii are found
# on the log of the temperature, about that of the scores' spread: scores that say nothing would
# let it grow without limit
PRIOR = 1e-3


@dataclass(frozen=True)
class _Settings:
    """What a fit takes beside the queries; see fit."""

    num_candidates: int
    region: Floats64
    default_size_m: float
    turns: int
    outside_share: float
    max_false_none: float


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
    settings = _Settings(
        num_candidates, region, default_size_m, turns, outside_share, max_false_none
    )
    calibration, shrinkage = _fit_model(inside, outside, settings, SHRINKAGES)
    held = _cross_fitted_mass(inside, outside, settings, shrinkage)
    return replace(calibration, levels=_choose_levels(held))


def _fit_model(
    inside: HeldOut, outside: HeldOut, settings: _Settings, shrinkages: tuple[float, ...]
) -> tuple[Calibration, float]:
    """Fit all but the levels -> the calibration, and the shrinkage that was chosen."""
    typicality = find_typicality(inside, outside, shrinkages)
    calibration = Calibration(
        temperature=1.0,
        rest_logit=0.0,
        none=UNFITTED,
        offsets=_fit_offsets(inside, settings.default_size_m),
        levels=NOMINAL,
        num_candidates=settings.num_candidates,
        turns=settings.turns,
        default_size_m=settings.default_size_m,
        outside_share=settings.outside_share,
        typical_query=tuple(typicality.direction.tolist()),
        region=tuple((float(lat), float(lon)) for lat, lon in settings.region),
    )
    calibration = _fit_shares(calibration, inside)
    none = fit_none(calibration, inside, outside, typicality, settings.max_false_none)
    return replace(calibration, none=none), typicality.shrinkage


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


def _cross_fitted_mass(
    inside: HeldOut, outside: HeldOut, settings: _Settings, shrinkage: float
) -> list[float]:
    """Compute the mass at the truth of each located query, by a model fitted without it.

    A model's own queries lie nearer to its answers than others do: radii that are chosen on them
    would hold too few.
    """
    fold = deal_folds(inside.places, NUM_FOLDS)
    other_fold = deal_folds(outside.places, NUM_FOLDS)
    held: list[float] = []
    for number in range(NUM_FOLDS):
        is_kept = fold != number
        is_other_kept = other_fold != number
        if not (is_kept.any() and (~is_kept).any() and is_other_kept.any()):
            continue
        model, _ = _fit_model(
            inside.take(is_kept), outside.take(is_other_kept), settings, (shrinkage,)
        )
        held.extend(mass_at_truth(model, inside.take(~is_kept)))
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
