"""Measure training steps on a GPU: precision, compile, prefetch, waiting for losses, checkpoints.

    python -m benchmarks.gpu_step [--model convnext_base.fb_in22k_ft_in1k_384] [--pairs 64]

Runs on the CPU where there is no GPU, with smaller defaults. Needs torch and timm, no Ray and no
FAISS. Prints a table; records nothing, as the machine is that of whoever runs it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.config.training_schema import ModelConfig, TrainConfig
from s4g_ray.data.batches.pair_batch import PairBatch
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.checkpoint_writer import Snapshot
from s4g_ray.training.compilation import compile_encoder
from s4g_ray.training.metrics.instruments import count_batch_flops, peak_tflops
from s4g_ray.training.prefetch import DevicePrefetch
from s4g_ray.training.step import TrainingStep

WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """A way to run steps."""

    name: str
    numerics: Numerics
    tf32: bool = True
    compile: bool = False
    waits: bool = False  # for the loss of each step, as a loop does that logs it
    prefetches: bool = True
    micro_batch_size: int | None = None


def cases(pairs: int) -> list[Case]:
    """Return all cases, the recommended one first; each differs from it in one thing."""
    best = Case("bf16 channels_last, prefetch", Numerics("bf16", channels_last=True))
    return [
        best,
        replace(best, name="fp32 without TF32", numerics=Numerics("fp32", True), tf32=False),
        replace(best, name="fp32 with TF32", numerics=Numerics("fp32", True)),
        replace(best, name="fp16 with a gradient scaler", numerics=Numerics("fp16", True)),
        replace(best, name="without channels_last", numerics=Numerics("bf16", False)),
        replace(best, name="train.compile", compile=True),
        replace(best, name="waits for each loss", waits=True),
        replace(best, name="moves batches within the step", prefetches=False),
        replace(best, name="micro-batches of a half", micro_batch_size=pairs // 2),
    ]


class Bench:
    """Runs the cases on one device."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.steps = arguments.steps
        model = ModelConfig(name=arguments.model, pretrained=False)
        train = TrainConfig(batch_size=arguments.pairs, num_workers=1)
        size = (arguments.size, arguments.size)
        self.config = RunConfig.model_validate(
            {
                "run_dir": "unused",
                "data": {"uri": "unused", "query_size": size, "reference_size": size},
                "model": model,
                "train": train,
            }
        )

    def batches(self, count: int) -> Iterator[PairBatch]:
        """Yield batches of noise in memory of the host, as a loader does."""
        height, width = self.config.data.reference_size
        pairs = self.config.train.batch_size
        images = torch.randint(0, 256, (2, pairs, 3, height, width), dtype=torch.uint8)
        for number in range(count):
            valid = torch.ones(pairs, dtype=torch.bool)
            yield PairBatch(number, np.arange(pairs), images[0], images[1], valid, ())

    def run(self, case: Case) -> list[str]:
        """Run a case; return the cells of its row: step, pairs/s, TFLOP/s, MFU, memory."""
        train = self.config.train.model_copy(
            update={"tf32": case.tf32, "micro_batch_size": case.micro_batch_size}
        )
        encoder = Encoder.build(self.config.model)
        step = TrainingStep(encoder, case.numerics, train, self.device)
        flops = count_batch_flops(encoder, self.config, self.device)
        if case.compile:
            reason = compile_encoder(
                encoder, case.numerics, self.config.data, train.batch_size, self.device
            )
            if reason is not None:
                return [f"does not compile: {reason}"]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        moved = self._move(case)
        for _ in range(WARM_UP):
            step.step(next(moved), seed=0, position=20.0)
        self._wait()
        began = time.perf_counter()
        for batch in moved:
            result = step.step(batch, seed=0, position=20.0)
            if case.waits:
                result.loss.item()
        self._wait()
        seconds = (time.perf_counter() - began) / self.steps
        peak = peak_tflops(self.device, case.numerics.precision)
        tflops = flops / seconds / 1e12
        mfu = "unknown" if peak is None else f"{tflops / peak:.1%}"
        pairs = train.batch_size / seconds
        return [f"{seconds * 1e3:.1f} ms", f"{pairs:.0f}", f"{tflops:.2f}", mfu, self._memory()]

    def _move(self, case: Case) -> Iterator[PairBatch]:
        batches = self.batches(WARM_UP + self.steps)
        if case.prefetches:
            for batch, _ in DevicePrefetch(self.device)(batches):
                yield batch
        else:
            for batch in batches:
                yield batch.to(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _memory(self) -> str:
        if self.device.type != "cuda":
            return "-"
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"

    def time_snapshot(self) -> float:
        """Return the seconds that a checkpoint takes of the step loop: those of the copy."""
        step = TrainingStep(
            Encoder.build(self.config.model), Numerics(), self.config.train, self.device
        )
        step.step(next(self._move(Case("snapshot", Numerics()))), seed=0, position=20.0)
        snapshot = Snapshot()
        times = []
        for _ in range(4):
            self._wait()
            began = time.perf_counter()
            snapshot.copy({"weights": step.weights(), "state": step.state()})
            self._wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])


def main() -> None:
    """Run all cases and print the table."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    default = "convnext_base.fb_in22k_ft_in1k_384" if has_gpu else "convnext_atto"
    parser.add_argument("--model", default=default)
    parser.add_argument("--size", type=int, default=384 if has_gpu else 64)
    parser.add_argument("--pairs", type=int, default=64 if has_gpu else 16)
    parser.add_argument("--steps", type=int, default=20 if has_gpu else 5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if has_gpu else "cpu")
    name = torch.cuda.get_device_name() if has_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}; {vars(arguments)}")
    bench = Bench(arguments, device)
    print(f"{'case':32} {'step':>10} {'pairs/s':>9} {'TFLOP/s':>9} {'MFU':>8} {'memory':>9}")
    for case in cases(arguments.pairs):
        try:
            row = bench.run(case)
        except torch.OutOfMemoryError:
            row = ["out of memory"]
        step, *others = [*row, "", "", "", ""][:5]
        print(f"{case.name:32} {step:>10} " + " ".join(f"{cell:>9}" for cell in others), flush=True)
    print(f"checkpoint: {bench.time_snapshot():.3f} s of the step loop")


if __name__ == "__main__":
    main()
