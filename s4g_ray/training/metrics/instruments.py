"""Measure a rank: time of its own passes, arithmetic against the device's peak, profiler traces."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.image_table import VIEWS
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.storage import files

# dense bf16 or fp16 products, in TFLOP/s, of the vendor's data sheets; by a part of the GPU's name
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "L4": 121.0,
    "V100": 125.0,
}
PASSES = 3  # a step's arithmetic in forward passes: the backward pass counts as two


class ForwardTimer:
    """Times an encoder's forward passes: the share of a step in which ranks do not wait.

    On CUDA by events, which are read when the sum is asked for.
    """

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._began: Any = None
        self._pairs: list[tuple[Any, Any]] = []
        encoder.register_forward_pre_hook(self._begin)
        encoder.register_forward_hook(self._end)

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _begin(self, *_: object) -> None:
        self._began = self._mark()

    def _end(self, *_: object) -> None:
        self._pairs.append((self._began, self._mark()))

    def take_seconds(self) -> float:
        """Return the seconds of the passes since the last call; the device has ended them."""
        total = 0.0
        for began, ended in self._pairs:
            total += began.elapsed_time(ended) / 1e3 if self._is_cuda else ended - began
        self._pairs.clear()
        return total


def find_slowest_rank(own_s: float, device: torch.device) -> dict[str, float]:
    """Return which rank spent the most seconds on its own images, how many, and the fewest.

    own_s: of this rank, for loading and forward passes. Called by all ranks.
    """
    seconds = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    seconds[dist.get_rank()] = own_s
    dist.all_reduce(seconds)
    slowest = int(seconds.argmax())
    return {
        "slowest_rank": slowest,
        "slowest_rank_s": float(seconds[slowest]),
        "fastest_rank_s": float(seconds.min()),
    }


def measure_gpu_memory(device: torch.device) -> dict[str, float]:
    """Return the most GPU memory in use on any rank since the last call; empty without CUDA."""
    if device.type != "cuda":
        return {}
    most = torch.tensor([torch.cuda.max_memory_allocated(device) / 1e9], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    torch.cuda.reset_peak_memory_stats(device)
    return {"gpu_memory_gb": float(most)}


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Return the device's peak TFLOP/s in a precision; None where it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    words = name.replace("-", " ").split()
    for part, peak in PEAK_TFLOPS.items():
        if set(part.split()) <= set(words):
            return peak
    return None


def describe_speed(flops_per_s: float, device: torch.device, precision: str) -> dict[str, float]:
    """Return a worker's TFLOP/s, and its share of the device's peak where that is known."""
    tflops = flops_per_s / 1e12
    peak = peak_tflops(device, precision)
    if peak is None:
        return {"tflops": tflops}
    return {"tflops": tflops, "mfu": tflops / peak}


def count_batch_flops(encoder: Encoder, config: RunConfig, device: torch.device) -> float:
    """Count the model's floating-point operations in a step on a whole batch.

    Those of the forward passes, times PASSES; a second forward pass (micro_batch_size,
    grad_checkpointing) is not counted.
    """
    training = encoder.training
    encoder.eval()
    num_pairs = config.train.batch_size
    total = 0.0
    for view in VIEWS:
        is_query = view == "queries"
        size = config.data.visible_query_size if is_query else config.data.reference_size
        images = torch.zeros(1, 3, *size, dtype=torch.uint8, device=device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder.embed(images, view)
        count = num_pairs if is_query else num_pairs + config.sampling.gallery_negatives
        total += PASSES * count * counter.get_total_flops()
    encoder.train(training)
    return total


class StepProfiler:
    """Records train.profile_steps with torch's profiler: `profiles/` in the run's folder."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self._steps = config.train.profile_steps
        self._folder = files.join(config.run_dir, "profiles")
        self._rank = rank
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Start recording before the first of the steps; step: 1, 2, ... of the run."""
        if self._steps is None or step != self._steps[0]:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def after_step(self, step: int) -> None:
        """Write the trace after the last of the steps, for chrome://tracing or Perfetto."""
        if self._steps is not None and step >= self._steps[1]:
            self.write()

    def write(self) -> None:
        """Write the trace of the steps so far, if some were recorded."""
        if self._profile is None or self._steps is None:
            return
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(trace))
            name = f"steps={self._steps[0]}-{self._steps[1]}-rank={self._rank}.json"
            files.write_bytes(files.join(self._folder, name), trace.read_bytes())
        self._profile = None
