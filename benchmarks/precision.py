"""float32 and bf16 autocast, with and without channels_last: training images per second of one worker.

    python -m benchmarks.precision

The same measurement as `train.precision: auto` makes at the start of a run. bf16 is slower where the processor
emulates it or the encoder is made of depthwise convolutions; so it is measured, not assumed.
"""

from __future__ import annotations

import json
import tempfile

from benchmarks.machine import machine
from s4g_ray.config import ModelConfig, TrainConfig, load_config
from s4g_ray.encoder import Encoder, Precision, measure_numerics
from s4g_ray.trainer import save_checkpoint

CASES = {
    "tf_efficientnet_lite0, 64 px (configs/earth.yaml)": (load_config("configs/earth.yaml").model, 64),
    "convnext_atto, 64 px": (ModelConfig(name="convnext_atto", pretrained=False), 64),
    "convnext_nano, 128 px": (ModelConfig(name="convnext_nano", pretrained=False), 128),
}


def main() -> None:
    train = TrainConfig(batch_size=32, threads_per_worker=1)
    print("| encoder | fp32 | fp32 channels_last | bf16 | bf16 channels_last |\n|---|---|---|---|---|")
    for name, (model, size) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(folder, Encoder.build(model), None, epoch=0, step=0)
            speeds = {
                (n.precision, n.channels_last): s
                for n, s in measure_numerics(model, train, (size, size), folder, "cpu")
            }
        kinds: list[tuple[Precision, bool]] = [(p, c) for p in ("fp32", "bf16") for c in (False, True)]
        cells = [f"{speeds[kind]:.1f}" for kind in kinds]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
