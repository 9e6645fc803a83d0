"""Encode batches of photos in threads, while others are decoded and answers are made.

On a CPU several batches are encoded at once, by few threads each: the threads of one batch wait
for each other after every operation, and leave cores idle.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from s4g_ray.arrays import Floats32
from s4g_ray.config.data_schema import Size
from s4g_ray.gallery.photos.decode_ahead import map_ahead
from s4g_ray.gallery.photos.photo import Photo

MOST_CALLS = 4  # of the encoder, at once
MOST_DECODERS = 16
AHEAD_BYTES = 256_000_000  # of inputs and pixels that are decoded ahead
# pixels of a batch's inputs: larger batches are no faster on a CPU, and answers come later
BATCH_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 23}
_SETTING = threading.Lock()  # held while torch's number of threads is another
BATCH_VIEWS = {"cpu": (4, 32), "cuda": (16, 256)}  # fewest and most


@dataclass(frozen=True)
class EncodePlan:
    """How photos are encoded.

    num_views: of a forward pass. batch_photos: that are encoded, searched and answered together.
    num_calls: batches that are encoded at once, by num_threads threads each. num_ahead: photos that
    num_decoders threads decode ahead.
    """

    num_views: int
    batch_photos: int
    num_calls: int
    num_threads: int
    num_ahead: int
    num_decoders: int


def plan_encoding(
    size: Size,
    turns: int,
    *,
    device: torch.device,
    num_photos: int | None = None,
    most_calls: int = MOST_CALLS,
    photo_bytes: int = 0,
) -> EncodePlan:
    """Plan the encoding of photos whose inputs have `size` [h, w], at so many turns.

    num_photos: how many there are, where that is known. most_calls: of the encoder at once.
    photo_bytes: of a photo's pixels, where they are kept. torch's present number of threads is
    shared by the calls.
    """
    pixels = size[0] * size[1]
    fewest, most = BATCH_VIEWS[device.type]
    num_views = min(max(BATCH_PIXELS[device.type] // pixels, fewest), most)
    batch_photos = max(1, num_views // turns)
    with _SETTING:
        num_threads = torch.get_num_threads()
    num_calls = min(most_calls, num_threads) if device.type == "cpu" else 1
    if num_photos is not None:
        num_calls = max(1, min(num_calls, num_photos))
        batch_photos = min(batch_photos, max(1, -(-num_photos // num_calls)))
    num_ahead = AHEAD_BYTES // (3 * pixels * turns + photo_bytes)
    return EncodePlan(
        num_views=num_views,
        batch_photos=batch_photos,
        num_calls=num_calls,
        num_threads=-(-num_threads // num_calls),
        num_ahead=min(max(num_ahead, 2), 2 * num_calls * batch_photos),
        num_decoders=min(MOST_DECODERS, os.cpu_count() or 1),
    )


def embed_ahead(
    batches: Iterable[list[Photo]], embed: Callable[[list[Photo]], Floats32], plan: EncodePlan
) -> Generator[tuple[list[Photo], Floats32], None, None]:
    """Yield each batch of photos with embed(batch), in order, computed by threads ahead."""

    def encode(batch: list[Photo]) -> tuple[list[Photo], Floats32]:
        return batch, embed(batch)

    encoders = _start_encoders(plan)
    try:
        yield from map_ahead(encode, batches, encoders, plan.num_calls)
    finally:
        encoders.shutdown(cancel_futures=True)


def _start_encoders(plan: EncodePlan) -> ThreadPoolExecutor:
    """Start num_calls threads, each of which computes by num_threads threads.

    A thread keeps the setting that it made; threads that begin to use torch later follow the last
    setting of any. So it is put back at once, before other callers read it.
    """
    encoders = ThreadPoolExecutor(plan.num_calls, "encoder")
    started = threading.Barrier(plan.num_calls)

    def prepare() -> None:
        torch.get_num_threads()  # the first use in a thread takes the last setting of any
        torch.set_num_threads(plan.num_threads)
        started.wait()  # so that each thread takes one of these calls

    with _SETTING:
        before = torch.get_num_threads()
        try:
            for call in [encoders.submit(prepare) for _ in range(plan.num_calls)]:
                call.result()
        except BaseException:  # such as one thread too many: the others must not wait for it
            started.abort()
            encoders.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(before)
    return encoders
