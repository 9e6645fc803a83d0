from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from s4g_ray.config import ModelConfig
from s4g_ray.encoder import Encoder
from s4g_ray.loss import symmetric_info_nce

BATCH, SIDE = 8, 32


def oracle(queries: Tensor, references: Tensor, scale: float, smoothing: float, keep: list[int]) -> float:
    """The loss written out as loops over kept pairs."""
    q = [(row / row.norm()).double().numpy() for row in queries]
    r = [(row / row.norm()).double().numpy() for row in references]
    total = 0.0
    for anchors, others in ((q, r), (r, q)):
        for i in keep:
            logits = {j: scale * float(anchors[i] @ others[j]) for j in keep}
            peak = max(logits.values())
            log_sum = peak + np.log(sum(np.exp(v - peak) for v in logits.values()))
            for j in keep:
                target = smoothing / len(keep) + (1 - smoothing) * (i == j)
                total += target * (log_sum - logits[j])
    return total / (2 * len(keep))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("keep", [list(range(6)), [0, 2, 3, 5]])
def test_the_loss_equals_written_out_cross_entropy(smoothing: float, keep: list[int]) -> None:
    torch.manual_seed(0)
    queries, references = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    valid = torch.tensor([i in keep for i in range(6)])
    loss = symmetric_info_nce(queries, references, torch.tensor(9.0), label_smoothing=smoothing, valid=valid)
    assert loss.item() == pytest.approx(oracle(queries, references, 9.0, smoothing, keep), rel=1e-12)


def test_all_valid_equals_torch_cross_entropy() -> None:
    torch.manual_seed(1)
    q, r = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    logits = 11.0 * torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(r).T
    ce = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    wanted = (ce(logits, torch.arange(7)) + ce(logits.T, torch.arange(7))) / 2
    assert symmetric_info_nce(q, r, torch.tensor(11.0), label_smoothing=0.1).item() == pytest.approx(wanted.item())


def test_no_valid_pair_gives_zero_and_shapes_are_checked() -> None:
    q = torch.randn(3, 4, requires_grad=True)
    loss = symmetric_info_nce(q, torch.randn(3, 4), torch.tensor(5.0), valid=torch.zeros(3, dtype=torch.bool))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert q.grad is not None
    assert q.grad.abs().max() == 0
    with pytest.raises(ValueError, match=r"are not both \[b, D\]"):
        symmetric_info_nce(torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor(5.0))


def encoder() -> Encoder:
    cfg = ModelConfig(name="test_convnext", pretrained=False)
    return Encoder.build(cfg, seed=5).double().train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (BATCH, 3, SIDE, SIDE)
    q, r = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(2))
    return q, r


def gradients(module: Encoder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def step(model: Any, rows: slice, smoothing: float, valid: Tensor) -> float:
    q, r = batch()
    eq, er, scale = model(q[rows], r[rows])
    loss = symmetric_info_nce(eq, er, scale, label_smoothing=smoothing, valid=valid[rows])
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.item())


def rank_main(rank: int, world: int, folder: str, smoothing: float, valid: Tensor) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = encoder()
    share = BATCH // world
    loss = step(DistributedDataParallel(model), slice(rank * share, (rank + 1) * share), smoothing, valid)
    torch.save({"loss": loss, "grad": gradients(model)}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("smoothing", "masked"), [(0.1, []), (0.1, [1, 6, 7])])
def test_two_gloo_ranks_have_the_loss_and_gradient_of_one_process(
    tmp_path: Path, smoothing: float, masked: list[int]
) -> None:
    valid = torch.tensor([i not in masked for i in range(BATCH)])
    single = encoder()
    loss = step(single, slice(0, BATCH), smoothing, valid)
    wanted = gradients(single)
    spawn(rank_main, args=(2, str(tmp_path), smoothing, valid), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert np.mean([rank["loss"] for rank in ranks]) == pytest.approx(loss, rel=1e-12)
    assert "logit_scale" in wanted
    assert len(wanted) == len(list(single.parameters()))
    for rank in ranks:
        assert rank["grad"].keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(rank["grad"][name], gradient, rtol=1e-9, atol=1e-14)
    assert wanted["logit_scale"].abs() > 1e-6
