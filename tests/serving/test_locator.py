from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.errors import StoreError, UnavailableError
from s4g_ray.gallery.answer import Answer
from s4g_ray.serving.backend import Located, LocateRequest
from s4g_ray.serving.config import ServeConfig
from s4g_ray.serving.deployment import LocatorReplica
from s4g_ray.serving.limits import MemoryTrimmer, read_resident_mb
from s4g_ray.serving.locator import Locator
from s4g_ray.serving.options import RequestOptions
from s4g_ray.serving.photo_form import Photo
from s4g_ray.serving.refusal import Refusal
from tests.support.local_service import make_photo
from tests.support.stand_in_gallery import StandInGallery, write_stand_in


class FaultyGallery(StandInGallery):
    """Fails to locate with two turns, lacks a shard with three, and fails to read tile 7."""

    def locate(self, images: Sequence[Any], **options: Any) -> list[Answer]:
        if options["turns"] == 2:
            raise RuntimeError("on cue")
        if options["turns"] == 3:
            raise UnavailableError("index shard 1 is lost")
        return super().locate(images, **options)

    def read_tile_bytes(self, tile_id: int) -> tuple[bytes, str]:
        if tile_id == 7:
            raise StoreError("the store does not answer")
        return super().read_tile_bytes(tile_id)


@pytest.fixture
def gallery(tmp_path: Path) -> FaultyGallery:
    return FaultyGallery(write_stand_in(tmp_path), seconds=0.5)


def request(grey: int, turns: int = 1) -> LocateRequest:
    photo = Photo(f"{grey}.png", make_photo(grey))
    return LocateRequest((photo,), RequestOptions(turns=turns), time.time() + 20)


def test_a_failure_is_that_of_the_requests_with_its_options_alone(gallery: FaultyGallery) -> None:
    async def ask() -> list[Located | Refusal]:
        locator = Locator(gallery)
        first = asyncio.create_task(locator.locate(request(1)))
        while not gallery.batches:  # the others wait for it, and form one batch
            await asyncio.sleep(0.01)
        turns_of = {2: 1, 3: 2, 4: 1, 5: 3}
        others = [locator.locate(request(grey, turns)) for grey, turns in turns_of.items()]
        return await asyncio.gather(first, *others)

    found = asyncio.run(ask())
    assert gallery.batches == [1, 2]
    statuses = [one.status if isinstance(one, Refusal) else 200 for one in found]
    assert statuses == [200, 200, 500, 200, 503]


def test_waiting_page_views_keep_neither_photos_nor_health_waiting(
    gallery: FaultyGallery,
) -> None:
    held = threading.Event()

    async def ask() -> Located | Refusal:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        tiles = loop.run_in_executor(None, held.wait, 20)
        locator = Locator(gallery, reload_s=0.01)
        watch = asyncio.create_task(locator.watch_versions())
        write_stand_in(Path(gallery.uri), version=2)
        try:
            found = await asyncio.wait_for(locator.locate(request(1)), 10)
            while gallery.version != 2:
                await asyncio.sleep(0.01)
            assert not tiles.done()
        finally:
            held.set()
            watch.cancel()
        return found

    assert isinstance(asyncio.run(ask()), Located)


def test_a_store_that_does_not_answer_is_no_missing_tile(gallery: FaultyGallery) -> None:
    locator = Locator(gallery)
    found = [locator.read_tile(tile_id) for tile_id in (7, 10**6)]
    assert [one.status for one in found if isinstance(one, Refusal)] == [503, 404]


def test_memory_that_the_c_library_keeps_goes_back_to_the_system() -> None:
    trimmer = MemoryTrimmer()
    before_mb = read_resident_mb()
    # below the size that the C library always gives back, between blocks that stay
    blocks = [bytes([number % 256]) * 100_000 for number in range(4000)]
    kept = blocks[::40]
    held_mb = read_resident_mb()
    blocks.clear()
    trimmer.trim()
    assert held_mb > before_mb + 350
    assert read_resident_mb() < before_mb + 100
    assert len(kept) == 100


def test_a_replica_that_is_stopped_leaves_the_shards_of_its_gallery(
    gallery: FaultyGallery, one_thread: None
) -> None:
    replica = LocatorReplica(ServeConfig(gallery=gallery.uri), lambda _uri: gallery)
    assert not gallery.is_closed
    del replica
    assert gallery.is_closed
