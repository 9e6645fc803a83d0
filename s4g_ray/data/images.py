"""Read, decode and resize images, as they are stored and as evaluation and mining see them.

Images are uint8 [3, H, W]; the encoder normalises, a batch at a time. Decoded pixels are a permuted
view of [H, W, 3], in which resizing is fast. torch takes seconds to import, so it is imported with
the first tensor: decode_pixels and read_pixels return arrays, and so does load_pixels, without
torch where images are stored in the wanted size.
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

from s4g_ray.config.data_schema import DataConfig, Size
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.photos.heif import enable_heif, is_heif
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues, UnfitValuesError
from s4g_ray.data.pixels.raw_values import (
    TIFF_STARTS,
    describe_content,
    has_more_values,
    is_single_band,
    read_bands,
    read_single_band,
)
from s4g_ray.errors import BadImageError, StoreError
from s4g_ray.storage.byte_ranges import read_ranges

if TYPE_CHECKING:
    from torch import Tensor

ImageArray = NDArray[np.uint8]  # [3, H, W]
Pixels = NDArray[np.uint8]  # [H, W, 3]
LARGEST_JPEG = 65_500  # pixels a side
MAX_PIXELS = 200_000_000  # of an image: its pixels take three times as many bytes
# Formats that Pillow decodes itself. Its own list has EPS, a program that it hands to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "JPEG2000", "BMP", "GIF", "PPM", "AVIF")
READ_AT_ONCE = 64  # images whose bytes are read together; only one at a time is decoded in memory
# Pillow refuses images of more than twice this number by the file's header, and warns from it on.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Separates the random headings of embedding from other draws of the same seed.
_HEADING_STREAM = 0x686561


class ImageFile(NamedTuple):
    """Where an image is stored, and the values that loading it needs."""

    id: int
    uri: str
    offset: int | None  # bytes; with length: the image is a part of the file
    length: int | None
    heading: float  # degrees; NaN where unknown
    values: ImageValues = AS_STORED  # of the data set


def list_image_files(table: ImageTable, rows: Sequence[int]) -> list[ImageFile]:
    """Return the image files of the given row numbers of a table."""
    chosen = np.asarray(rows, dtype=np.int64)
    columns = zip(
        table.ids[chosen].tolist(),
        table.uris.take(chosen),
        table.offsets[chosen].tolist(),
        table.lengths[chosen].tolist(),
        table.headings[chosen].tolist(),
        strict=True,
    )
    image_files = []
    for image_id, uri, offset, length, heading in columns:
        if length < 0:
            image_files.append(ImageFile(image_id, uri, None, None, heading, table.values))
        else:
            image_files.append(ImageFile(image_id, uri, offset, length, heading, table.values))
    return image_files


def decode(data: bytes, values: ImageValues = AS_STORED) -> Tensor:
    """Decode as decode_pixels does, into a tensor of the same memory."""
    return _to_tensor(decode_pixels(data, values=values))


def decode_pixels(
    data: bytes, target: Pixels | None = None, values: ImageValues = AS_STORED
) -> ImageArray:
    """Decode the bytes of an image file into RGB uint8 [3, H, W], upright by its EXIF orientation.

    target: memory for a JPEG of its size, which saves a copy; other images are given memory of
    their own. values: how values that are not bytes, and more bands than three, are shown.

    Raises ValueError when the file is corrupt, neither of FORMATS nor HEIC, or has more than
    MAX_PIXELS, for HEIC without its library, and for values that would be black or white; size and
    format are checked before anything is decoded.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        return _decode(data, target, values).transpose(2, 0, 1)
    except UnfitValuesError:
        raise
    except BadImageError as error:  # without the library of HEIC
        raise ValueError(str(error)) from error
    except UnidentifiedImageError as error:
        raise ValueError(describe_content(data)) from error
    except Image.DecompressionBombError as error:
        size = str(error).split(",")[0]  # "Image size (... pixels) exceeds limit of ... pixels"
        raise ValueError(
            f"{size}: decoding it could take all memory; cut it up or make it smaller"
        ) from error
    except Exception as error:
        # For a damaged file Pillow raises many kinds: OSError, SyntaxError, struct.error...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes, target: Pixels | None, values: ImageValues) -> Pixels:
    """Decode into [H, W, 3]: bytes by Pillow or simplejpeg, other values as ImageValues says."""
    try:
        with Image.open(io.BytesIO(data), formats=list_formats(data)) as image:
            if not has_more_values(image, all_bands=values.bands is not None):
                return _decode_opened(data, image, target, values)
    except UnidentifiedImageError:
        if not data.startswith(TIFF_STARTS):
            raise
    return values.to_bytes(*read_bands(data, MAX_PIXELS))


def list_formats(data: bytes, name: str = "") -> tuple[str, ...]:
    """Return the formats that Pillow may open a file as: FORMATS, or HEIC alone for such a photo.

    data: its first 64 bytes, or more. Raises BadImageError, of a photo's name, for HEIC without its
    library.
    """
    if not is_heif(data[:64]):
        return FORMATS
    enable_heif(name)
    return ("HEIF",)


def _decode_opened(
    data: bytes, image: Image.Image, target: Pixels | None, values: ImageValues
) -> Pixels:
    # Only these can hold an orientation; for other images transposing is a plain copy.
    may_be_turned = "exif" in image.info or "xmp" in image.info
    if image.format == "JPEG" and image.mode == "RGB" and not may_be_turned:
        pixels = decode_jpeg(data, image.size, target)
        if pixels is not None:
            return pixels
    if is_single_band(image):
        return values.to_bytes(*read_single_band(image))
    upright = ImageOps.exif_transpose(image) if may_be_turned else image
    if upright.mode == "RGBA" and values.bands is not None:
        return values.to_bytes(np.asarray(upright))
    return np.array(upright.convert("RGB"))


def _to_tensor(pixels: ImageArray) -> Tensor:
    import torch

    return torch.from_numpy(pixels)


def decode_jpeg(data: bytes, size: tuple[int, int], target: Pixels | None = None) -> Pixels | None:
    """Decode as Pillow does, in two thirds of the time, into [H, W, 3].

    size: width and height as Pillow read them from the header and found them small enough. target:
    memory that is used where it has that size.
    Returns None for a file with any fault; Pillow then decides whether it is corrupt.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != size:
            return None
        fits = target is not None and target.shape == (height, width, 3)
        pixels: Pixels = simplejpeg.decode_jpeg(data, strict=True, buffer=target if fits else None)
    except ValueError:
        return None
    return pixels


def resize(image: Tensor, size: Size, *, antialias: bool = True) -> Tensor:
    """Resize uint8 [3, h, w] to exactly [3, H, W], bilinearly."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    import torch

    # Goes by way of [1, h, w, 3]: in the strides of image[None] torch does not recognise
    # interleaved pixels and is half as fast.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        batch, size=size, mode="bilinear", antialias=antialias
    )
    return resized[0]


def read_images(files: Sequence[ImageFile]) -> Iterator[Tensor | BadImageError]:
    """Read images as read_pixels does, as tensors."""
    for image in read_pixels(files):
        yield image if isinstance(image, BadImageError) else _to_tensor(image)


def read_pixels(
    files: Sequence[ImageFile], targets: Sequence[Pixels] | None = None
) -> Iterator[ImageArray | BadImageError]:
    """Read each image as stored, uint8 [3, h, w], in order; an error in place of a bad one.

    targets: memory for each image, as decode_pixels uses it.

    Bytes are read READ_AT_ONCE images at a time, with one read for neighbors in a file
    (storage/byte_ranges.py). Raises StoreError when the object store fails.
    """
    for start in range(0, len(files), READ_AT_ONCE):
        batch = files[start : start + READ_AT_ONCE]
        contents = read_ranges([(file.uri, file.offset, file.length) for file in batch])
        for i, (file, data) in enumerate(zip(batch, contents, strict=True)):
            yield _decode_file(file, data, None if targets is None else targets[start + i])


def _decode_file(
    file: ImageFile, data: bytes | OSError | EOFError, target: Pixels | None
) -> ImageArray | BadImageError:
    """Decode the bytes of a file, or return the error of a bad image.

    Raises StoreError: a store that does not answer is no fault of the image.
    """
    if isinstance(data, StoreError):
        raise data
    try:
        if isinstance(data, Exception):
            raise data
        return decode_pixels(data, target, file.values)
    except (OSError, ValueError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        bad = BadImageError(f"id {file.id}, {file.uri}: {reason}")
        bad.__cause__ = error
        return bad


def load_raws(table: ImageTable, rows: Sequence[int]) -> Iterator[Tensor | BadImageError]:
    """Load the images of rows as read_images does, one at a time."""
    return read_images(list_image_files(table, rows))


def load_views(
    table: ImageTable, rows: Sequence[int], view: View, data: DataConfig, *, seed: int
) -> list[Tensor | BadImageError]:
    """Load the images of rows as evaluation and mining see them; an error in place of a bad one."""
    files = list_image_files(table, rows)
    views: list[Tensor | BadImageError] = []
    for file, image in zip(files, read_images(files), strict=True):
        if isinstance(image, BadImageError):
            views.append(image)
        else:
            views.append(_fit_view(image, file, view, data, seed))
    return views


def load_pixels(
    table: ImageTable,
    rows: Sequence[int],
    view: View,
    data: DataConfig,
    *,
    seed: int,
    targets: Sequence[Pixels] | None = None,
) -> Iterator[ImageArray | BadImageError]:
    """Load images as load_views does, as arrays, one at a time; targets as read_pixels.

    Imports torch only for images that must be resized or turned.
    """
    files = list_image_files(table, rows)
    for file, image in zip(files, read_pixels(files, targets), strict=True):
        if isinstance(image, BadImageError) or _is_seen_as_stored(image, view, data):
            yield image
        else:
            yield _fit_view(_to_tensor(image), file, view, data, seed).numpy()


def _is_seen_as_stored(image: ImageArray, view: View, data: DataConfig) -> bool:
    """Check whether _fit_view leaves an image unchanged."""
    size = image.shape[1:]
    if view == "references":
        return size == tuple(data.reference_size)
    is_whole = size == tuple(data.query_size) and data.fov_range[0] == 360
    return is_whole and data.query_cut == 0 and data.query_heading == "as_is"


def _fit_view(image: Tensor, file: ImageFile, view: View, data: DataConfig, seed: int) -> Tensor:
    """Resize, turn and crop a stored image as evaluation and mining see it."""
    if view == "references":
        return fit_reference(image, data)
    rng = np.random.default_rng((seed, file.id, _HEADING_STREAM))
    return crop_field_of_view(fit_query(image, data, file.heading), data, rng)


def load_raw(table: ImageTable, row: int) -> Tensor:
    """Load the image of a row as stored, uint8 [3, h, w]. Raises BadImageError with the reason."""
    (image,) = load_raws(table, [row])
    return try_image(image)


def load_view(table: ImageTable, row: int, view: View, data: DataConfig, *, seed: int) -> Tensor:
    """Load the image of a row as evaluation and mining see it. Raises BadImageError."""
    (image,) = load_views(table, [row], view, data, seed=seed)
    return try_image(image)


def try_image(image: Tensor | BadImageError) -> Tensor:
    """Return the image, or raise the BadImageError in its place."""
    if isinstance(image, BadImageError):
        raise image
    return image


def fit_reference(image: Tensor, data: DataConfig) -> Tensor:
    """Resize uint8 [3, h, w] to data.reference_size."""
    return resize(image, data.reference_size, antialias=data.antialias)


def fit_query(image: Tensor, data: DataConfig, heading: float) -> Tensor:
    """Cut and resize uint8 [3, h, w] to data.query_size, and turn it to the north if configured.

    heading: degrees. Raises ValueError when it is needed and NaN; preflight checks that earlier.
    """
    rows = min(round(data.query_cut * image.shape[1]), (image.shape[1] - 1) // 2)
    cut = image[:, rows : image.shape[1] - rows]
    image = resize(cut, data.query_size, antialias=data.antialias)
    if data.query_heading != "known" or heading == 0:
        return image
    if not np.isfinite(heading):
        raise ValueError(
            "a query has no heading_deg, but data.query_heading=known; add heading_deg to the"
            " queries or set data.query_heading=as_is"
        )
    return turn_panorama(image, heading)


def turn_panorama(image: Tensor, degrees: float) -> Tensor:
    """Roll a panorama so that its centre column lies `degrees` clockwise of the new centre."""
    return image.roll(round(degrees % 360 / 360 * image.shape[-1]), -1)


def crop_field_of_view(panorama: Tensor, data: DataConfig, rng: np.random.Generator) -> Tensor:
    """Crop a panorama [3, H, W] to its visible middle part, after draw_field_of_view.

    Where data.query_fov_deg is a range, the width stays and columns outside are black: different
    views then make one batch, fit encoders of one size, and show as many degrees a column.
    """
    turn, view = draw_field_of_view(data, rng)
    if turn:
        panorama = panorama.roll(turn, -1)
    if view is not None:
        return black_out_sides(panorama, *view)
    left, right = _find_middle(panorama.shape[-1], data.visible_query_size[1])
    return panorama[..., left:right]


def draw_field_of_view(
    data: DataConfig, rng: np.random.Generator
) -> tuple[int, tuple[int, int] | None]:
    """Draw by how many columns a panorama is rolled to the right, and which are then seen.

    The first is 0 unless data.query_heading is `random`. The second, the first column and the one
    after the last, is None unless data.query_fov_deg is a range; degrees are drawn uniformly.
    """
    width = data.query_size[1]
    turn = int(rng.integers(width)) if data.query_heading == "random" else 0
    if not isinstance(data.query_fov_deg, tuple):
        return turn, None
    fov_deg = float(rng.uniform(*data.query_fov_deg))
    return turn, _find_middle(width, data.visible_columns(fov_deg))


def _find_middle(width: int, visible: int) -> tuple[int, int]:
    """Return the first of the middle columns of a width, and the one after the last."""
    left = (width - visible) // 2
    return left, left + visible


def black_out_sides(panorama: Tensor, left: int, right: int) -> Tensor:
    """Return a copy of a panorama [3, H, W] that is black but for columns left to right - 1."""
    image = panorama.clone()
    image[..., :left] = 0
    image[..., right:] = 0
    return image
