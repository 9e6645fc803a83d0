"""Measure a training step against a bare loop, two ranks against one, and what a checkpoint costs.

    python -m benchmarks.training [--model convnext_atto] [--size 128] [--pairs 64]

All kinds of steps take turns in one process. Checkpoints are measured beside running steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.published.training import PublishedStep
from benchmarks.support.record import Cell, apart, record
from s4g_ray.config.training_schema import ModelConfig, TrainConfig
from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.encoder.checkpoint import publish_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.checkpoint_writer import CheckpointWriter
from s4g_ray.training.loss import symmetric_info_nce
from s4g_ray.training.step import TrainingStep

ROUNDS = 12
THREADS = 2
CPU = torch.device("cpu")
Shape = tuple[str, int, int]  # encoder, side in pixels, pairs
Step = Callable[[], object]


def make_encoder(model: str) -> Encoder:
    """Build the same encoder each time."""
    return Encoder.build(ModelConfig(name=model, pretrained=False)).train()


def make_batch(pairs: int, size: int) -> PairBatch:
    """Make a batch of noise."""
    torch.manual_seed(0)
    queries, references = torch.randint(0, 256, (2, pairs, 3, size, size), dtype=torch.uint8)
    valid = torch.ones(pairs, dtype=torch.bool)
    return PairBatch(0, np.arange(pairs), queries, references, valid, ())


def bare_step(encoder: Encoder, optimizer: torch.optim.Optimizer, batch: PairBatch) -> None:
    """Run encoder, loss and optimiser, and nothing else."""
    optimizer.zero_grad(set_to_none=True)
    queries, references, scale = encoder(batch.queries, batch.references)
    loss = symmetric_info_nce(queries, references, scale, label_smoothing=0.1, valid=batch.valid)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def make_steps(shape: Shape) -> dict[str, Step]:
    """Return the kinds of steps that take turns."""
    model, size, pairs = shape
    batch = make_batch(pairs, size)
    bare = make_encoder(model)
    adamw = torch.optim.AdamW(bare.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    ours = TrainingStep(
        make_encoder(model), Numerics(), TrainConfig(batch_size=pairs, num_workers=1), CPU
    )
    published = PublishedStep(make_encoder(model), CPU, half=False)
    return {
        "bare": partial(bare_step, bare, adamw, batch),
        "ours": partial(ours.step, batch, seed=0, position=20.0),
        "published": partial(published.step, batch.queries, batch.references),
    }


def time_in_turns(shape: Shape) -> dict[str, float]:
    """Return the median seconds of each kind of step; the order changes from round to round."""
    torch.set_num_threads(THREADS)
    steps = make_steps(shape)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            steps[name]()
            if number:  # the first one allocates
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_rank(rank: int, folder: str, shape: Shape) -> None:
    """Time the steps of one of two ranks, one thread each, against a bare DDP loop in turns."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model, size, pairs = shape
    batch = make_batch(pairs // 2, size)
    ours = TrainingStep(
        make_encoder(model), Numerics(), TrainConfig(batch_size=pairs, num_workers=2), CPU
    )
    bare = torch.nn.parallel.DistributedDataParallel(make_encoder(model), broadcast_buffers=False)
    adamw = torch.optim.AdamW(bare.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(ROUNDS + 1):
        for name in ("bare", "ours") if number % 2 else ("ours", "bare"):
            began = time.perf_counter()
            if name == "ours":
                ours.step(batch, seed=0, position=20.0)
            else:
                bare_step(bare, adamw, batch)  # type: ignore[arg-type]
            if number:
                seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        torch.save({name: statistics.median(v) for name, v in seconds.items()}, f"{folder}/times")
    dist.destroy_process_group()


def time_ranks(shape: Shape) -> dict[str, float]:
    """Return the median seconds of a step of two ranks, bare and ours."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(time_rank, args=(folder, shape), nprocs=2)  # type: ignore[no-untyped-call]
        times: dict[str, float] = torch.load(f"{folder}/times", weights_only=True)
        return times


def time_checkpoints(model: str) -> tuple[float, float, float]:
    """Return seconds of publishing in the loop, and of the loop and the thread of our writer."""
    torch.set_num_threads(THREADS)
    step = TrainingStep(make_encoder(model), Numerics(), TrainConfig(num_workers=1), CPU)
    step.step(make_batch(2, 64), seed=0, position=1.0)
    inline, loop, thread = [], [], []
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter() as writer:

        def publish(state: dict[str, dict[str, Any]]) -> None:
            uri = f"{folder}/step=0001"
            publish_checkpoint(uri, state["weights"], state["state"], dim=1, epoch=0, step=1)

        for _ in range(4):
            state = {"weights": step.weights(), "state": step.state()}
            began = time.perf_counter()
            publish(state)
            inline.append(time.perf_counter() - began)
            began = time.perf_counter()
            writer.submit(state, publish)
            loop.append(time.perf_counter() - began)
            writer.wait()
            thread.append(time.perf_counter() - began)
    return statistics.median(inline), statistics.median(loop[1:]), statistics.median(thread)


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="convnext_atto")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--checkpoint-model", default="convnext_base")
    arguments = parser.parse_args()
    shape = arguments.model, arguments.size, arguments.pairs
    one = apart(time_in_turns, shape)
    two = time_ranks(shape)
    inline_s, loop_s, thread_s = apart(time_checkpoints, arguments.checkpoint_model)
    rows: list[list[Cell]] = []
    for name, seconds in one.items():
        rows.append(
            [f"step of one process, {name}", f"{seconds:.3f} s", f"{seconds / one['bare']:.3f}"]
        )
    for name, seconds in two.items():
        rows.append(
            [f"step of two ranks, {name}", f"{seconds:.3f} s", f"{seconds / two['bare']:.3f}"]
        )
    rows.append(["checkpoint published by the loop", f"{inline_s:.2f} s", "1.000"])
    rows.append(
        ["what the loop pays with the thread", f"{loop_s:.2f} s", f"{loop_s / inline_s:.3f}"]
    )
    rows.append(["until it is published", f"{thread_s:.2f} s", f"{thread_s / inline_s:.3f}"])
    record(
        "training",
        title="A training step and a checkpoint",
        text=(
            "a step of this project (finite check, clipping, random draws by key, chunks) against a"
            " bare loop of the same encoder, loss and fused AdamW, and against the published form"
            f" (its AdamW is not fused); medians of {ROUNDS} rounds in which all take turns. Two"
            " ranks share the machine, one thread each, over gloo. A checkpoint holds"
            f" {arguments.checkpoint_model} with its optimiser's state: the step loop pays for a"
            " copy, a thread serialises and writes it."
        ),
        command="python -m benchmarks.training",
        columns=["what", "time", "ratio"],
        rows=rows,
        config={
            "model": arguments.model,
            "size": arguments.size,
            "pairs": arguments.pairs,
            "threads": THREADS,
        },
        order=79,
    )


if __name__ == "__main__":
    main()
