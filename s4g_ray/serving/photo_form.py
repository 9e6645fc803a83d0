"""Read the photos of a multipart request, and refuse files that are no photos, by their header."""

from __future__ import annotations

import functools
import io
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from s4g_ray.data.images import FORMATS
from s4g_ray.serving.config import MB, ServeConfig
from s4g_ray.serving.refusal import Refusal

FIELD = "photo"
MAX_FIELDS = 8  # beside photos
LONGEST_NAME = 120  # characters of a file's name that an answer repeats


class Photo(NamedTuple):
    """A photo's file as it was sent; `name` is for messages alone and never a path."""

    name: str
    data: bytes


class _MemoryParser(MultiPartParser):
    """Starlette's parser, which else writes files above 1 MB to the disk: photos are not stored."""

    spool_max_size = 2**62


async def read_photos(request: Request, config: ServeConfig) -> list[Photo]:
    """Return the photos of a request.

    Raises Refusal: 415 for another form of request, 400 for a damaged one or one without photos,
    413 for too many or too large ones.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refusal(
            415,
            "no_form",
            f"send a multipart form (multipart/form-data) with photos in its field {FIELD!r}",
        )
    try:
        parser = _MemoryParser(
            request.headers,
            request.stream(),
            max_files=config.max_photos,
            max_fields=MAX_FIELDS,
        )
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise Refusal(
                413, "too_many", f"a request holds at most {config.max_photos} photos"
            ) from error
        raise Refusal(400, "bad_form", f"the form is damaged: {error.message}") from error
    except (KeyError, UnicodeDecodeError, ValueError) as error:
        raise Refusal(400, "bad_form", "the form is damaged") from error
    photos = []
    for number, (field, value) in enumerate(form.multi_items(), 1):
        if field == FIELD and isinstance(value, UploadFile):
            name = clean_name(value.filename or "", number)
            photos.append(Photo(name, await value.read()))
    await form.close()
    if not photos:
        raise Refusal(400, "no_photo", f"the form has no file in its field {FIELD!r}")
    return photos


def check_photo(photo: Photo, config: ServeConfig) -> None:
    """Check a photo's size, format and pixels by its header; nothing is decoded.

    Raises Refusal: 400 for an empty file, 413 for too many bytes or pixels, 415 for a file of
    another format.
    """
    if not photo.data:
        raise Refusal(400, "no_photo", f"{photo.name}: the file is empty")
    if len(photo.data) > config.max_photo_mb * MB:
        raise Refusal(
            413,
            "too_large",
            f"{photo.name}: {len(photo.data) / MB:.1f} MB exceed {config.max_photo_mb:g} MB, the"
            " most that is allowed for a photo; make it smaller",
        )
    try:
        with Image.open(io.BytesIO(photo.data), formats=list_formats()) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise Refusal(
            415,
            "no_photo",
            f"{photo.name}: not a photo of a known format; send JPEG, PNG, WEBP or TIFF",
        ) from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(photo, "its pixels", config) from None
    except Exception as error:  # for a damaged header Pillow raises many kinds
        raise Refusal(
            422, "bad_photo", f"{photo.name}: the file is damaged ({type(error).__name__})"
        ) from error
    if width * height > config.max_megapixels * 1e6:
        raise _too_many_pixels(photo, f"{width} x {height} pixels", config)


@functools.cache
def list_formats() -> tuple[str, ...]:
    """Return the names that Pillow gives the formats of photos; HEIF where pillow-heif is there."""
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def clean_name(name: str, number: int) -> str:
    """Return the last part of a file's name, without control characters, for messages."""
    last = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(letter for letter in last if letter.isprintable())
    return shown[:LONGEST_NAME] or f"photo {number}"


def _too_many_pixels(photo: Photo, found: str, config: ServeConfig) -> Refusal:
    return Refusal(
        413,
        "too_many_pixels",
        f"{photo.name}: {found} exceed {config.max_megapixels:g} million, the most that is allowed;"
        " make it smaller",
    )
