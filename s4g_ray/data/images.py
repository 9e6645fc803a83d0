"""Images: read, decode and size them, as they are stored and as evaluation and mining see them.

Images are uint8 [3, H, W]; the encoder normalises, a batch at a time. Decoded pixels are a permuted view of
[H, W, 3], which resizing is fast in. torch, which takes seconds to import, is imported with the first tensor:
decode_pixels and read_pixels give arrays, load_pixels too where images are stored in the size that is wanted.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from s4g_ray.config.schema import DataConfig, Size
from s4g_ray.errors import BadImageError, StoreError
from s4g_ray.storage.byte_ranges import read_ranges

if TYPE_CHECKING:  # loader processes need no tables, and these take a second to import
    from torch import Tensor

    from s4g_ray.data.image_table import ImageTable, View

ImageArray = NDArray[np.uint8]  # [3, H, W]
MAX_PIXELS = 200_000_000  # of an image: its pixels take three times as many bytes
# which decode by themselves: Pillow's list has EPS, which is a program that it hands to Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "JPEG2000", "BMP", "GIF", "PPM", "AVIF")
READ_AT_ONCE = 64  # images whose bytes are read together; decoded they are one at a time in memory
Image.MAX_IMAGE_PIXELS = (
    MAX_PIXELS // 2
)  # Pillow refuses more than twice as many, by the file's header
warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # and warns from there on
_HEADING_STREAM = (
    0x686561  # keeps the headings that embeddings see apart from other draws of the same seed
)


class ImageFile(NamedTuple):
    """Where an image lies, and what loading it needs to know."""

    id: int
    uri: str
    offset: int | None  # bytes; with length: the image is a part of the file
    length: int | None
    heading: float  # degrees; NaN where unknown


def image_files(table: ImageTable, rows: Sequence[int]) -> list[ImageFile]:
    """The images of some rows, by number."""
    return [
        ImageFile(
            int(table.ids[i]),
            table.uris[i],
            table.offsets[i],
            table.lengths[i],
            float(table.headings[i]),
        )
        for i in rows
    ]


def decode(data: bytes) -> Tensor:
    """As decode_pixels, as a tensor of the same memory."""
    return _tensor(decode_pixels(data))


def decode_pixels(data: bytes) -> ImageArray:
    """The bytes of an image file -> RGB uint8 [3, H, W], upright as its EXIF says.

    Raises ValueError when it is corrupt, of none of FORMATS, or has more than MAX_PIXELS: that is known before anything
    is decoded.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            turned = "exif" in image.info or "xmp" in image.info  # else transposing would only copy
            plain = image.format == "JPEG" and image.mode == "RGB" and not turned
            pixels = decode_jpeg(data, image.size) if plain else None
            if pixels is None:
                pixels = _rgb(ImageOps.exif_transpose(image) if turned else image)
            return pixels.transpose(2, 0, 1)
    except UnidentifiedImageError as error:
        raise ValueError("not an image file of a known format") from error
    except Image.DecompressionBombError as error:
        size = str(error).split(",")[0]  # "Image size (... pixels) exceeds limit of ... pixels"
        raise ValueError(
            f"{size}: decoding it could take all memory; cut it up or make it smaller"
        ) from error
    except Exception as error:  # a damaged file makes Pillow raise many kinds: OSError, SyntaxError, struct.error...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _tensor(pixels: ImageArray) -> Tensor:
    import torch

    return torch.from_numpy(pixels)


def decode_jpeg(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """As Pillow decodes it, in two thirds of the time; None for a file with any fault, which is for Pillow to judge.

    size: width and height as Pillow has read them, and found them not too large.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != size:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, strict=True)
    except ValueError:
        return None
    return pixels


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return np.array(image.convert("RGB"))


def resize(image: Tensor, size: Size, *, antialias: bool = True) -> Tensor:
    """uint8 [3, h, w] -> [3, H, W], bilinear, to exactly that size."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    import torch

    # by way of [1, h, w, 3]: image[None] has strides in which torch does not see interleaved pixels, half as fast
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(batch, size=size, mode="bilinear", antialias=antialias)[
        0
    ]


def read_images(files: Sequence[ImageFile]) -> Iterator[Tensor | BadImageError]:
    """As read_pixels, as tensors."""
    return (
        image if isinstance(image, BadImageError) else _tensor(image)
        for image in read_pixels(files)
    )


def read_pixels(files: Sequence[ImageFile]) -> Iterator[ImageArray | BadImageError]:
    """Each image as it is stored, uint8 [3, h, w], or what is wrong with it; in order.

    Bytes are read READ_AT_ONCE images at a time, neighbors in a file by one read (ranges.py). Raises StoreError.
    """
    for start in range(0, len(files), READ_AT_ONCE):
        some = files[start : start + READ_AT_ONCE]
        found = read_ranges([(file.uri, file.offset, file.length) for file in some])
        yield from (_decoded(file, data) for file, data in zip(some, found, strict=True))


def _decoded(file: ImageFile, data: bytes | OSError | EOFError) -> ImageArray | BadImageError:
    """Raises StoreError: that a store does not answer is no fault of an image."""
    if isinstance(data, StoreError):
        raise data
    try:
        if isinstance(data, Exception):
            raise data
        return decode_pixels(data)
    except (OSError, ValueError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        bad = BadImageError(f"id {file.id}, {file.uri}: {reason}")
        bad.__cause__ = error
        return bad


def load_raws(table: ImageTable, rows: Sequence[int]) -> Iterator[Tensor | BadImageError]:
    """Images of rows as read_images gives them, one at a time."""
    return read_images(image_files(table, rows))


def load_views(
    table: ImageTable, rows: Sequence[int], view: View, data: DataConfig, *, seed: int
) -> list[Tensor | BadImageError]:
    """Images of rows as evaluation and mining see them, or what is wrong with one."""
    files = image_files(table, rows)
    found = zip(files, read_images(files), strict=True)
    return [
        image if isinstance(image, BadImageError) else _seen(image, file, view, data, seed)
        for file, image in found
    ]


def load_pixels(
    table: ImageTable, rows: Sequence[int], view: View, data: DataConfig, *, seed: int
) -> list[ImageArray | BadImageError]:
    """As load_views, as arrays; torch is imported for images that are to be resized or turned alone."""
    files = image_files(table, rows)
    return [
        image
        if isinstance(image, BadImageError) or _is_seen_as_stored(image, view, data)
        else _seen(_tensor(image), file, view, data, seed).numpy()
        for file, image in zip(files, read_pixels(files), strict=True)
    ]


def _is_seen_as_stored(image: ImageArray, view: View, data: DataConfig) -> bool:
    """Whether _seen leaves an image as it is."""
    size = image.shape[1:]
    if view == "references":
        return size == tuple(data.reference_size)
    whole = size == tuple(data.query_size) == tuple(data.visible_query_size)
    return whole and data.query_cut == 0 and data.query_heading == "as_is"


def _seen(image: Tensor, file: ImageFile, view: View, data: DataConfig, seed: int) -> Tensor:
    if view == "references":
        return fit_reference(image, data)
    rng = np.random.default_rng((seed, file.id, _HEADING_STREAM))
    return crop_field_of_view(fit_query(image, data, file.heading), data, rng)


def load_raw(table: ImageTable, row: int) -> Tensor:
    """Image of a row as it is stored: uint8 [3, h, w]. Raises BadImageError with the reason."""
    (image,) = load_raws(table, [row])
    return try_image(image)


def load_view(table: ImageTable, row: int, view: View, data: DataConfig, *, seed: int) -> Tensor:
    """Image of a row as evaluation and mining see it. Raises BadImageError with the reason."""
    (image,) = load_views(table, [row], view, data, seed=seed)
    return try_image(image)


def try_image(image: Tensor | BadImageError) -> Tensor:
    """An image that is one. Raises what is wrong with it."""
    if isinstance(image, BadImageError):
        raise image
    return image


def fit_reference(image: Tensor, data: DataConfig) -> Tensor:
    """uint8 [3, h, w] -> data.reference_size."""
    return resize(image, data.reference_size, antialias=data.antialias)


def fit_query(image: Tensor, data: DataConfig, heading: float) -> Tensor:
    """uint8 [3, h, w] -> data.query_size: cut, sized, and turned to the north where its heading is to be used.

    heading is in degrees; raises ValueError when it is wanted and NaN (checks.check_headings comes first).
    """
    rows = min(round(data.query_cut * image.shape[1]), (image.shape[1] - 1) // 2)
    image = resize(
        image[:, rows : image.shape[1] - rows], data.query_size, antialias=data.antialias
    )
    if data.query_heading != "known" or heading == 0:
        return image
    if not np.isfinite(heading):
        raise ValueError("a query has no heading_deg, but data.query_heading=known")
    return turn_panorama(image, heading)


def turn_panorama(image: Tensor, degrees: float) -> Tensor:
    """Roll a panorama [3, H, W], so that what its centre column shows lies `degrees` clockwise of the new centre."""
    return image.roll(round(degrees % 360 / 360 * image.shape[-1]), -1)


def crop_field_of_view(panorama: Tensor, data: DataConfig, rng: np.random.Generator) -> Tensor:
    """What is seen of a panorama [3, H, W]: turned by any angle where the heading is random, and its middle part."""
    if data.query_heading == "random":
        panorama = panorama.roll(int(rng.integers(panorama.shape[-1])), -1)
    width = data.visible_query_size[1]
    left = (panorama.shape[-1] - width) // 2
    return panorama[..., left : left + width]
