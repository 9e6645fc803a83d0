"""Fit the model that tells whether a query lies outside the gallery."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_expit

from s4g_ray.arrays import Bools, Floats64
from s4g_ray.gallery.calibration import FEATURES, Calibration, NoneModel
from s4g_ray.gallery.fitting.held_out import HeldOut
from s4g_ray.gallery.fitting.typical_queries import Typicality

RIDGE = 0.02  # on the weights of the logistic model, whose features have unit variance
# of the limit on queries from inside that are not located: the other half differs by chance
CAUTION = 0.7
UNFITTED = NoneModel(
    (0.0,) * len(FEATURES), (0.0,) * len(FEATURES), (1.0,) * len(FEATURES), 0.0, 0.0
)


def fit_none(
    calibration: Calibration,
    inside: HeldOut,
    outside: HeldOut,
    typicality: Typicality,
    max_false_none: float,
) -> tuple[NoneModel, Bools]:
    """Fit the logistic model of lying outside, both kinds of queries weighing the same.

    Returns it, and which queries from inside are located, their typicality being that of a
    direction that was found without them.
    """
    own = calibration.features(inside.scores, inside.queries)
    others = calibration.features(outside.scores, outside.queries)
    column = FEATURES.index("typicality")
    own[:, column] = typicality.inside
    others[:, column] = typicality.outside
    both = np.concatenate([own, others])
    center = both.mean(axis=0)
    scale = np.maximum(both.std(axis=0), 1e-6)
    model = replace(UNFITTED, center=tuple(center.tolist()), scale=tuple(scale.tolist()))
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
    return replace(model, threshold=threshold), model.log_odds(own) <= threshold


def _choose_threshold(own: Floats64, others: Floats64, max_false_none: float) -> float:
    """Choose the log-odds above which a query is not located.

    As many from outside as possible are found while at most max_false_none of those from inside
    are; halfway, where there is room between both.
    """
    least = float(np.quantile(own, 1 - CAUTION * max_false_none))
    most = float(np.quantile(others, 0.05))
    return max(least, (least + most) / 2)
