"""Read the values of image files that do not hold bytes of brightness.

Pillow reads single bands of 16 and 32 bits; files of several bands of them need rasterio, an extra.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    TiffImageFile,
)

from s4g_ray.arrays import Bools
from s4g_ray.data.pixels.image_values import UnfitValuesError

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# The types of the values of files by Pillow's names of them; None: that of its array
_TYPES = {
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N", "I;12"), np.uint16),
    **dict.fromkeys(("I;16S", "I;16BS", "I;16NS"), np.int16),
    **dict.fromkeys(("I", "I;32", "I;32B", "I;32N", "I;32S", "I;32BS"), None),
    **dict.fromkeys(("F", "F;32F", "F;32BF", "F;32NF"), None),
    **dict.fromkeys(("jp2", "L"), None),  # JPEG 2000, and PGM of other than 8 or 16 bits
}
GDAL_NODATA = 42113
_DRIVERS = {True: "GTiff", False: "PNG"}
_filters = threading.Lock()  # warnings are filtered for all threads of a process


class RawValues(NamedTuple):
    """The values[H, W, C] of a file; valid: False where it has no data, None where it has all."""

    values: NDArray[Any]
    valid: Bools | None = None


def is_single_band(image: Image.Image) -> bool:
    """Return whether Pillow holds the values of an opened file in one band of 16 or 32 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def has_more_values(image: Image.Image, *, all_bands: bool) -> bool:
    """Return whether an opened file has values that Pillow cuts off: bits, or bands.

    all_bands: bands beyond red, green and blue count too. Ask this before is_single_band: of a TIFF
    whose bands lie one after the other Pillow may see the first alone.
    """
    stored = _stored_mode(image)
    return (
        (isinstance(image, TiffImageFile) and _is_misread(image, all_bands))
        or (";16" in stored and not is_single_band(image))
        or stored == "LX"
    )


def _is_misread(image: TiffImageFile, all_bands: bool) -> bool:
    """Return whether a TIFF has tags of bands that Pillow does not see, or of values it misreads.

    It reads signed bytes as unsigned ones, and does not swap the bytes of compressed values.
    """
    num_bands = int(image.tag_v2.get(SAMPLESPERPIXEL, 1))
    bits = image.tag_v2.get(BITSPERSAMPLE, (1,))
    has_bytes = set(bits) == {8}
    if has_bytes and 2 in image.tag_v2.get(SAMPLEFORMAT, ()):
        return True
    is_compressed = image.tag_v2.get(COMPRESSION, 1) != 1
    if is_compressed and max(bits) > 8 and image.tag_v2.prefix == b"MM":
        return True
    if num_bands == 1 or (num_bands == 3 and has_bytes and image.mode == "RGB"):
        return False
    is_split = image.tag_v2.get(PLANAR_CONFIGURATION, 1) == 2
    return is_split or not has_bytes or (all_bands and num_bands > 3 and image.mode != "CMYK")


def read_single_band(image: Image.Image) -> RawValues:
    """Read the values of an opened file of one band, upright, in the type that the file holds.

    Raises UnfitValuesError for a type that is not known to be read rightly.
    """
    stored = _stored_mode(image)
    if stored not in _TYPES:
        raise UnfitValuesError(
            f"its values ({image.format}, {stored or image.mode}) are of a type that is not read;"
            " save them as a TIFF of 16 bits, 32 bits or floating point"
        )
    values = np.asarray(ImageOps.exif_transpose(image))[:, :, None]
    if stored == "I;32N" and values.min() < 0:
        values = values.view(np.uint32)
    kind = _TYPES[stored]
    if kind is not None:
        values = values.astype(kind)
    return RawValues(values, _find_valid(values, _read_nodata(image)))


def _read_nodata(image: Image.Image) -> float | None:
    """Return the value that stands for missing data in a TIFF of GDAL; None where none does."""
    text = image.tag_v2.get(GDAL_NODATA) if isinstance(image, TiffImageFile) else None
    try:
        return None if text is None else float(text.strip(" \0"))
    except ValueError as error:
        raise UnfitValuesError(
            f"its value for missing data, {text!r}, is no number; set one, as by gdal_edit.py"
            " -a_nodata 0"
        ) from error


def _find_valid(values: NDArray[Any], nodata: float | None) -> Bools | None:
    if nodata is None or np.isnan(nodata):
        return None
    if values.dtype == np.float32:
        nodata = float(np.float32(nodata))
    return np.asarray(values != nodata)


def _stored_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0].args
    return str(arguments if isinstance(arguments, str) else (arguments or ("",))[0])


def read_bands(data: bytes, max_pixels: int) -> RawValues:
    """Read all bands of a TIFF or PNG file by rasterio.

    Raises UnfitValuesError where rasterio is not installed, and ValueError for a damaged file and
    for more than max_pixels, or more values than they have in three bands.
    """
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ImportError as error:
        raise UnfitValuesError(
            "a file of several bands that are not bytes is read by rasterio, which is not"
            " installed; pip install 's4g-ray[imagery]'"
        ) from error
    driver = _DRIVERS[data.startswith(TIFF_STARTS)]
    try:
        with rasterio.MemoryFile(data) as memory:
            with _filters, warnings.catch_warnings():  # images need no position
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                raster = memory.open(driver=driver)
            with raster:
                num_values = raster.width * raster.height * raster.count
                if raster.width * raster.height > max_pixels or num_values > 3 * max_pixels:
                    raise ValueError(
                        f"{raster.width} x {raster.height} pixels in {raster.count} bands are too"
                        f" many: at most {max_pixels:,} in three; cut it up or leave bands out"
                    )
                values = np.moveaxis(raster.read(), 0, 2)
                nodata = raster.nodata
    except RasterioError as error:
        raise ValueError(f"damaged, or no image file: {error}") from error
    return RawValues(values, _find_valid(values, nodata))


def describe_content(data: bytes) -> str:
    """Return what a file holds that is no image of a known format, with the remedy."""
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not an image: the download was refused or redirected; fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not an image; run `git lfs pull` where it was cloned"
    if not data.strip(b"\0"):
        return "nothing but zeros: the copy was cut off; copy it again"
    return "not an image file of a known format"
