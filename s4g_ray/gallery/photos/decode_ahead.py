"""Decode photos in threads ahead of the encoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import TypeVar

from s4g_ray.config.data_schema import Size
from s4g_ray.data.photos.photo_files import is_video
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues
from s4g_ray.gallery.photos.photo import Photo, read_photo
from s4g_ray.gallery.photos.video_frames import read_frames

FRAMES_AT_ONCE = 8  # of a video, which one thread reads
BATCH_BYTES = 256_000_000  # of decoded pixels that a batch holds, but for the last of them
Prepare = Callable[[Photo], Photo]
Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    uris: Sequence[str],
    *,
    every_s: float,
    least: Size | None,
    values: ImageValues = AS_STORED,
    prepare: Prepare,
    num_threads: int,
    num_ahead: int,
) -> Generator[Photo, None, None]:
    """Yield the photos of files, and the frames of videos, in order.

    prepare: applied to each photo, in the thread that decodes it. num_ahead: photos that are
    decoded before they are asked for. Other values as decode_photo and read_frames have them.
    """

    def read(uri: str) -> Photo:
        return prepare(read_photo(uri, least=least, values=values))

    with ThreadPoolExecutor(num_threads, "decoder") as readers:
        for are_videos, group in groupby(uris, is_video):
            if not are_videos:
                yield from map_ahead(read, group, readers, num_ahead)
                continue
            for uri in group:
                frames = map(prepare, read_frames(uri, every_s, least=least))
                yield from _frames_ahead(frames, readers)


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: ThreadPoolExecutor,
    num_ahead: int,
) -> Generator[Result, None, None]:
    """Yield function(item) in the order of items; threads compute num_ahead of them ahead."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _frames_ahead(frames: Iterator[Photo], readers: ThreadPoolExecutor) -> Iterator[Photo]:
    """Read the next frames of a video while the present ones are used."""
    chunk = readers.submit(_take, frames).result()
    while chunk:
        following = readers.submit(_take, frames)
        yield from chunk
        chunk = following.result()


def _take(frames: Iterator[Photo]) -> list[Photo]:
    return list(islice(frames, FRAMES_AT_ONCE))


def batches_of(photos: Iterable[Photo], size: int) -> Iterator[list[Photo]]:
    """Group photos in order, at most `size`, and fewer where they are large."""
    batch: list[Photo] = []
    num_bytes = 0
    for photo in photos:
        batch.append(photo)
        num_bytes += 0 if photo.pixels is None else photo.pixels.nbytes
        if len(batch) == size or num_bytes >= BATCH_BYTES:
            yield batch
            batch = []
            num_bytes = 0
    if batch:
        yield batch
