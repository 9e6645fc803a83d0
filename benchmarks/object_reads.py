"""Measure reading images from an object store, beside plain clients of the same server.

python -m benchmarks.object_reads
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import numpy as np

from benchmarks.support.record import record
from benchmarks.support.s3_server import ACCESS_KEY, client, environment, serving
from s4g_ray.data.images import READ_AT_ONCE
from s4g_ray.data.pair_loader import NUM_THREADS
from s4g_ray.storage.byte_ranges import read_ranges

IMAGES = 512
KILOBYTES = 30
CONNECTIONS = 32
REPEATS = 5
BUCKET = "bench"
Read = Callable[[Sequence[str]], list[bytes]]  # keys -> contents, in the order of the keys


def read_here(keys: Sequence[str]) -> list[bytes]:
    """Read as the loader does: READ_AT_ONCE images at a time, by NUM_THREADS threads."""
    batches = [keys[start : start + READ_AT_ONCE] for start in range(0, len(keys), READ_AT_ONCE)]

    def read(batch: Sequence[str]) -> list[bytes | OSError | EOFError]:
        return read_ranges([(f"s3://{BUCKET}/{key}", None, None) for key in batch])

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [
            data for found in pool.map(read, batches) for data in found if isinstance(data, bytes)
        ]


def make_boto_reader(endpoint: str) -> Read:
    """Make a reader by a plain boto3 client, a thread for each connection."""
    store = client(endpoint, CONNECTIONS)

    def read_one(key: str) -> bytes:
        content: bytes = store.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def read(keys: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(read_one, keys))

    return read


def make_http_reader(endpoint: str) -> Read:
    """Make a reader by bare HTTP with an invented signature and no checks: the server's maximum."""
    # the server distinguishes S3 from other services by the scope
    scope = f"{ACCESS_KEY}/20260101/us-east-1/s3/aws4_request"
    headers = {
        "Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"
    }

    async def read_all(keys: Sequence[str]) -> list[bytes]:
        connector = aiohttp.TCPConnector(limit=CONNECTIONS)
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

            async def read(key: str) -> bytes:
                async with session.get(f"{endpoint}/{BUCKET}/{key}") as answer:
                    return await answer.read()

            return await asyncio.gather(*map(read, keys))

    return lambda keys: asyncio.run(read_all(keys))


def measure(
    readers: dict[str, Read], images: dict[str, bytes], rng: np.random.Generator
) -> dict[str, list[tuple[float, float]]]:
    """Measure the seconds for all images in random order, and those of this process's processors.

    The readers take turns. Each reads REPEATS times after a first time that is not counted.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(REPEATS + 1):
        for name, read in readers.items():
            keys = [str(key) for key in rng.permutation(list(images))]
            started = time.perf_counter()
            busy = time.process_time()
            found = read(keys)
            seconds[name].append((time.perf_counter() - started, time.process_time() - busy))
            if found != [images[key] for key in keys]:
                raise RuntimeError(f"{name}: the bytes read differ from those written")
    return {name: times[1:] for name, times in seconds.items()}


def main() -> None:
    """Measure and record the table."""
    rng = np.random.default_rng(0)
    images = {f"images/{i:05d}.jpg": rng.bytes(KILOBYTES * 1000) for i in range(IMAGES)}
    with serving(BUCKET) as endpoint:
        os.environ.update(environment(endpoint), S4G_S3_MAX_CONNECTIONS=str(CONNECTIONS))
        store = client(endpoint)
        for key, data in images.items():
            store.put_object(Bucket=BUCKET, Key=key, Body=data)
        readers = {
            "here (read_ranges)": read_here,
            "boto3": make_boto_reader(endpoint),
            "bare HTTP": make_http_reader(endpoint),
        }
        seconds = measure(readers, images, rng)
    bound = [wall for wall, _ in seconds["bare HTTP"]]
    rows: list[list[str | int | float]] = []
    for name, times in seconds.items():
        walls = [wall for wall, _ in times]
        median = statistics.median(walls)
        shares = [fastest / own for fastest, own in zip(bound, walls, strict=True)]
        share = statistics.median(shares)
        megabytes = IMAGES * KILOBYTES / 1000 / median
        busy_ms = 1000 * statistics.median(busy for _, busy in times) / IMAGES
        rate = round(IMAGES / median)
        rows.append([name, rate, round(megabytes, 1), f"{share:.2f}", f"{busy_ms:.2f}"])
    record(
        "object_reads",
        title="Reading images from an object store",
        text=(
            "single objects in random order from one moto server in a process of its own, which is"
            " the bound: its answers are made by one interpreter. Each client has the same number"
            " of connections; medians of runs in turns. Bare HTTP signs and checks nothing."
        ),
        command="python -m benchmarks.object_reads",
        columns=["client", "images/s", "MB/s", "of bare HTTP", "ms of a processor a request"],
        rows=rows,
        config={
            "images": IMAGES,
            "kilobytes": KILOBYTES,
            "connections": CONNECTIONS,
            "repeats": REPEATS,
        },
        order=86,
    )


if __name__ == "__main__":
    main()
