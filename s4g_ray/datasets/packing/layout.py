"""What `s4g pack` stores: which images make a shard, in which order, and the bytes of each."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from PIL import Image

from s4g_ray.arrays import Ints, group
from s4g_ray.config.schema import Size
from s4g_ray.data.augmentation import LARGEST_JPEG
from s4g_ray.data.image_table import View
from s4g_ray.data.images import FORMATS, decode, resize
from s4g_ray.data.schema import SPLITS
from s4g_ray.datasets.packing.s2_curve import order_along_curve
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import Range, read_ranges

SAMPLED = 32  # images of a view whose size says how many make a shard
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "TIFF": "tif",
    "JPEG2000": "jp2",
}  # else the format's name


@dataclass(frozen=True)
class PackOptions:
    """What is stored of the images. A view without a size is copied byte for byte."""

    query_size: Size | None = None  # height, width
    reference_size: Size | None = None
    antialias: bool = True  # of resizing, as data.antialias
    quality: int = 95  # of JPEG, for what is resized
    shard_mb: float = 256  # about: shards of a view and split hold equally many images
    on_bad_image: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        for name, size in (
            ("query_size", self.query_size),
            ("reference_size", self.reference_size),
        ):
            if size is not None and not all(1 <= side <= LARGEST_JPEG for side in size):
                raise InputError(
                    f"{name}={size} is not within 1..{LARGEST_JPEG} pixels, as JPEG wants"
                )
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality={self.quality} is not within 1..100")
        if not self.shard_mb > 0:
            raise InputError(f"shard_mb={self.shard_mb} is not above 0")

    def size(self, view: View) -> Size | None:
        """The height and width that images of a view are given."""
        return self.query_size if view == "queries" else self.reference_size


@dataclass(frozen=True)
class Shard:
    """Images to be stored in one file, in their order."""

    name: str
    view: View
    ids: list[int]  # of the first row of each image along the curve
    ranges: list[Range]


@dataclass(frozen=True)
class Plan:
    """Which shard, and which image of it, each row of a view finds its own in: arrays of N."""

    shards: list[Shard]
    shard_of: Ints
    number_of: Ints


def plan_view(table: pa.Table, folder: str, view: View, options: PackOptions) -> Plan:
    """The shards of a view, whose rows are `table` and relative paths of `folder`.

    One shard holds one view and one split; images that rows of a split share are stored once.
    """
    ids = table["id"].to_numpy()
    lat, lon = (table[name].to_numpy() for name in ("lat", "lon"))
    order = order_along_curve(ids, lat, lon)
    images, ranges = _images(table, folder)
    per_shard = _images_per_shard(ranges, order, view, options)
    shard_of, number_of = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
    splits = table["split"].to_numpy()
    shards: list[Shard] = []
    for split in SPLITS[view]:
        rows = order[splits[order] == split]
        first, place = _by_first_row(images[rows])
        count = -(-len(first) // per_shard)
        edges = np.linspace(0, len(first), count + 1).astype(np.int64)
        shard = np.searchsorted(edges, place, side="right") - 1
        shard_of[rows], number_of[rows] = len(shards) + shard, place - edges[shard]
        for number in range(count):
            chosen = rows[first[edges[number] : edges[number + 1]]].tolist()
            name = f"{view}-{split}-{number:05d}.tar"
            shards.append(Shard(name, view, ids[chosen].tolist(), [ranges(i) for i in chosen]))
    return Plan(shards, shard_of, number_of)


def _images(table: pa.Table, folder: str) -> tuple[Ints, Callable[[int], Range]]:
    """Numbers of the rows' images, equal where file, offset and length are; and where that of a row lies."""
    uris = table["uri"].combine_chunks().dictionary_encode()
    codes, names = uris.indices.to_numpy(), uris.dictionary
    offsets, lengths = (pc.fill_null(table[name], -1).to_numpy() for name in ("offset", "length"))

    def range_of(row: int) -> Range:
        uri = files.join(folder, names[int(codes[row])].as_py())
        return (
            (uri, int(offsets[row]), int(lengths[row])) if offsets[row] >= 0 else (uri, None, None)
        )

    return group(codes, offsets, lengths), range_of


def _by_first_row(images: Ints) -> tuple[Ints, Ints]:
    """images[N] -> first[I]: the row that each distinct image is met in first, rising; and its number, for each row."""
    _, first, inverse = np.unique(images, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return np.sort(first), rank[inverse]


def _images_per_shard(
    range_of: Callable[[int], Range], order: Ints, view: View, options: PackOptions
) -> int:
    """How many images make a shard, by the stored size of some that lie evenly along the curve."""
    chosen = np.unique(np.linspace(0, len(order) - 1, min(SAMPLED, len(order))).astype(np.int64))
    found = read_ranges([range_of(row) for row in order[chosen].tolist()])
    sizes = [
        len(made[0]) for data in found if not isinstance(made := stored(data, view, options), str)
    ]
    # a member has a header and is filled up to a multiple of 512 bytes: 768 in the mean
    return max(1, int(options.shard_mb * 1e6 / (statistics.mean(sizes or [1e6]) + 768)))


def stored(
    data: bytes | OSError | EOFError, view: View, options: PackOptions
) -> tuple[bytes, str] | str:
    """The bytes to store of an image and their extension, or what is wrong with it.

    It is decoded in any case. A JPEG that has its size is left as it is. Raises RunError for a store that fails: the
    image itself may be whole.
    """
    if isinstance(data, FileNotFoundError):
        return "missing"
    if isinstance(data, RunError):  # a StoreError
        raise data
    if isinstance(data, OSError):
        raise RunError(
            f"cannot read: {data}; when that is mended, run the same command again"
        ) from data
    try:
        if isinstance(data, EOFError):
            raise data
        image = decode(data)
    except (ValueError, EOFError) as error:
        return str(error)
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        kind = EXTENSIONS.get(file.format or "", (file.format or "image").lower())
    size = options.size(view)
    if size is None or (kind == "jpg" and tuple(image.shape[1:]) == tuple(size)):
        return data, kind
    pixels = np.ascontiguousarray(
        resize(image, size, antialias=options.antialias).permute(1, 2, 0).numpy()
    )
    return simplejpeg.encode_jpeg(pixels, quality=options.quality, colorsubsampling="420"), "jpg"
