"""Backend: what the HTTP application asks of the processes that hold the gallery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from s4g_ray.serving.options import RequestOptions
from s4g_ray.serving.photo_form import Photo
from s4g_ray.serving.refusal import Refusal

Json = dict[str, Any]


@dataclass(frozen=True)
class LocateRequest:
    """The photos of a request. `expires_at` is a time (time.time()) after which nobody waits."""

    photos: tuple[Photo, ...]
    options: RequestOptions
    expires_at: float


@dataclass(frozen=True)
class Located:
    """The answers of a request, one a photo: those of Answer.to_json, or of Answer.to_geojson.

    kinds: of each answer: located, none or unreadable.
    """

    answers: list[Json]
    kinds: list[str]
    gallery: Json  # uri, version, num_tiles
    stages: dict[str, float] = field(default_factory=dict)  # seconds by stage


@dataclass(frozen=True)
class TileImage:
    """The bytes of a tile's image, as stored."""

    data: bytes
    content_type: str


class Backend(Protocol):
    """Answer requests. A refusal is returned, not raised: it passes between processes."""

    async def locate(self, request: LocateRequest) -> Located | Refusal:
        """Locate the photos of a request."""

    async def read_tile(self, tile_id: int) -> TileImage | Refusal:
        """Read the image of a tile."""

    async def list_tiles(self, bounds: tuple[float, float, float, float], limit: int) -> Json:
        """List tiles within west, south, east, north, as GET /gallery/tiles gives them."""

    async def describe(self) -> Json:
        """Return the facts of GET /gallery."""
