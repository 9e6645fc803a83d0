"""Measure training images/s of one worker in float32 and bf16, with and without channels_last.

    python -m benchmarks.precision

`train.precision: auto` makes the same measurement at the start of a run. bf16 is slower where the
processor emulates it or the encoder is made of depthwise convolutions; so it is measured, not
assumed.
"""

from __future__ import annotations

import tempfile

from benchmarks.support.record import Cell, record
from s4g_ray.config.loading import load_config
from s4g_ray.config.training_schema import ModelConfig, TrainConfig
from s4g_ray.encoder.checkpoint import save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Precision, measure_numerics

CASES = {
    "tf_efficientnet_lite0, 64 px (configs/earth.yaml)": (
        load_config("configs/earth.yaml").model,
        64,
    ),
    "convnext_atto, 64 px": (ModelConfig(name="convnext_atto", pretrained=False), 64),
    "convnext_nano, 128 px": (ModelConfig(name="convnext_nano", pretrained=False), 128),
}


def measure_row(name: str) -> list[Cell]:
    """Measure the speeds of one encoder."""
    model, size = CASES[name]
    train = TrainConfig(batch_size=32, threads_per_worker=1)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, Encoder.build(model), None, epoch=0, step=0)
        measured = measure_numerics(model, train, (size, size), folder, "cpu")
    speeds = {(n.precision, n.channels_last): speed for n, speed in measured}
    kinds: list[tuple[Precision, bool]] = [(p, c) for p in ("fp32", "bf16") for c in (False, True)]
    return [name, *(f"{speeds[kind]:.1f}" for kind in kinds)]


def main() -> None:
    """Measure and record the table."""
    record(
        "precision",
        title="Precision and memory format",
        text=(
            "training images/s of one worker with one thread (forward and backward, the fastest"
            " step of 1.5 s). bf16 is slower where the processor emulates it or the encoder is"
            " made of depthwise convolutions; so `train.precision: auto` measures, at the start of"
            " a run, on the machine and the encoder at hand."
        ),
        command="python -m benchmarks.precision",
        columns=["encoder", "fp32", "fp32 channels_last", "bf16", "bf16 channels_last"],
        rows=[measure_row(name) for name in CASES],
        config={"batch": 16, "threads": 1},
        order=80,
    )


if __name__ == "__main__":
    main()
