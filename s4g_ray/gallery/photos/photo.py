"""Decode a photo, upright by its EXIF orientation, with the position that it names.

Beside the formats of data/images.py, HEIC is read where pillow-heif is installed. Photos much
larger than the encoder's input are decoded at a fraction of their size: 12 million pixels of JPEG
in 30 ms instead of 110 ms, and a batch of them stays small.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from s4g_ray.config.data_schema import Size
from s4g_ray.data.images import FORMATS, Pixels, decode_pixels
from s4g_ray.data.photos.exif import ExifPosition, read_exif
from s4g_ray.data.photos.heif import enable_heif, is_heif
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues, UnfitValuesError
from s4g_ray.errors import BadImageError, RunError, first_line
from s4g_ray.gallery.photos.quiet_decoders import silence_decoders
from s4g_ray.storage import files

silence_decoders()
SAVE = "gdal_translate -ot Byte -scale -b 1 -b 2 -b 3 IN OUT"
MOST_ASPECT = 4  # of a picture whose aspect is kept
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo to be located: pixels[H, W, 3], or the error that keeps it from being read.

    views: the encoder's input uint8 [T, h, w, 3], once it is made; pixels may then be None.
    """

    name: str
    pixels: Pixels | None
    exif: ExifPosition | None = None
    error: str | None = None
    views: Pixels | None = None


def read_photo(uri: str, *, least: Size | None = None, values: ImageValues = AS_STORED) -> Photo:
    """Read and decode a photo as decode_photo does; the photo holds its error.

    Raises StoreError: a store that does not answer is no fault of the photo.
    """
    name = uri.encode("utf-8", "replace").decode()
    try:
        data = files.read_bytes(uri)
    except RunError:
        raise
    except Exception as error:  # of many kinds: each scheme of a URI has its own
        reason = getattr(error, "strerror", None) or first_line(error)
        return Photo(name, None, error=f"the file cannot be opened: {reason}")
    try:
        return decode_photo(data, name, least=least, values=values)
    except BadImageError as error:
        return Photo(name, None, error=str(error).removeprefix(f"{name}: "))


def decode_photo(
    data: bytes,
    name: str = "photo",
    *,
    least: Size | None = None,
    values: ImageValues = AS_STORED,
) -> Photo:
    """Decode the bytes of an image file.

    least: height and width in pixels that suffice; a larger photo may be made smaller, but not
    below them. values: how values that are not bytes, and more bands than three, are shown. Raises
    BadImageError for a file that is no image, is damaged, or has more pixels
    than data.images.MAX_PIXELS.
    """
    if is_heif(data):
        return _decode_heif(data, name, least)
    exif = None
    pixels = None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            orientation = 1
            if "exif" in image.info or image.format == "TIFF":
                exif = read_exif(image)
                orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
            elif "xmp" in image.info:  # may hold an orientation: decode_pixels knows
                orientation = 0
            if image.format in ("JPEG", "MPO") and image.mode == "RGB" and orientation:
                pixels = _decode_jpeg(data, image.size, orientation, least)
    except Exception:  # of many kinds; decode_pixels raises its message again
        pixels = None
    if pixels is None:
        try:
            pixels = decode_pixels(data, values=values).transpose(1, 2, 0)
        except ValueError as error:
            raise BadImageError(f"{name}: {_reason_of(error, data)}") from error
    return Photo(name, shrink(pixels, least), exif)


def describe_unknown(data: bytes) -> str:
    """Return why a file that Pillow does not know is no photo, with the remedy."""
    if not data.startswith(_TIFF_STARTS):
        return "not an image file of a known format"
    return (
        "a TIFF that is damaged, or whose bands are not those of a photo (1 or 3 of 8 or 16 bits);"
        f" save it as such, as by `{SAVE}`"
    )


def _reason_of(error: ValueError, data: bytes) -> str:
    """Return why decode_pixels refuses a file; without the names of Pillow's exceptions."""
    if isinstance(error, UnfitValuesError):
        return f"{error}; or save the photo as bytes, as by `{SAVE}`"
    cause = error.__cause__
    if cause is None or isinstance(cause, Image.DecompressionBombError):
        return str(error)
    if isinstance(cause, UnidentifiedImageError):
        return describe_unknown(data)
    return f"the file is damaged or cut short ({first_line(cause)})"


def shrink(pixels: Pixels, least: Size | None) -> Pixels:
    """Average blocks of pixels[H, W, 3] where both sides stay at `least` or more.

    The blocks are square, but for a picture longer than MOST_ASPECT: its sides are reduced each by
    itself, so that turning it needs no more memory than another.
    """
    if least is None:
        return pixels
    height, width = pixels.shape[:2]
    down = max(1, height // least[0])
    across = max(1, width // least[1])
    if max(height, width) <= MOST_ASPECT * min(height, width):
        down = across = min(down, across)
    if max(down, across) == 1:
        return pixels
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).reduce((across, down)))


def _decode_jpeg(
    data: bytes, size: tuple[int, int], orientation: int, least: Size | None
) -> Pixels | None:
    """Decode a JPEG of the given width and height; None for a file with any fault."""
    options: dict[str, int] = {}
    if least is not None:
        height, width = least[::-1] if orientation in _TURNED else least
        if size[1] >= 2 * height and size[0] >= 2 * width:
            options = {"min_height": height, "min_width": width, "min_factor": 2}
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != size:
            return None
        return turn_upright(simplejpeg.decode_jpeg(data, strict=True, **options), orientation)
    except ValueError:
        return None


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror stored pixels[H, W, 3] as an EXIF orientation asks (EXIF 2.32, 0x0112)."""
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _decode_heif(data: bytes, name: str, least: Size | None) -> Photo:
    enable_heif(name)
    try:
        with Image.open(io.BytesIO(data), formats=("HEIF",)) as image:
            exif = read_exif(image)
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # a damaged file raises many kinds
        raise BadImageError(
            f"{name}: the file is damaged or cut short ({first_line(error)})"
        ) from error
    return Photo(name, shrink(pixels, least), exif)
