"""Decide which images make a shard and in which order, and make the bytes of each."""

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
from PIL import Image, UnidentifiedImageError

from s4g_ray.arrays import Ints, group, space_rows
from s4g_ray.config.data_schema import Size
from s4g_ray.data.format.image_paths import resolve
from s4g_ray.data.image_table import View
from s4g_ray.data.images import LARGEST_JPEG, decode, list_formats, resize
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues
from s4g_ray.data.schema import SPLITS
from s4g_ray.datasets.packing.s2_curve import order_along_curve
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage.byte_ranges import Range, read_ranges

NUM_SAMPLED = 32  # images of a view, from whose size the number of images of a shard is computed
# by Pillow's format; other formats have their name as extension
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


@dataclass(frozen=True)
class PackOptions:
    """How images are stored. The images of a view without a size are copied byte for byte."""

    query_size: Size | None = None  # height, width
    reference_size: Size | None = None
    antialias: bool = True  # of resizing, as data.antialias
    quality: int = 95  # JPEG quality of resized images
    shard_mb: float = 256  # approximate: shards of a view and split hold equally many images
    on_bad_image: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        for name, size in (
            ("--query-size", self.query_size),
            ("--reference-size", self.reference_size),
        ):
            if size is not None and not all(1 <= side <= LARGEST_JPEG for side in size):
                given = f"{name} {size[0]},{size[1]}"
                raise InputError(
                    f"{given} is not within 1..{LARGEST_JPEG} pixels, the limits of JPEG"
                )
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality} is not within 1..100")
        if not self.shard_mb > 0:
            raise InputError(f"--shard-mb {self.shard_mb:g} is not above 0")

    def size(self, view: View) -> Size | None:
        """Return the height and width of a view's stored images; None: as they are."""
        return self.query_size if view == "queries" else self.reference_size


@dataclass(frozen=True)
class Shard:
    """The images of one file, in their order."""

    name: str
    view: View
    ids: list[int]  # for each image, the id of its first row along the curve
    ranges: list[Range]  # where each image is in the source


@dataclass(frozen=True)
class Plan:
    """The shards of a view, and for each row (arrays of N) where its image is in them."""

    shards: list[Shard]
    shard_of: Ints  # position in shards
    number_of: Ints  # position in the shard


def plan_view(
    table: pa.Table, folder: str, view: View, options: PackOptions, values: ImageValues = AS_STORED
) -> Plan:
    """Plan the shards of a view whose rows are `table`, with paths relative to `folder`.

    A shard holds one view and one split; images that several rows of a split share are stored once.
    """
    ids = table["id"].to_numpy()
    order = order_along_curve(ids, table["lat"].to_numpy(), table["lon"].to_numpy())
    images, range_of = _locate_images(table, folder)
    per_shard = _count_images_per_shard(range_of, order, view, options, values)
    shard_of = np.empty(len(ids), np.int64)
    number_of = np.empty(len(ids), np.int64)
    splits = table["split"].to_numpy()
    shards: list[Shard] = []
    for split in SPLITS[view]:
        rows = order[splits[order] == split]
        first, position = _number_images(images[rows])
        num_shards = -(-len(first) // per_shard)
        edges = np.linspace(0, len(first), num_shards + 1).astype(np.int64)
        shard = np.searchsorted(edges, position, side="right") - 1
        shard_of[rows] = len(shards) + shard
        number_of[rows] = position - edges[shard]
        for number in range(num_shards):
            chosen = rows[first[edges[number] : edges[number + 1]]].tolist()
            name = f"{view}-{split}-{number:05d}.tar"
            ranges = [range_of(row) for row in chosen]
            shards.append(Shard(name, view, ids[chosen].tolist(), ranges))
    return Plan(shards, shard_of, number_of)


def _locate_images(table: pa.Table, folder: str) -> tuple[Ints, Callable[[int], Range]]:
    """Number the images of the rows, and return a function that locates the image of a row.

    Numbers are equal where file, offset and length are equal.
    """
    uris = table["uri"].combine_chunks().dictionary_encode()
    codes = uris.indices.to_numpy()
    names = uris.dictionary
    offsets = pc.fill_null(table["offset"], -1).to_numpy()
    lengths = pc.fill_null(table["length"], -1).to_numpy()

    def range_of(row: int) -> Range:
        uri = resolve(folder, names[int(codes[row])].as_py())
        if offsets[row] >= 0:
            return uri, int(offsets[row]), int(lengths[row])
        return uri, None, None

    return group(codes, offsets, lengths), range_of


def _number_images(images: Ints) -> tuple[Ints, Ints]:
    """images[N] -> first[I], the first row of each distinct image, ascending; position[N] in it."""
    _, first, inverse = np.unique(images, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return np.sort(first), rank[inverse]


def _count_images_per_shard(
    range_of: Callable[[int], Range],
    order: Ints,
    view: View,
    options: PackOptions,
    values: ImageValues,
) -> int:
    """Return how many images make a shard, by the stored size of a sample along the curve."""
    chosen = space_rows(len(order), NUM_SAMPLED)
    sizes = []
    for data in read_ranges([range_of(row) for row in order[chosen].tolist()]):
        stored = encode_stored(data, view, options, values)
        if not isinstance(stored, str):
            sizes.append(len(stored[0]))
    # a member has a header and is padded to a multiple of 512 bytes: 768 bytes on average
    return max(1, int(options.shard_mb * 1e6 / (statistics.mean(sizes or [1e6]) + 768)))


def _find_extension(data: bytes) -> str:
    """Return the extension of an image file that was decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=list_formats(data)) as file:
            image_format = file.format or "image"
    except UnidentifiedImageError:  # of bands that Pillow does not know
        image_format = "TIFF"
    return EXTENSIONS.get(image_format, image_format.lower())


def encode_stored(
    data: bytes | OSError | EOFError,
    view: View,
    options: PackOptions,
    values: ImageValues = AS_STORED,
) -> tuple[bytes, str] | str:
    """Return the bytes to store of an image and their extension, or why the image is bad.

    Decodes every image, also one that is copied. A JPEG that has the wanted size is copied. Raises
    RunError for a store that fails, because the image itself may be good.
    """
    if isinstance(data, FileNotFoundError):
        return "missing"
    if isinstance(data, RunError):  # a StoreError
        raise data
    if isinstance(data, OSError):
        raise RunError(
            f"cannot read: {data}; when that is fixed, run the same command again"
        ) from data
    try:
        if isinstance(data, EOFError):
            raise data
        image = decode(data, values)
    except (ValueError, EOFError) as error:
        return str(error)
    extension = _find_extension(data)
    size = options.size(view)
    if size is None or (extension == "jpg" and tuple(image.shape[1:]) == tuple(size)):
        return data, extension
    resized = resize(image, size, antialias=options.antialias).permute(1, 2, 0)
    pixels = np.ascontiguousarray(resized.numpy())
    return simplejpeg.encode_jpeg(pixels, quality=options.quality, colorsubsampling="420"), "jpg"
