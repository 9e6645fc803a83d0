"""Locator: a gallery in one process that answers requests, in batches. Imports no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from s4g_ray.arrays import Floats64
from s4g_ray.data.area import extent_of_squares
from s4g_ray.errors import BadImageError, InputError, RunError, UnavailableError
from s4g_ray.gallery.answer import Answer
from s4g_ray.gallery.locate import needed_size, needed_values
from s4g_ray.gallery.photos.photo import Photo as DecodedPhoto
from s4g_ray.gallery.photos.photo import decode_photo
from s4g_ray.gallery.search.map_view import MapView
from s4g_ray.serving.backend import Json, Located, LocateRequest, TileImage
from s4g_ray.serving.batching import Batcher
from s4g_ray.serving.limits import MemoryTrimmer
from s4g_ray.serving.options import RequestOptions
from s4g_ray.serving.photo_form import Photo
from s4g_ray.serving.refusal import Refusal

DECODERS = 2  # threads; each holds one photo as it was taken


@dataclass(frozen=True)
class _Job:
    """A request whose photos are decoded."""

    photos: list[DecodedPhoto]
    options: RequestOptions
    expires_at: float
    waits_since: float = field(default_factory=time.monotonic)


class Locator:
    """Answer requests from a gallery: one batch at a time, decoding ahead, reading tiles beside it.

    gallery: as open_gallery returns it. batch_size: photos that are encoded together. reload_s:
    seconds between looks for a newer version, which answers from then on.
    """

    def __init__(self, gallery: Any, *, batch_size: int = 16, reload_s: float = 5.0) -> None:
        self.gallery = gallery
        self._reload_s = reload_s
        self._least = needed_size(gallery)
        self._values = needed_values(gallery)
        self._map_view: tuple[Any, MapView] | None = None  # of the version's tiles
        self._bounds: tuple[Any, list[float] | None] | None = None  # likewise
        # of describe and reload: a page's many tiles do not keep health waiting
        self.control = ThreadPoolExecutor(2, thread_name_prefix="control")
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._batcher: Batcher[_Job, Located | Refusal] = Batcher(
            self._locate_batch, max_size=batch_size, size_of=lambda job: len(job.photos)
        )

    async def locate(self, request: LocateRequest) -> Located | Refusal:
        """Locate the photos of a request.

        A single photo that is damaged is refused (422); one among several has an answer that holds
        its error.
        """
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        decoded = await asyncio.gather(
            *(
                loop.run_in_executor(self._decoders, self._decode, photo, request.expires_at)
                for photo in request.photos
            )
        )
        for one in decoded:
            if isinstance(one, Refusal):
                return one
        photos = [one for one in decoded if isinstance(one, DecodedPhoto)]
        if len(photos) == 1 and photos[0].error is not None:
            return Refusal(422, "bad_photo", f"{photos[0].name}: {photos[0].error}")
        seconds = time.monotonic() - started
        found = await self._batcher.submit(_Job(photos, request.options, request.expires_at))
        if isinstance(found, Refusal):
            return found
        return replace(found, stages={"decode": seconds, **found.stages})

    def read_tile(self, tile_id: int) -> TileImage | Refusal:
        """Read the image of a tile, as stored."""
        try:
            data, content_type = self.gallery.read_tile_bytes(tile_id)
        except KeyError:
            return Refusal(404, "no_tile", f"the gallery holds no tile {tile_id}")
        except RunError as error:
            _logger().error("%s", error)
            text = f"the image of tile {tile_id} cannot be read now; try again later"
            return Refusal(503, "no_image", text, retry_after_s=5)
        return TileImage(data, content_type)

    def describe(self) -> Json:
        """Return the facts of GET /gallery; bounds are west, south, east, north of the tiles."""
        gallery = self.gallery
        info = gallery.info
        tiles = gallery.tiles
        known = self._bounds
        if known is None or known[0] is not tiles:
            known = tiles, find_bounds(tiles.lat, tiles.lon, tiles.size_m)
            self._bounds = known
        return {
            "name": info["name"],
            "version": gallery.version,
            "num_tiles": gallery.num_tiles,
            "size_m": info["size_m"],
            "bounds": known[1],
            "has_calibration": info["has_calibration"],
            "model": info["model"],
            "attribution": info["attribution"],
        }

    def list_tiles(self, bounds: tuple[float, float, float, float], limit: int) -> Json:
        """List the tiles that cover the ground within bounds; none if there are more."""
        tiles = self.gallery.tiles
        known = self._map_view
        if known is None or known[0] is not tiles:
            self._map_view = known = tiles, MapView(tiles.lat, tiles.lon, tiles.size_m)
        rows = known[1].rows(bounds, limit)
        found = [
            {
                "id": int(tiles.ids[row]),
                "lat": float(tiles.lat[row]),
                "lon": float(tiles.lon[row]),
                "size_m": float(tiles.size_m[row]),
            }
            for row in rows
        ]
        return {"tiles": found}

    def close(self) -> None:
        """Leave what the gallery holds on a cluster."""
        self.gallery.close()

    async def watch_versions(self) -> None:
        """Look for newer versions of the gallery, and give memory back, until cancelled."""
        loop = asyncio.get_running_loop()
        trimmer = MemoryTrimmer()
        while True:
            await asyncio.sleep(self._reload_s)
            await loop.run_in_executor(self.control, self.reload)
            await loop.run_in_executor(self.control, trimmer.trim)

    def reload(self) -> bool:
        """Take a newer version of the gallery, if there is one; the present one answers meanwhile.

        A version that cannot be opened is logged, and tried again at the next look.
        """
        try:
            return bool(self.gallery.reload())
        except Exception:
            _logger().exception("%s cannot be opened again; its version stays", self.gallery.uri)
            return False

    def _decode(self, photo: Photo, expires_at: float) -> DecodedPhoto | Refusal:
        if time.time() > expires_at:
            return _too_late()
        if photo.error is not None:
            return DecodedPhoto(photo.name, None, error=photo.error)
        try:
            return decode_photo(photo.data, photo.name, least=self._least, values=self._values)
        except BadImageError as error:
            reason = str(error).removeprefix(f"{photo.name}: ")
            return DecodedPhoto(photo.name, None, error=reason)

    def _locate_batch(self, jobs: Sequence[_Job]) -> list[Located | Refusal]:
        """Locate jobs with equal options together; leave out those that nobody waits for."""
        started = time.monotonic()
        groups: dict[RequestOptions, list[int]] = {}
        found: list[Located | Refusal] = [_too_late() for _ in jobs]
        now = time.time()
        for row, job in enumerate(jobs):
            if now <= job.expires_at:
                groups.setdefault(job.options, []).append(row)
        for options, rows in groups.items():
            answers = self._answer_group(options, [jobs[row] for row in rows])
            seconds = time.monotonic() - started
            for row, answer in zip(rows, answers, strict=True):
                if isinstance(answer, Located):
                    waited = started - jobs[row].waits_since
                    answer = replace(answer, stages={"wait": waited, "locate": seconds})
                found[row] = answer
        return found

    def _answer_group(
        self, options: RequestOptions, jobs: Sequence[_Job]
    ) -> Sequence[Located | Refusal]:
        """Locate jobs with the same options; a failure is theirs alone, not the batch's."""
        try:
            return self._locate_group(options, jobs)
        except InputError as error:
            return [Refusal(422, "bad_parameter", str(error))] * len(jobs)
        except UnavailableError as error:
            _logger().error("%s", error)
            text = "a part of the index is away and is started again; try again later"
            return [Refusal(503, "no_index", text, retry_after_s=5)] * len(jobs)
        except Exception:
            _logger().exception("%d requests failed together", len(jobs))
            return [Refusal(500, "failed", "the service failed to answer")] * len(jobs)

    def _locate_group(
        self, options: RequestOptions, jobs: Sequence[_Job]
    ) -> Sequence[Located | Refusal]:
        photos = [photo for job in jobs for photo in job.photos]
        gallery = self.gallery
        about = {
            "uri": gallery.uri,
            "version": gallery.version,
            "num_tiles": gallery.num_tiles,
        }
        answers: list[Answer] = gallery.locate(photos, **options.keywords())
        found = []
        for job in jobs:
            own = answers[: len(job.photos)]
            answers = answers[len(job.photos) :]
            shown = [one.to_geojson() if options.as_geojson else one.to_json() for one in own]
            found.append(Located(shown, [_kind_of(one) for one in own], about))
        return found


def _kind_of(answer: Answer) -> str:
    if answer.error is not None:
        return "unreadable"
    return "located" if answer.is_located else "none"


def find_bounds(lat: Floats64, lon: Floats64, size_m: Floats64) -> list[float] | None:
    """Return west, south, east, north around the ground of tiles [N]; None without coordinates.

    East is below west where they cross the antimeridian. The longitudes are those outside the
    widest gap between tiles.
    """
    known = np.isfinite(lat) & np.isfinite(lon)
    if not known.any():
        return None
    west, south, east, north = extent_of_squares(lat[known], lon[known], size_m[known])
    return [west, south, east - 360 if east > 180 else east, north]


def _too_late() -> Refusal:
    return Refusal(503, "too_late", "the request waited too long; try again later", retry_after_s=2)


def _logger() -> Any:
    import logging

    return logging.getLogger("s4g_ray.serving")
