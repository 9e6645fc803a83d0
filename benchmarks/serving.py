"""Measure `s4g serve` against its bare encoder: throughput, latency at half load, and overload.

    python -m benchmarks.serving [--size 224] [--seconds 20] [--clients 16] [--tiles 256]

A gallery of random tiles and an untrained tf_efficientnet_lite0. The bare encoder embeds the same
decoded photos in batches, in a process of its own with as many threads. The service runs as the
command does; the clients are threads of this process, so they take part of the same processors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.support.record import Cell, apart, record
from s4g_ray.config.loading import parse_config
from s4g_ray.data.dataset import write_dataset
from s4g_ray.data.images import decode_pixels
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.gallery.build import build_gallery
from s4g_ray.gallery.gallery import open_gallery
from tests.support.local_service import Client

MODEL = "tf_efficientnet_lite0"
BATCH = 16


def make_photo(rng: np.random.Generator, size: int) -> bytes:
    """Return a JPEG of a smooth random picture."""
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_gallery(folder: Path, size: int, num_tiles: int) -> str:
    """Build a gallery of random tiles with an untrained encoder."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    for i in range(num_tiles):
        (folder / f"data/{i}.jpg").write_bytes(make_photo(rng, size))
    ids = np.arange(num_tiles)
    columns: dict[str, Any] = {
        "id": ids,
        "place_id": ids,
        "uri": [f"{i}.jpg" for i in ids],
        "lat": 40 + ids // 16 * 0.001,
        "lon": -112 + ids % 16 * 0.001,
        "split": ["gallery"] * num_tiles,
        "size_m": pa.array(np.full(num_tiles, 60.0), pa.float32()),
    }
    references = pa.table(columns)
    queries = pa.table(columns).drop_columns(["size_m"]).slice(0, 0)
    dataset = write_dataset(str(folder / "data"), references, queries, name="random")
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": {"uri": dataset.uri, "query_size": [size, size], "reference_size": [size, size]},
        "model": {"name": MODEL, "pretrained": False},
    }
    config = parse_config(tree)
    weights = folder / "weights.safetensors"
    weights.write_bytes(encode_weights(Encoder.build(config.model, seed=0)))
    build_gallery(str(weights), dataset.uri, str(folder / "gallery"), config=config)
    return str(folder / "gallery")


def measure_bare(uri: str, photos: list[bytes], seconds: float, threads: int) -> float:
    """Return photos/s of the gallery's encoder on decoded photos, in batches."""
    import torch

    torch.set_num_threads(threads)
    gallery = open_gallery(uri, device="cpu")
    batch = [decode_pixels(photo).transpose(1, 2, 0) for photo in photos[:BATCH]]
    gallery.encode(batch)
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < seconds:
        gallery.encode(batch)
        count += len(batch)
    return count / (time.perf_counter() - started)


@contextlib.contextmanager
def running(uri: str) -> Iterator[Client]:
    """Run the command on a free port."""
    command = [sys.executable, "-u", "-m", "s4g_ray.cli.app", "serve", uri, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("serving at "):
                break
        yield Client(int(line.split()[2].rstrip("/").rpartition(":")[2]))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def ask(
    client: Client, photos: list[bytes], seconds: float, clients: int, pause_s: float = 0.0
) -> list[tuple[int, float]]:
    """Let clients ask one after the other; return the status and the seconds of each answer."""
    found: list[tuple[int, float]] = []
    end = time.perf_counter() + seconds

    def run(number: int) -> None:
        time.sleep(pause_s * number / clients)
        while (started := time.perf_counter()) < end:
            answered = client.locate(photos[(number + len(found)) % len(photos)])
            took = time.perf_counter() - started
            found.append((answered.status, took))
            if pause_s > took:
                time.sleep(pause_s - took)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def p95(found: list[tuple[int, float]]) -> float:
    """Return the 95th percentile of the seconds of good answers."""
    return float(np.percentile([took for status, took in found if status == 200], 95))


def measure(options: argparse.Namespace, uri: str, photos: list[bytes]) -> list[Cell]:
    """Measure one row; bare encoder before and after the service."""
    threads = len(os.sched_getaffinity(0))
    bare = [apart(measure_bare, uri, photos, options.seconds / 4, threads)]
    with running(uri) as client:
        ask(client, photos, 2, 2)
        alone = ask(client, photos, options.seconds / 4, 1)
        busy = ask(client, photos, options.seconds, options.clients)
        rate = sum(status == 200 for status, _ in busy) / options.seconds
        half = ask(
            client, photos, options.seconds, options.clients, pause_s=2 * options.clients / rate
        )
        over = ask(client, photos, options.seconds / 4, 200)
        again = ask(client, photos, options.seconds / 4, 1)
    bare.append(apart(measure_bare, uri, photos, options.seconds / 4, threads))
    refused = [took for status, took in over if status == 503]
    unloaded = statistics.median(took for _, took in alone)
    return [
        options.size,
        round(statistics.mean(bare), 1),
        round(rate, 1),
        f"{rate / statistics.mean(bare):.0%}",
        round(1e3 * unloaded),
        round(1e3 * p95(half)),
        round(p95(half) / unloaded, 1),
        f"{len(refused)} of {len(over)}",
        round(1e3 * statistics.median(refused)) if refused else "none",
        (all(status == 200 for status, _ in again) and "yes") or "no",
    ]


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tiles", type=int, default=256)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    photos = [make_photo(rng, options.size) for _ in range(64)]
    with tempfile.TemporaryDirectory() as name:
        uri = write_gallery(Path(name), options.size, options.tiles)
        row = measure(options, uri, photos)
    record(
        "serving",
        title="Service: one replica against its bare encoder",
        text=(
            "photos/s over HTTP with 16 clients beside the encoder alone on decoded photos;"
            " latency of one client alone, and its 95th percentile at half of the load; 200"
            " clients against a queue of 64 requests. Clients and service share the processors."
        ),
        command="python -m benchmarks.serving",
        columns=[
            "pixels",
            "bare encoder, photos/s",
            "service, photos/s",
            "share",
            "alone, ms",
            "p95 at half load, ms",
            "times alone",
            "refused (503)",
            "median of a refusal, ms",
            "answers all again",
        ],
        rows=[row],
        config={
            "model": MODEL,
            "clients": options.clients,
            "tiles": options.tiles,
            "seconds": options.seconds,
            "batch_size": BATCH,
        },
        order=55,
    )


if __name__ == "__main__":
    main()
