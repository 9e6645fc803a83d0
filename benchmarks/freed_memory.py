"""Measure an encoder on one core with the malloc of glibc as it is, and keeping what it frees.

python -m benchmarks.freed_memory [--sizes 64 128 224] [--repeats 3]

Each measurement is a process of its own, and computes in a thread, as workers and actors do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks.support.record import Cell, record
from s4g_ray.freed_memory import VARIABLES

ENCODER = "tf_efficientnet_lite0"
NUM_IMAGES = 64
SIDES = 600  # pixels: of the inputs of all passes of a measurement, two at least
WORKS = {"encode": "embedding", "step": "forward and backward pass"}


def main() -> None:
    """Run the measurements and record the table, or measure here what a parent process asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 224])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        work, size = args.here
        with ThreadPoolExecutor(1) as pool:
            print(json.dumps(pool.submit(measure, work, int(size)).result()))
        return
    rows = [compare(work, size, args.repeats) for work in WORKS for size in args.sizes]
    record(
        "freed_memory",
        title="Keeping freed memory",
        text=(
            f"processor time of {NUM_IMAGES} images on one core, ms (that of the kernel), and the"
            " largest memory of the process: with glibc's malloc as it is, and with"
            f" {' '.join(f'{name}={value}' for name, value in VARIABLES.items())}, as training"
            " workers and embedding actors on CPUs have it. Medians; the two take turns."
        ),
        command="python -m benchmarks.freed_memory",
        columns=["work", "inputs, pixels", "as it is", "kept", "share", "as it is, MB", "kept, MB"],
        rows=rows,
        config={"encoder": ENCODER, "precision": "fp32, channels last", "repeats": args.repeats},
        order=81,
    )


def compare(work: str, size: int, repeats: int) -> list[Cell]:
    """Measure both ways in turns; return a row of the table."""
    plain = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environments = (plain, {**plain, **VARIABLES})
    found: tuple[list[list[float]], ...] = ([], [])
    for _ in range(repeats):
        for results, environment in zip(found, environments, strict=True):
            command = [sys.executable, "-m", "benchmarks.freed_memory", "--here", work, str(size)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            results.append(json.loads(done.stdout))
    medians = [[statistics.median(values) for values in zip(*runs, strict=True)] for runs in found]
    (before, before_kernel, before_mb), (after, after_kernel, after_mb) = medians
    return [
        WORKS[work],
        size,
        f"{before:,.0f} ({before_kernel:,.0f})",
        f"{after:,.0f} ({after_kernel:,.0f})",
        f"{after / before:.0%}",
        f"{before_mb:,.0f}",
        f"{after_mb:,.0f}",
    ]


def measure(work: str, size: int) -> list[float]:
    """Return processor time and that of the kernel, ms a batch, and the peak of memory, MB."""
    import torch

    from s4g_ray.config.training_schema import ModelConfig
    from s4g_ray.encoder.encoder import Encoder
    from s4g_ray.encoder.precision import Numerics

    torch.set_num_threads(1)
    encoder = Encoder.build(ModelConfig(name=ENCODER, pretrained=False), seed=0)
    encoder.to(memory_format=torch.channels_last)
    numerics = Numerics("fp32", channels_last=True)
    images = torch.zeros(NUM_IMAGES, 3, size, size, dtype=torch.uint8)

    def encode() -> None:
        with torch.inference_mode():
            numerics.embed(encoder, images, "references")

    def step() -> None:
        encoder.zero_grad()
        outputs = numerics.embed(encoder, images, "references")
        torch.autograd.backward(outputs.float().sum())

    run = {"encode": encode, "step": step}[work]
    encoder.train(work == "step")
    for _ in range(2):
        run()
    passes = max(2, SIDES // size)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(passes):
        run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    total = kernel + after.ru_utime - before.ru_utime
    return [1000 * total / passes, 1000 * kernel / passes, after.ru_maxrss / 1000]


if __name__ == "__main__":
    main()
