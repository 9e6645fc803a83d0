"""Measure the embedding job against bare decoding, the bare encoder, and Ray Data end to end.

    python -m benchmarks.embedding [--repeats 3] [--images 6000 8000]

Bare is a process for each actor, with as many threads, that does the same work on the same images
and nothing else. All forms take turns in one Ray session. Two workloads: packed tiles of 384 pixels
with an encoder that does nothing, so that decoding binds; and tiles of 64 pixels with a real
encoder, which then binds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import simplejpeg
import torch

from benchmarks.support.packed_tiles import write_tiles
from benchmarks.support.process_watch import ProcessWatch
from benchmarks.support.ray_data_embedding import embed_by_ray_data
from benchmarks.support.record import Cell, record
from s4g_ray.config.loading import parse_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import View
from s4g_ray.data.images import READ_AT_ONCE, list_image_files
from s4g_ray.distributed.session import ray_session
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import checkpoint_stamp, load_encoder, save_checkpoint
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.freed_memory import keeping_variables
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import read_ranges
from s4g_ray.storage.manifest import Stamp

JOB, BARE, RAY_DATA = "the job", "bare", "Ray Data"


@dataclass(frozen=True)
class NullNumerics(Numerics):
    """Passes that only look at one row of pixels: decoding is then what takes time."""

    def embed(self, encoder: Encoder, images: torch.Tensor, _view: View) -> torch.Tensor:
        """Return images[b, 3, H, W] -> [b, D] of their first pixels."""
        return images[:, :, 0].flatten(1)[:, : encoder.dim].float() + 1


@dataclass
class Workload:
    """A data set of tiles, an encoder, and the forms that embed its references."""

    name: str
    config: RunConfig
    dataset: GeoDataset
    numerics: Numerics
    folder: Path
    count: int
    stamp: Stamp
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    driver_cpu: dict[str, list[float]] = field(default_factory=dict)

    @property
    def checkpoint(self) -> str:
        """Return the URI of the encoder's weights."""
        return str(self.folder / "checkpoint")

    def measure(self, form: str, function: Callable[[], object], watch: ProcessWatch) -> None:
        """Run a form once; keep its wall time, its processor time and that of the driver."""
        before = watch.count_cpu_s()
        driver_before = time.process_time() - watch.own_cpu_s
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
        driver = time.process_time() - watch.own_cpu_s - driver_before
        self.seconds.setdefault(form, []).append(seconds)
        self.driver_cpu.setdefault(form, []).append(driver)
        self.cpu.setdefault(form, []).append(watch.count_cpu_s() - before)

    def rows(self, fixed: float) -> list[list[Cell]]:
        """Return the rows of the table; fixed: seconds of a warm job beyond its images."""
        rows: list[list[Cell]] = []
        for form, seconds in self.seconds.items():
            cpu_ms = statistics.median(self.cpu[form]) / self.count * 1e3
            driver_us = statistics.median(self.driver_cpu[form]) / self.count * 1e6
            rate = self.count / statistics.median(seconds)
            share = statistics.median(self.cpu[BARE]) / statistics.median(self.cpu[form])
            rows.append(
                [
                    self.name,
                    form,
                    f"{rate:.0f}",
                    f"{cpu_ms:.2f}",
                    f"{share:.0%}",
                    f"{driver_us:.1f}" if form != BARE else "",
                    f"{fixed:.2f}" if form == JOB else "",
                ]
            )
        return rows


class BareProcess:
    """A process that decodes, or encodes one batch again and again."""

    def __init__(self, config: RunConfig, checkpoint: str, numerics: Numerics) -> None:
        torch.set_num_threads(config.embedding.threads_per_actor)
        self._config = config
        self._numerics = numerics
        self._encoder = load_encoder(config.model, checkpoint).eval()
        numerics.prepare(self._encoder)
        height, width = config.data.reference_size
        shape = (config.embedding.batch_size, 3, height, width)
        self._images = torch.randint(0, 256, shape, dtype=torch.uint8)

    def decode(self, dataset: GeoDataset, first: int, stop: int) -> int:
        """Read and decode the images of a range of rows, each into the same memory."""
        table = dataset.table("references", ["train"])
        height, width = self._config.data.reference_size
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        for start in range(first, stop, READ_AT_ONCE):
            found = list_image_files(table, range(start, min(start + READ_AT_ONCE, stop)))
            for contents in read_ranges([(file.uri, file.offset, file.length) for file in found]):
                assert isinstance(contents, bytes)
                simplejpeg.decode_jpeg(contents, buffer=pixels)
        return stop - first

    def encode(self, count: int) -> int:
        """Encode at least `count` images."""
        done = 0
        with torch.inference_mode():
            while done < count:
                self._numerics.embed(self._encoder, self._images, "references")
                done += len(self._images)
        return done


def make_workload(folder: Path, name: str, count: int, **keys: Any) -> Workload:
    """Write the tiles and the weights of a workload. keys: size, model, numerics."""
    size = keys["size"]
    dataset = write_tiles(folder / "tiles", count, size)
    tree = {
        "run_dir": str(folder / "run"),
        "data": {"uri": dataset.uri, "query_size": [size, size], "reference_size": [size, size]},
        "model": {"name": keys["model"], "pretrained": False},
        "embedding": {"num_actors": 2, "decoders_per_actor": 2},
        "ray": {"num_cpus": 6},  # logical: Ray Data's tasks and actors find room beside the pool
    }
    config = parse_config(tree)
    encoder = Encoder.build(config.model)
    checkpoint = str(folder / "checkpoint")
    save_checkpoint(checkpoint, encoder, None, epoch=0, step=0)
    stamp = checkpoint_stamp(config, encoder, checkpoint, dataset.fingerprint)
    return Workload(name, config, dataset, keys["numerics"], folder, count, stamp)


def run_job(workload: Workload, pool: EncoderPool) -> None:
    """Run the embedding job over the references, into a new table."""
    config = workload.config
    target = files.join(str(workload.folder), "embeddings")
    embed(
        pool,
        config,
        workload.dataset,
        workload.checkpoint,
        target,
        splits=["train"],
        views=["references"],
        numerics=workload.numerics,
        stamp=workload.stamp,
    )
    shutil.rmtree(target)


def run_bare(workload: Workload, processes: list[Any]) -> None:
    """Decode all images, or encode as many, in bare processes."""
    edges = np.linspace(0, workload.count, len(processes) + 1).astype(int).tolist()
    calls = []
    for process, first, stop in zip(processes, edges[:-1], edges[1:], strict=True):
        if isinstance(workload.numerics, NullNumerics):
            calls.append(process.decode.remote(workload.dataset, first, stop))
        else:
            calls.append(process.encode.remote(stop - first))
    ray.get(calls)


def measure(workload: Workload, repeats: int, watch: ProcessWatch) -> tuple[float, float]:
    """Run all forms in turns; return the seconds of a job without images, cold and warm."""
    config = workload.config
    one = make_workload(
        workload.folder / "one",
        "one image",
        1,
        size=config.data.reference_size[0],
        model=config.model.name,
        numerics=workload.numerics,
    )
    environment = {"env_vars": keeping_variables()}  # as the actors have
    bare: Any = ray.remote(num_cpus=0, runtime_env=environment)(BareProcess)
    arguments = (config, workload.checkpoint, workload.numerics)
    processes = [bare.remote(*arguments) for _ in range(config.embedding.actors[0])]
    fixed = []
    with EncoderPool(config.model, config.placed_embedding, 120) as pool:
        for _ in range(2):
            started = time.perf_counter()
            run_job(one, pool)
            fixed.append(time.perf_counter() - started)
        run_bare(workload, processes)
        for repeat in range(repeats):
            out = str(workload.folder / f"ray_data_{repeat}")
            workload.measure(BARE, lambda: run_bare(workload, processes), watch)
            workload.measure(JOB, lambda: run_job(workload, pool), watch)
            workload.measure(
                RAY_DATA,
                lambda out=out: embed_by_ray_data(  # type: ignore[misc]
                    config, workload.dataset.uri, workload.checkpoint, workload.numerics, out
                ),
                watch,
            )
    for process in processes:
        ray.kill(process)
    return fixed[0], fixed[1]


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, nargs=2, default=[6000, 8000])
    arguments = parser.parse_args()
    rows: list[list[Cell]] = []
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        decoding = make_workload(
            Path(folder, "decoding"),
            "384 px, no encoder",
            arguments.images[0],
            size=384,
            model="test_efficientnet",
            numerics=NullNumerics(),
        )
        encoding = make_workload(
            Path(folder, "encoding"),
            "64 px, tf_efficientnet_lite0",
            arguments.images[1],
            size=64,
            model="tf_efficientnet_lite0",
            numerics=Numerics(channels_last=True),
        )
        with (
            ProcessWatch(os.getpid(), every_s=0.5) as watch,
            ray_session(decoding.config.ray, decoding.config.storage),
        ):
            for workload in (decoding, encoding):
                cold, warm = measure(workload, arguments.repeats, watch)
                rows.extend(workload.rows(warm))
                rates[f"cold_s_{workload.config.data.reference_size[0]}"] = cold
    rate = encoding.count / statistics.median(encoding.seconds[JOB])
    record(
        "embedding",
        title="The embedding job against bare work and Ray Data",
        text=(
            "the references of packed tiles, by 2 actors of 2 decoding threads. Bare: a process"
            " for each actor that only reads and decodes, into one buffer (first workload), or only"
            " encodes (second). Ray Data: rows of Parquet, decoding tasks, encoder actors and"
            " written Parquet, without commits and without an order. All forms take turns; medians."
            " CPU is the processor time of all processes an image, share that of the bare form in"
            " it; driver is the"
            " processor time of the driver an image. fixed: seconds of a job of one image, actors"
            " warm."
        ),
        command="python -m benchmarks.embedding",
        columns=["workload", "form", "images/s", "CPU, ms", "share", "driver, µs", "fixed, s"],
        rows=rows,
        config={
            "images": "/".join(str(count) for count in arguments.images),
            "repeats": arguments.repeats,
            "dtype": "float16",
            "batch_size": decoding.config.embedding.batch_size,
        },
        rates={"images_per_s": rate, **rates},
        order=70,
    )


if __name__ == "__main__":
    main()
