"""Batches of protocol=paper against the published rule, written as a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.published.comparison import compose
from benchmarks.published.geography import nearest
from benchmarks.published.tiny_cvusa import draw_positions
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.sampling.sampler import PLAN_STREAM, plan_batches


def fill_in_order(order: list[int], neighbors: list[list[int]], batch_size: int) -> list[list[int]]:
    """Fill batches from places in their order, each followed by its neighbors; all in one pass."""
    used: set[int] = set()
    batches = []
    batch: list[int] = []
    for place in order:
        if place in used:
            continue
        for joining in [place, *neighbors[place]]:
            if joining not in used and len(batch) < batch_size:
                batch.append(joining)
                used.add(joining)
        if len(batch) == batch_size:
            batches.append(batch)
            batch = []
    return batches


@pytest.mark.parametrize("seed", range(4))
def test_batches_keep_the_order_in_which_they_are_built(seed: int) -> None:
    """With two hard negatives of a pool of two nothing but the order of the places is drawn."""
    places = np.arange(230)
    lat, lon = draw_positions(230, seed)
    neighbors = nearest(lat, lon, 2)
    pairs = PairTable(places, places, places)
    found = plan_batches(
        pairs,
        NeighborGraph(places, neighbors),
        batch_size=16,
        num_hard_negatives=2,
        neighbor_pool_size=2,
        seed=seed,
        epoch=3,
        protocol="paper",
    )
    order = np.arange(230, dtype=np.int32)
    np.random.default_rng((seed, 3, PLAN_STREAM)).shuffle(order)
    wanted = fill_in_order(order.tolist(), neighbors.tolist(), 16)
    assert found.batches.tolist() == wanted
    assert found.stats.num_left_out == 230 - 16 * len(wanted)


def test_batches_are_composed_as_by_the_published_form() -> None:
    """Both draw by themselves, so statistics are compared: six standard errors at most."""
    lat, lon = draw_positions(1500)
    neighbors = dict(enumerate(nearest(lat, lon, 32).tolist()))
    published, here = compose(neighbors, 6, (32, 16, 32))
    for field in ("neighbors", "in_first_tenth", "in_last_tenth", "share_left_out"):
        values = np.array([[getattr(found, field) for found in form] for form in (published, here)])
        error = np.sqrt((values.var(axis=1, ddof=1) / values.shape[1]).sum())
        assert abs(values[0].mean() - values[1].mean()) < 6 * error + 1e-9, field
        assert values.mean() > 0
    assert published[0].in_first_tenth > 1.3 * published[0].in_last_tenth
