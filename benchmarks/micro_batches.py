"""Measure a training step in one pass and in micro-batches (GradCache): memory, time, gradient.

    python -m benchmarks.micro_batches [--model convnext_atto] [--size 128] [--pairs 64]

Memory is measured on the first step of a separate process, time in one process in which all kinds
take turns.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.support.record import Cell, Meter, apart, record
from s4g_ray.config.training_schema import ModelConfig, TrainConfig
from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.step import TrainingStep

MICRO: tuple[int | None, ...] = (None, 32, 16, 8)
ROUNDS = 4
THREADS = 2
Shape = tuple[str, int, int]  # encoder, side in pixels, pairs


class Timed(NamedTuple):
    """Time, loss and gradient of a rank's steps."""

    seconds: float  # of the fastest step
    loss: float
    gradient: NDArray[np.float32]  # of all weights


class Case:
    """A rank and its batch, the same in each process."""

    def __init__(self, shape: Shape, micro: int | None) -> None:
        model, size, pairs = shape
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        self.train = TrainConfig(batch_size=pairs, num_workers=1, micro_batch_size=micro)
        encoder = Encoder.build(ModelConfig(name=model, pretrained=False))
        self.stepper = TrainingStep(encoder, Numerics(), self.train, torch.device("cpu"))
        queries, references = torch.randint(0, 256, (2, pairs, 3, size, size), dtype=torch.uint8)
        valid = torch.ones(pairs, dtype=torch.bool)
        self.batch = PairBatch(0, np.arange(pairs), queries, references, valid, ())

    def step(self) -> float:
        """Make a step and return its loss; the learning rate is 0, so that all steps are equal."""
        position = float(self.train.epochs)
        result = self.stepper.step(self.batch, seed=0, position=position)
        return result.loss.item()


def measure_memory_gb(shape: Shape, micro: int | None) -> float:
    """Measure the peak memory of a first step."""
    return Meter()(Case(shape, micro).step).extra_gb


def time_in_turns(shape: Shape) -> list[Timed]:
    """Measure the steps of all kinds, which take turns."""
    cases = [Case(shape, micro) for micro in MICRO]
    losses = [case.step() for case in cases]  # the first one allocates
    rounds = [[Meter()(case.step).seconds for case in cases] for _ in range(ROUNDS)]
    weights = [case.stepper.encoder.parameters() for case in cases]
    gradients = [
        torch.cat([p.grad.flatten() for p in own if p.grad is not None]).numpy() for own in weights
    ]
    fastest = np.min(rounds, axis=0).tolist()
    return [Timed(*measured) for measured in zip(fastest, losses, gradients, strict=True)]


def format_row(
    micro: int | None, gigabytes: float, found: Timed, plain_gb: float, plain: Timed
) -> list[Cell]:
    """Format a row of the table; plain is the step in one pass."""
    difference = np.linalg.norm(found.gradient - plain.gradient) / np.linalg.norm(plain.gradient)
    return [
        micro or "none",
        f"{gigabytes:.2f} GB",
        f"{gigabytes / plain_gb:.2f}",
        f"{found.seconds:.2f} s",
        f"{found.seconds / plain.seconds:.2f}",
        f"{abs(found.loss - plain.loss):.0e}",
        f"{difference:.0e}",
    ]


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="convnext_atto")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=64)
    arguments = parser.parse_args()
    shape = arguments.model, arguments.size, arguments.pairs
    memory = [apart(measure_memory_gb, shape, micro) for micro in MICRO]
    timed = apart(time_in_turns, shape)
    record(
        "micro_batches",
        title="A step in micro-batches",
        text=(
            "`train.micro_batch_size`, the pairs of a rank in one pass, against all of its pairs"
            " in one. Memory is the peak of the first step beyond the encoder and the images (the"
            f" gradients and the optimiser's state are in it); the time is the fastest of {ROUNDS}"
            " further steps, all kinds taking turns. Each chunk is embedded twice; where a"
            " backward pass costs two forward passes, that is 4/3 of the arithmetic. Gradients"
            " differ by rounding: the norm of the difference over all weights, relative."
        ),
        command="python -m benchmarks.micro_batches",
        columns=[
            "micro_batch_size",
            "memory",
            "memory / none's",
            "step",
            "step / none's",
            "loss differs by",
            "gradient by",
        ],
        rows=[
            format_row(*measured, memory[0], timed[0])
            for measured in zip(MICRO, memory, timed, strict=True)
        ],
        config={
            "encoder": arguments.model,
            "size": arguments.size,
            "pairs": arguments.pairs,
            "precision": "fp32",
            "threads": THREADS,
        },
        order=85,
    )


if __name__ == "__main__":
    main()
