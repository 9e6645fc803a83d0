"""Decode photos in threads ahead of the encoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from s4g_ray.config.data_schema import Size
from s4g_ray.gallery.photos.photo import Photo, read_photo
from s4g_ray.gallery.photos.photo_files import is_video
from s4g_ray.gallery.photos.video_frames import read_frames

FRAMES_AT_ONCE = 8  # of a video, which one thread reads
BATCH_BYTES = 256_000_000  # of decoded pixels that a batch holds, but for the last of them


def read_ahead(
    uris: Sequence[str], *, every_s: float, least: Size | None, num_threads: int, num_ahead: int
) -> Generator[Photo, None, None]:
    """Yield the photos of files, and the frames of videos, in order.

    num_ahead: photos that are decoded before they are asked for. Other values as decode_photo and
    read_frames have them.
    """
    waiting: deque[Future[list[Photo]]] = deque()
    with ThreadPoolExecutor(num_threads) as readers:
        try:
            for uri in uris:
                if is_video(uri):
                    yield from _results(waiting, 0)
                    yield from _frames_ahead(read_frames(uri, every_s, least=least), readers)
                else:
                    waiting.append(readers.submit(_read_one, uri, least))
                    yield from _results(waiting, num_ahead)
            yield from _results(waiting, 0)
        finally:
            for future in waiting:
                future.cancel()


def _results(waiting: deque[Future[list[Photo]]], num_left: int) -> Iterator[Photo]:
    """Yield photos in order until num_left files are waiting."""
    while len(waiting) > num_left:
        yield from waiting.popleft().result()


def _frames_ahead(frames: Iterator[Photo], readers: ThreadPoolExecutor) -> Iterator[Photo]:
    """Read the next frames of a video while the present ones are used."""
    chunk = readers.submit(_take, frames).result()
    while chunk:
        following = readers.submit(_take, frames)
        yield from chunk
        chunk = following.result()


def _read_one(uri: str, least: Size | None) -> list[Photo]:
    return [read_photo(uri, least=least)]


def _take(frames: Iterator[Photo]) -> list[Photo]:
    return list(islice(frames, FRAMES_AT_ONCE))


def batches_of(photos: Iterator[Photo], size: int) -> Iterator[list[Photo]]:
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
