"""Targets shared among tiles of common ground, against loops over pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.loss import share_targets, symmetric_info_nce
from s4g_ray.training.step import TrainingStep
from tests.support.step_batches import CPU, config, draw_ground, encoder, make_batch

PAIRS = 6
EXTRAS = 4
SCALE = 9.0


def common_share(a: list[float], b: list[float]) -> float:
    """Return the intersection of two squares over their union, on a plane."""
    east = (b[1] - a[1]) * METRES_A_DEGREE * math.cos(math.radians((a[0] + b[0]) / 2))
    north = (b[0] - a[0]) * METRES_A_DEGREE
    sides = []
    for offset in (east, north):
        low = max(-a[2] / 2, offset - b[2] / 2)
        high = min(a[2] / 2, offset + b[2] / 2)
        sides.append(max(high - low, 0.0))
    common = sides[0] * sides[1]
    return common / (a[2] ** 2 + b[2] ** 2 - common)


def weight(query: list[float], own: list[float], tile: list[float], least: float) -> float:
    found = common_share(query, tile)
    if found == 0 or found < least:
        return 0.0
    at_home = common_share(query, own)
    return 0.7 * min(1.0, found / at_home if at_home else 1.0)


def oracle(
    rows: tuple[Tensor, Tensor, Tensor],
    ground: list[list[float]],
    gallery: list[list[float]],
    keep: list[int],
    keep_extras: list[int],
    smoothing: float,
    least: float,
) -> float:
    """Compute the loss in loops over the kept pairs and extra references."""
    q, r, extra = (F.normalize(part).numpy() for part in rows)
    total = 0.0
    for i in keep:
        targets = {
            ("pair", j): weight(ground[i][:3], ground[i][3:], ground[j][3:], least) for j in keep
        }
        targets |= {
            ("extra", j): weight(ground[i][:3], ground[i][3:], gallery[j], least)
            for j in keep_extras
        }
        targets["pair", i] = 1.0
        logits = {
            (kind, j): SCALE * float(q[i] @ (r if kind == "pair" else extra)[j])
            for kind, j in targets
        }
        total += cross_entropy(logits, targets, smoothing)
        columns = {j: weight(ground[j][:3], ground[j][3:], ground[i][3:], least) for j in keep}
        columns[i] = 1.0
        scores = {j: SCALE * float(r[i] @ q[j]) for j in keep}
        total += cross_entropy(scores, columns, smoothing)
    return total / (2 * len(keep))


def cross_entropy(logits: dict, targets: dict, smoothing: float) -> float:  # type: ignore[type-arg]
    log_sum = math.log(sum(math.exp(value) for value in logits.values()))
    whole = sum(targets.values())
    loss = 0.0
    for key, value in logits.items():
        share = (1 - smoothing) * targets[key] / whole + smoothing / len(logits)
        loss += share * (log_sum - value)
    return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("keep", [list(range(PAIRS)), [0, 2, 3, 5]])
@pytest.mark.parametrize(("keep_extras", "least"), [([0, 1, 2, 3], 0.0), ([1, 3], 0.2)])
def test_the_loss_of_shared_targets_equals_that_computed_in_loops(
    smoothing: float, keep: list[int], keep_extras: list[int], least: float
) -> None:
    torch.manual_seed(0)
    rows = (
        torch.randn(PAIRS, 5, dtype=torch.float64),
        torch.randn(PAIRS, 5, dtype=torch.float64),
        torch.randn(EXTRAS, 5, dtype=torch.float64),
    )
    ground, gallery = draw_ground(PAIRS, EXTRAS)
    shared = share_targets(ground, gallery, strength=0.7, min_share=least)
    valid = torch.tensor([i in keep for i in range(PAIRS)])
    loss = symmetric_info_nce(
        rows[0],
        rows[1],
        torch.tensor(SCALE),
        label_smoothing=smoothing,
        valid=valid,
        extra_references=rows[2],
        extra_valid=torch.tensor([i in keep_extras for i in range(EXTRAS)]),
        shared=shared,
    )
    wanted = oracle(rows, ground.tolist(), gallery.tolist(), keep, keep_extras, smoothing, least)
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    alone = symmetric_info_nce(rows[0], rows[1], torch.tensor(SCALE), valid=valid)
    assert abs(loss.item() - alone.item()) > 1e-3


def test_without_common_ground_the_loss_is_that_of_one_tile_a_query() -> None:
    torch.manual_seed(0)
    queries = torch.randn(4, 5, dtype=torch.float64)
    references = torch.randn(4, 5, dtype=torch.float64)
    apart = torch.arange(4, dtype=torch.float64)[:, None].expand(4, 2)
    square = torch.cat([apart, torch.full((4, 1), 60.0)], dim=1)
    ground = torch.cat([square, square], dim=1).double()
    ground[3] = math.nan  # an empty slot
    shared = share_targets(ground, None, strength=1.0, min_share=0.0)
    assert torch.equal(shared.queries, torch.diag(torch.tensor([1.0, 1, 1, 0])).double())
    losses = [
        symmetric_info_nce(queries, references, torch.tensor(SCALE), shared=targets).item()
        for targets in (None, shared)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_soft_labels_without_the_ground_of_a_batch_are_an_error() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=r"soft_labels=0.5, but batch 7 carries no squares"):
        TrainingStep(encoder(), Numerics(), config(soft_labels=0.5), CPU).step(
            batch, seed=0, position=0.0
        )


def test_a_tile_that_shows_more_of_a_query_than_its_own_counts_no_more_than_its_own() -> None:
    half = 30 / METRES_A_DEGREE
    ground = torch.tensor(
        # the first query lies on the border of its tile and in the middle of the second's; the
        # third lies off its tile
        [
            [half, 0, 60, 0, 0, 60],
            [half, 0, 60, half, 0, 60],
            [half, 0, 60, 9, 9, 60],
        ],
        dtype=torch.float64,
    )
    shared = share_targets(ground, None, strength=0.5, min_share=0.1)
    wanted = [[0.5, 0.5, 0], [0.5 / 3, 0.5, 0], [0.5, 0.5, 0]]
    np.testing.assert_allclose(shared.queries, wanted, rtol=1e-6)
    np.testing.assert_allclose(shared.references, np.transpose(wanted), rtol=1e-6)
