"""Speed of a rank: counted arithmetic, time of its own passes, traces of the profiler."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from s4g_ray.config.schema import RunConfig
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.training.metrics.instruments import (
    ForwardTimer,
    StepProfiler,
    count_batch_flops,
    describe_speed,
    peak_tflops,
)
from tests.support.step_batches import CPU, encoder, images


def config(folder: Path, **sections: object) -> RunConfig:
    data = {"uri": "data", "query_size": (32, 64), "reference_size": (32, 32)}
    return RunConfig.model_validate({"run_dir": str(folder), "data": data, **sections})


def count_by_hand(model: Encoder, size: tuple[int, int]) -> int:
    """Count two operations for each weight of a convolution or product, at each of its places."""
    total = 0

    def add(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        places = output.numel() // output.shape[1]
        if isinstance(module, nn.Linear):
            places = output.numel() // output.shape[-1]
        total += 2 * places * module.weight.numel()  # type: ignore[operator]

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    with torch.no_grad():
        model.embed(images(1, size, 1), "queries")
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_the_arithmetic_of_a_batch_is_counted(name: str, tmp_path: Path) -> None:
    model = encoder(name, dtype=torch.float32)
    run = config(tmp_path, train={"batch_size": 6}, sampling={"gallery_negatives": 2})
    wanted = 3 * (6 * count_by_hand(model, (32, 64)) + 8 * count_by_hand(model, (32, 32)))
    assert count_batch_flops(model, run, CPU) == pytest.approx(wanted, rel=0.02)
    assert model.training
    assert describe_speed(2e12, CPU, "bf16") == {"tflops": 2.0}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_the_share_of_the_peak_is_given_where_the_peak_is_known(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    gpu = torch.device("cuda")
    assert peak_tflops(gpu, "bf16") == peak
    assert peak_tflops(gpu, "fp32") is None
    if peak is not None:
        assert describe_speed(peak * 5e11, gpu, "fp16")["mfu"] == 0.5


def test_forward_passes_are_timed_and_the_sum_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of their begins and ends."""
    clock = iter([1.0, 1.5, 4.0, 4.25, 9.0, 9.125])
    replaced = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("s4g_ray.training.metrics.instruments.time", replaced)
    model = encoder()
    timer = ForwardTimer(model, CPU)
    for _ in range(2):
        model(images(2, (32, 32), 1), images(2, (32, 32), 2))
    assert timer.take_seconds() == 0.75
    model(images(2, (32, 32), 1), images(2, (32, 32), 2))
    assert timer.take_seconds() == 0.125
    assert timer.take_seconds() == 0


def test_the_chosen_steps_are_traced(tmp_path: Path) -> None:
    profiler = StepProfiler(config(tmp_path, train={"profile_steps": [3, 4]}), rank=1)
    for step in range(1, 7):
        profiler.before_step(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        profiler.after_step(step)
    (trace,) = (tmp_path / "profiles").iterdir()
    assert trace.name == "steps=3-4-rank=1.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {name for name in names if name and name.startswith("step ")} == {"step 3", "step 4"}


def test_steps_that_end_early_are_traced_as_far_as_they_went(tmp_path: Path) -> None:
    profiler = StepProfiler(config(tmp_path, train={"profile_steps": [1, 9]}), rank=0)
    profiler.before_step(1)
    profiler.after_step(1)
    profiler.write()
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == ["steps=1-9-rank=0.json"]


def test_no_step_is_traced_unless_chosen(tmp_path: Path) -> None:
    profiler = StepProfiler(config(tmp_path), rank=0)
    profiler.before_step(1)
    profiler.after_step(1)
    assert not (tmp_path / "profiles").exists()
