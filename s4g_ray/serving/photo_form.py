"""Read the photos of a multipart request, and refuse files that are no photos, by their header."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from s4g_ray.data.images import FORMATS
from s4g_ray.gallery.photos.photo import describe_unknown
from s4g_ray.serving.config import MB, ServeConfig
from s4g_ray.serving.refusal import Refusal

FIELD = "photo"
MAX_FIELDS = 8  # beside photos
LONGEST_NAME = 120  # characters of a file's name that an answer repeats
# Pillow reads a header part by part, 3 or 4 reads each. A phone's photo has up to 100 parts; a
# hostile file has millions.
MAX_READS = 1024
MAX_BESIDE = 128  # chunks of a PNG file beside those of its pixels
MAX_CHUNKS = 100_000
PNG_START = b"\x89PNG\r\n\x1a\n"


class Photo(NamedTuple):
    """A photo's file as it was sent; `name` is for messages alone and never a path.

    error: why it cannot be located beside the other photos of its request; data is then empty.
    """

    name: str
    data: bytes
    error: str | None = None


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


class _Metered(io.BytesIO):
    """A photo's file whose reads are counted."""

    def __init__(self, photo: Photo) -> None:
        super().__init__(photo.data)
        self._name = photo.name
        self._num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._num_reads += 1
        if self._num_reads > MAX_READS:
            raise _too_many_parts(self._name)
        return super().read(size)


def check_photos(photos: Sequence[Photo], config: ServeConfig) -> tuple[Photo, ...]:
    """Check each photo as check_photo does; a bad one among several holds its error.

    Raises Refusal for a single photo that is bad.
    """
    checked = []
    for photo in photos:
        try:
            check_photo(photo, config)
            checked.append(photo)
        except Refusal as refusal:
            if len(photos) == 1:
                raise
            error = refusal.message.removeprefix(f"{photo.name}: ")
            checked.append(Photo(photo.name, b"", error))
    return tuple(checked)


def check_photo(photo: Photo, config: ServeConfig) -> None:
    """Check a photo's size, format and pixels by its header; nothing is decoded.

    A header may take tenths of a second: call it in a thread. Raises Refusal: 400 for an empty
    file, 413 for too many bytes or pixels, 415 for a file of another format, 422 for a damaged one
    or one of too many parts.
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
    _check_chunks(photo)
    try:
        with Image.open(_Metered(photo), formats=list_formats()) as image:
            width, height = image.size
    except Refusal:
        raise
    except UnidentifiedImageError:
        raise Refusal(
            415,
            "no_photo",
            f"{photo.name}: {describe_unknown(photo.data)}; send JPEG, PNG, WEBP or TIFF",
        ) from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(photo, "its pixels", config) from None
    except Exception as error:  # for a damaged header Pillow raises many kinds
        raise Refusal(
            422, "bad_photo", f"{photo.name}: the file is damaged or cut short"
        ) from error
    if width * height > config.max_megapixels * 1e6:
        raise _too_many_pixels(photo, f"{width} x {height} pixels", config)


def _check_chunks(photo: Photo) -> None:
    """Refuse a PNG file of too many chunks, before or behind its pixels, or two colour profiles."""
    data = photo.data
    if not data.startswith(PNG_START):
        return
    position = len(PNG_START)
    num_chunks = num_beside = num_profiles = 0
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        num_chunks += 1
        num_beside += kind != b"IDAT"
        num_profiles += kind == b"iCCP"  # each is decompressed, to 1 MB
        if num_beside > MAX_BESIDE or num_profiles > 1 or num_chunks > MAX_CHUNKS:
            raise _too_many_parts(photo.name)
        position += 12 + int.from_bytes(data[position : position + 4])


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


def _too_many_parts(name: str) -> Refusal:
    return Refusal(
        422,
        "bad_photo",
        f"{name}: its header has more parts than a photo needs; save it again without metadata",
    )


def _too_many_pixels(photo: Photo, found: str, config: ServeConfig) -> Refusal:
    return Refusal(
        413,
        "too_many_pixels",
        f"{photo.name}: {found} exceed {config.max_megapixels:g} million, the most that is allowed;"
        " make it smaller",
    )
