"""Compute how far a figure lies from the truth because of the queries that were drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import beta, norm

from s4g_ray.arrays import Bools, Floats64, Ints

LEVEL = 0.95
NUM_DRAWS = 100


def share_interval(hits: Bools, places: Ints, level: float = LEVEL) -> tuple[float, float]:
    """Compute the interval of a share: hits[M] of queries, of places[M] -> low, high in 0..1.

    Wilson's interval (1927), of as many queries as the independent ones among them are worth:
    those of the same place succeed and fail together (Kish 1965, design effect). Where all of them
    do, a place counts as one query.
    """
    count = len(hits)
    if not count:
        return 0.0, 1.0
    share = float(hits.mean())
    chance = share * (1 - share) / count
    if chance == 0:
        worth = float(len(np.unique(places)))
    else:
        worth = count / max(_variance_of_mean(hits.astype(np.float64), places) / chance, 1.0)
    z = float(norm.ppf((1 + level) / 2))
    middle = (share + z**2 / (2 * worth)) / (1 + z**2 / worth)
    reach = z / (1 + z**2 / worth) * np.sqrt(share * (1 - share) / worth + z**2 / (4 * worth**2))
    # without rounding errors about 0 and 1
    return min(max(float(middle - reach), 0.0), share), max(min(float(middle + reach), 1.0), share)


def upper_bound(count: int, total: int, level: float = LEVEL) -> float:
    """Compute the bound below which a share lies with probability `level` (Clopper-Pearson)."""
    return 1.0 if count >= total else float(beta.ppf(level, count + 1, total - count))


def standard_error(values: Floats64, places: Ints) -> float:
    """Compute the standard error of the mean of values[M], whose places[M] are independent."""
    return float(np.sqrt(_variance_of_mean(values, places)))


def resampled_error(statistic: Callable[[Floats64], float], places: Ints, seed: int = 0) -> float:
    """Compute the standard error of a statistic by drawing whole places again (Efron 1979).

    statistic: takes how often each of M queries was drawn. places[M]: numbers that queries from
    inside and from outside do not share.
    """
    number = np.unique(places, return_inverse=True)[1]
    num_places = int(number.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_places, np.full(num_places, 1 / num_places), NUM_DRAWS)
    return float(np.std([statistic(times[number].astype(np.float64)) for times in drawn], ddof=1))


def _variance_of_mean(values: Floats64, places: Ints) -> float:
    number = np.unique(places, return_inverse=True)[1]
    sums = np.bincount(number, values - values.mean())
    correction = len(sums) / max(len(sums) - 1, 1)
    return float((sums**2).sum() / len(values) ** 2 * correction)
