"""Make held-out queries whose candidates are right with probabilities that are known."""

from __future__ import annotations

import numpy as np

from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.gallery.fitting.held_out import HeldOut

SIZE_M = 100.0
DIM = 16


def make_queries(
    count: int,
    *,
    temperature: float = 0.05,
    num_candidates: int = 20,
    rest_logit: float = 2.0,
    lift: float = 0.0,
    unusual: float = 0.0,
    is_inside: bool = True,
    seed: int = 0,
) -> HeldOut:
    """Draw scores, and the right candidate by a softmax of them with a temperature.

    rest_logit: log weight of all other tiles beside the last candidate. Truths are uniform in the
    right tile's square. lift: added to all scores. unusual: added to one value of the embeddings.
    """
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.normal(0.3 + lift, 0.1, (count, num_candidates)), axis=1)
    weights = np.exp((scores - scores[:, :1]) / temperature)
    weights = np.concatenate([weights, weights[:, -1:] * np.exp(rest_logit)], axis=1)
    cumulative = weights.cumsum(axis=1) / weights.sum(axis=1, keepdims=True)
    drawn = (rng.random((count, 1)) > cumulative).sum(axis=1)
    is_elsewhere = drawn >= num_candidates
    right = np.minimum(drawn, num_candidates - 1)
    lat = rng.uniform(-0.2, 0.2, (count, num_candidates))
    lon = rng.uniform(10.0, 10.4, (count, num_candidates))
    rows = np.arange(count)
    offset = rng.uniform(-0.5, 0.5, (count, 2)) * SIZE_M / METRES_A_DEGREE
    true_lat = np.where(
        is_elsewhere, rng.uniform(-0.2, 0.2, count), lat[rows, right] + offset[:, 0]
    )
    true_lon = np.where(is_elsewhere, rng.uniform(10, 10.4, count), lon[rows, right] + offset[:, 1])
    queries = rng.normal(0, 1, (count, DIM))
    queries[:, 0] += unusual
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return HeldOut(
        ids=np.arange(count * num_candidates).reshape(count, -1),
        scores=scores.astype(np.float32),
        lat=lat,
        lon=lon,
        size_m=np.full(lat.shape, SIZE_M),
        queries=queries.astype(np.float32),
        true_lat=true_lat if is_inside else np.full(count, np.nan),
        true_lon=true_lon if is_inside else np.full(count, np.nan),
        true_ids=np.full(count, -1),
        places=rows,
        rows=rows,
    )


def sample_ground(count: int = 300) -> np.ndarray:
    """Points of the ground that all tiles lie on, lat and lon [count, 2]."""
    rng = np.random.default_rng(9)
    return np.stack([rng.uniform(-0.2, 0.2, count), rng.uniform(10.0, 10.4, count)], axis=1)
