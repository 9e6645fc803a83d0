"""symmetric_info_nce against loops over pairs, and two ranks against one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.training.loss import symmetric_info_nce

BATCH = 8  # pairs of the global batch
EXTRAS = 6  # extra references of the global batch
SIDE = 32  # pixels


def unit_rows(rows: Tensor) -> list[NDArray[np.float64]]:
    return [(row / row.norm()).double().numpy() for row in rows]


def oracle(
    queries: Tensor,
    references: Tensor,
    scale: float,
    smoothing: float,
    keep: list[int],
    extras: Tensor | None = None,
) -> float:
    """Compute the loss in loops over kept pairs.

    Queries are compared with kept references and all extras, references with kept queries.
    """
    q = unit_rows(queries)
    r = unit_rows(references)
    columns_of_q: dict[Any, NDArray[np.float64]] = {j: r[j] for j in keep}
    columns_of_r: dict[Any, NDArray[np.float64]] = {j: q[j] for j in keep}
    if extras is not None:
        for j, row in enumerate(unit_rows(extras)):
            columns_of_q["extra", j] = row
    total = 0.0
    for anchors, others in ((q, columns_of_q), (r, columns_of_r)):
        for i in keep:
            logits = {j: scale * float(anchors[i] @ other) for j, other in others.items()}
            peak = max(logits.values())
            log_sum = peak + np.log(sum(np.exp(v - peak) for v in logits.values()))
            for j in others:
                target = smoothing / len(others) + (1 - smoothing) * (i == j)
                total += target * (log_sum - logits[j])
    return total / (2 * len(keep))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("keep", [list(range(6)), [0, 2, 3, 5]])
def test_the_loss_equals_cross_entropy_computed_in_loops(smoothing: float, keep: list[int]) -> None:
    torch.manual_seed(0)
    queries = torch.randn(6, 5, dtype=torch.float64)
    references = torch.randn(6, 5, dtype=torch.float64)
    valid = torch.tensor([i in keep for i in range(6)])
    loss = symmetric_info_nce(
        queries, references, torch.tensor(9.0), label_smoothing=smoothing, valid=valid
    )
    assert loss.item() == pytest.approx(
        oracle(queries, references, 9.0, smoothing, keep), rel=1e-12
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("keep", [list(range(6)), [0, 2, 3, 5]])
@pytest.mark.parametrize("keep_extras", [[0, 1, 2, 3], [1, 3], []])
def test_extra_references_are_negatives_of_queries_only(
    smoothing: float, keep: list[int], keep_extras: list[int]
) -> None:
    torch.manual_seed(0)
    queries = torch.randn(6, 5, dtype=torch.float64)
    references = torch.randn(6, 5, dtype=torch.float64)
    extras = 3 * torch.randn(4, 5, dtype=torch.float64)
    loss = symmetric_info_nce(
        queries,
        references,
        torch.tensor(9.0),
        label_smoothing=smoothing,
        valid=torch.tensor([i in keep for i in range(6)]),
        extra_references=extras,
        extra_valid=torch.tensor([i in keep_extras for i in range(4)]),
    )
    wanted = oracle(queries, references, 9.0, smoothing, keep, extras[keep_extras])
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert keep_extras == [] or wanted > oracle(queries, references, 9.0, smoothing, keep) + 1e-3


def test_all_valid_equals_torch_cross_entropy() -> None:
    torch.manual_seed(1)
    q = torch.randn(7, 4, dtype=torch.float64)
    r = torch.randn(7, 4, dtype=torch.float64)
    logits = 11.0 * torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(r).T
    ce = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    wanted = (ce(logits, torch.arange(7)) + ce(logits.T, torch.arange(7))) / 2
    loss = symmetric_info_nce(q, r, torch.tensor(11.0), label_smoothing=0.1)
    assert loss.item() == pytest.approx(wanted.item())


def test_no_valid_pair_gives_zero_and_shapes_are_checked() -> None:
    q = torch.randn(3, 4, requires_grad=True)
    loss = symmetric_info_nce(
        q, torch.randn(3, 4), torch.tensor(5.0), valid=torch.zeros(3, dtype=torch.bool)
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert q.grad is not None
    assert q.grad.abs().max() == 0
    with pytest.raises(ValueError, match=r"are not both \[b, D\]"):
        symmetric_info_nce(torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor(5.0))
    with pytest.raises(ValueError, match=r"extra_references\[2, 5\] is not \[e, 4\]"):
        symmetric_info_nce(q, q, torch.tensor(5.0), extra_references=torch.zeros(2, 5))


def encoder() -> Encoder:
    cfg = ModelConfig(name="test_convnext", pretrained=False)
    return Encoder.build(cfg, seed=5).double().train()


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def gradients(module: Encoder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@dataclass(frozen=True)
class Masks:
    """Which pairs and extra references of the global batch are valid; None: no extra references."""

    pairs: Tensor
    extras: Tensor | None


def step(model: Any, share: tuple[int, int], masks: Masks) -> float:
    """Run forward and backward on a share (rank, number of ranks) of the global batch."""
    rank, num_ranks = share
    pairs, extras = (
        slice(rank * num // num_ranks, (rank + 1) * num // num_ranks) for num in (BATCH, EXTRAS)
    )
    valid = masks.pairs[pairs]
    references = images(BATCH, 3)[pairs]
    if masks.extras is not None:
        references = torch.cat([references, images(EXTRAS, 4)[extras]])
    eq, er, scale = model(images(BATCH, 2)[pairs], references)
    loss = symmetric_info_nce(
        eq,
        er[: len(valid)],
        scale,
        label_smoothing=0.1,
        valid=valid,
        extra_references=None if masks.extras is None else er[len(valid) :],
        extra_valid=None if masks.extras is None else masks.extras[extras],
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.item())


def rank_main(rank: int, world: int, folder: str, cases: Sequence[Masks]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    found = []
    for masks in cases:
        model = encoder()
        loss = step(DistributedDataParallel(model), (rank, world), masks)
        found.append({"loss": loss, "grad": gradients(model)})
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def make_masks(masked: list[int], masked_extras: Sequence[int] | None) -> Masks:
    extras = None
    if masked_extras is not None:
        extras = torch.tensor([i not in masked_extras for i in range(EXTRAS)])
    return Masks(torch.tensor([i not in masked for i in range(BATCH)]), extras)


def test_two_gloo_ranks_have_the_loss_and_gradient_of_one_process(tmp_path: Path) -> None:
    cases = [make_masks([], None), make_masks([1, 6, 7], None), make_masks([1, 6, 7], [0, 2, 3])]
    spawn(rank_main, args=(2, str(tmp_path), cases), nprocs=2)  # type: ignore[no-untyped-call]
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for masks, *ranks in zip(cases, *found, strict=True):
        single = encoder()
        loss = step(single, (0, 1), masks)
        wanted = gradients(single)
        assert np.mean([rank["loss"] for rank in ranks]) == pytest.approx(loss, rel=1e-12)
        assert "logit_scale" in wanted
        assert len(wanted) == len(list(single.parameters()))
        for rank in ranks:
            assert rank["grad"].keys() == wanted.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(rank["grad"][name], gradient, rtol=1e-9, atol=1e-14)
        assert wanted["logit_scale"].abs() > 1e-6
