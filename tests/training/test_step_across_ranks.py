"""Steps of two and three ranks against a step of one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.spawn import spawn

from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.encoder.precision import Numerics, Precision
from s4g_ray.training.step import TrainingStep
from tests.support.step_batches import (
    BATCHES,
    CPU,
    SEED,
    Gradients,
    assert_close,
    config,
    encoder,
    gradients,
    oracle,
    overflow,
    soft_labels_for,
)


def share(batch: PairBatch, rank: int, world: int) -> PairBatch:
    """Return a rank's slots of a global batch; slots that remain after the last pair are empty."""

    def part(rows: Any) -> Any:
        num_slots = -(-len(rows) // world)
        rows = torch.as_tensor(rows)
        empty = torch.zeros(num_slots * world - len(rows), *rows.shape[1:], dtype=rows.dtype)
        return torch.cat([rows, empty])[rank * num_slots : (rank + 1) * num_slots]

    own = replace(
        batch,
        query_ids=part(batch.query_ids).numpy(),
        queries=part(batch.queries),
        references=part(batch.references),
        valid=part(batch.valid),
    )
    if batch.gallery is None:
        return own
    own = replace(own, gallery=part(batch.gallery), gallery_valid=part(batch.gallery_valid))
    if batch.ground is None:
        return own
    return replace(own, ground=part(batch.ground), gallery_ground=part(batch.gallery_ground))


@dataclass(frozen=True)
class Case:
    """The settings of a step of several ranks."""

    batch: str
    micro: int | None
    precision: Precision = "fp32"
    overflows: bool = False  # the gradients of all ranks but the first; all must skip the step
    compression: str = "none"


def rank_main(rank: int, world: int, folder: str, cases: Sequence[Case]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    found = [rank_step(case, share(BATCHES[case.batch](), rank, world)) for case in cases]
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def rank_step(case: Case, batch: PairBatch) -> tuple[float, Gradients, int, bool]:
    """Return loss, gradient, how many numbers ranks reduced, and whether the step was skipped."""
    dtype = torch.float64 if case.precision == "fp32" else torch.float32
    training_step = TrainingStep(
        encoder(dtype=dtype),
        Numerics(case.precision),
        config(
            case.micro,
            gradient_compression=case.compression,
            soft_labels=soft_labels_for(batch),
        ),
        CPU,
    )
    assert isinstance(training_step.model, torch.nn.parallel.DistributedDataParallel)
    reduced: list[int] = []

    def count(bucket: Any) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    if case.compression == "none":  # one hook is possible
        training_step.model.register_comm_hook(None, lambda _, bucket: count(bucket))
    if case.overflows and dist.get_rank():
        overflow(training_step.encoder)
    result = training_step.step(batch, seed=SEED, position=0.5)
    skipped = bool(result.is_skipped)
    return result.loss.item(), gradients(training_step.encoder), sum(reduced), skipped


Found = dict[Case, list[tuple[float, Gradients, int, bool]]]


def run_ranks(world: int, folder: Path, cases: Sequence[Case]) -> Found:
    """Run the cases on several ranks; return the results of each rank by case."""
    spawn(rank_main, args=(world, str(folder), cases), nprocs=world)  # type: ignore[no-untyped-call]
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    return {case: [found[i] for found in ranks] for i, case in enumerate(cases)}


TWO = [Case(name, micro) for name in BATCHES for micro in (None, 3)]
PRECISIONS: list[Precision] = ["fp32", "bf16", "fp16"]
OVERFLOW = [Case("gallery", micro, name, True) for micro in (None, 3) for name in PRECISIONS]
COMPRESSED = [Case("pairs", micro, compression="bf16") for micro in (None, 3)]
THREE = [Case(name, micro) for name in ("pairs", "masks") for micro in (None, 2)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_ranks(2, tmp_path_factory.mktemp("two"), [*TWO, *OVERFLOW, *COMPRESSED])


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_ranks(3, tmp_path_factory.mktemp("three"), THREE)


def assert_same_as_one_process(found: Found, case: Case) -> None:
    wanted = oracle(encoder(), BATCHES[case.batch]())
    mean = float(np.mean([loss for loss, *_ in found[case]]))
    for _, gradient, *_ in found[case]:
        assert_close((mean, gradient), wanted)


@pytest.mark.parametrize("case", TWO)
def test_two_ranks_have_the_loss_and_the_gradient_of_one_process(
    two_ranks: Found, case: Case
) -> None:
    assert_same_as_one_process(two_ranks, case)


@pytest.mark.parametrize("case", THREE)
def test_ranks_with_an_empty_slot_have_the_loss_and_the_gradient_of_one_process(
    three_ranks: Found, case: Case
) -> None:
    """8 pairs over 3 ranks: 3 slots each, one of them empty; 2 gallery references: 1 slot each."""
    assert not share(BATCHES[case.batch](), 2, 3).valid.all()
    assert_same_as_one_process(three_ranks, case)


@pytest.mark.parametrize("case", TWO)
def test_each_gradient_is_reduced_over_ranks_once_a_step(two_ranks: Found, case: Case) -> None:
    parameters = sum(p.numel() for p in encoder().parameters())
    assert [reduced for *_, reduced, _ in two_ranks[case]] == [parameters, parameters]


@pytest.mark.parametrize("case", OVERFLOW)
def test_all_ranks_skip_a_step_that_overflows_on_one(two_ranks: Found, case: Case) -> None:
    assert [skipped for *_, skipped in two_ranks[case]] == [True, True]


@pytest.mark.parametrize("case", COMPRESSED)
def test_gradients_sent_in_bf16_come_close_and_are_the_same_on_all_ranks(
    two_ranks: Found, case: Case
) -> None:
    _, wanted = oracle(encoder(), BATCHES[case.batch]())
    (_, first, *_), (_, second, *_) = two_ranks[case]
    differs = False
    for name, gradient in wanted.items():
        assert torch.equal(first[name], second[name])
        error = (first[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 0.02, name
        differs = differs or bool(error > 1e-4)
    assert differs
