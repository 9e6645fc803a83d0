"""A stand-in service for the page: the HTTP contract of `s4g serve` over tiles of a Landsat scene.

Photos are matched by their small colour pictures, so that a cut of the scene finds its own tile.
The name of a photo asks for special answers: nowhere* (no answer), busy* (503 twice).
"""

from __future__ import annotations

import importlib.util
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.gallery.search.map_view import MapView

PAGE = Path(__file__).parents[2] / "s4g_ray/serving/page"
PIXELS = 128
SMALL = 10  # pixels of the pictures that are compared
FIRST_ID = 2**62 + 1  # beyond what a JavaScript number holds

Picture = NDArray[np.uint8]


def landsat() -> Path:
    """The Landsat scene that the package localtileserver ships."""
    spec = importlib.util.find_spec("localtileserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tiler/data/landsat.tif"


def small(picture: Picture) -> NDArray[np.float64]:
    """A normalised vector of a picture's coarse colours."""
    size = (SMALL, SMALL)
    flat = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX), float).ravel()
    flat -= flat.mean()
    return flat / max(float(np.linalg.norm(flat)), 1e-9)


def jpeg(picture: Picture) -> bytes:
    """Encode a picture."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=85)
    return data.getvalue()


@dataclass
class SceneGallery:
    """Square tiles of the scene at half-tile steps, about 1,500."""

    size_m: float = 2000.0
    calibrated: bool = True
    token: str | None = None
    ids: list[int] = field(default_factory=list)
    lat: list[float] = field(default_factory=list)
    lon: list[float] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)  # requests by name of the photo
    queries: list[dict[str, str]] = field(default_factory=list)  # of POST /locate

    def cut(self) -> SceneGallery:
        """Cut the tiles; returns itself."""
        import rasterio

        with rasterio.open(landsat()) as scene:
            bands = scene.read([3, 2, 1]).transpose(1, 2, 0).astype(float)
            to_lonlat = scene.transform
        low, high = np.percentile(bands, (1, 99), axis=(0, 1))
        self.scene: Picture = (np.clip((bands - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        middle = to_lonlat.f + to_lonlat.e * self.scene.shape[0] / 2
        across = abs(to_lonlat.a) * METRES_A_DEGREE * np.cos(np.radians(middle))
        wide = self.size_m / across
        high_px = self.size_m / (abs(to_lonlat.e) * METRES_A_DEGREE)
        self.tile_pixels = (round(high_px), round(wide))
        vectors = []
        for top in np.arange(0, self.scene.shape[0] - high_px, high_px / 2):
            for left in np.arange(0, self.scene.shape[1] - wide, wide / 2):
                window = self.window(int(top), int(left))
                name = FIRST_ID + len(self.ids)
                self.ids.append(name)
                self.lon.append(to_lonlat.c + to_lonlat.a * (left + wide / 2))
                self.lat.append(to_lonlat.f + to_lonlat.e * (top + high_px / 2))
                self.images[name] = jpeg(window)
                vectors.append(small(window))
        self.vectors = np.stack(vectors)
        sizes = np.full(len(self.ids), self.size_m)
        self.view = MapView(np.array(self.lat), np.array(self.lon), sizes)
        return self

    def window(self, top: int, left: int) -> Picture:
        """The picture of the tile whose upper left pixel is given, PIXELS on a side."""
        rows, columns = self.tile_pixels
        part = self.scene[top : top + rows, left : left + columns]
        return np.asarray(Image.fromarray(part).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))

    def describe(self) -> dict[str, Any]:
        """The answer of GET /gallery."""
        half = self.size_m / 2 / METRES_A_DEGREE
        return {
            "name": "Great Salt Lake",
            "num_tiles": len(self.ids),
            "version": 3,
            "size_m": self.size_m,
            "bounds": [
                min(self.lon) - half * 1.32,
                min(self.lat) - half,
                max(self.lon) + half * 1.32,
                max(self.lat) + half,
            ],
            "has_calibration": self.calibrated,
            "model": "stand-in",
            "attribution": "Landsat 7 <USGS>",
        }

    def answer(self, photo: Picture, name: str, top: int) -> dict[str, Any]:
        """An answer in the form of Answer.to_json()."""
        scores = self.vectors @ small(photo)
        best = np.argsort(-scores)[: max(top, 5)]
        weights = np.exp((scores[best] - scores[best[0]]) * 25)
        shares = weights / weights.sum() * 0.93
        is_located = not name.startswith("nowhere")
        candidates = [
            {
                "id": self.ids[row],
                "lat": self.lat[row],
                "lon": self.lon[row],
                "size_m": self.size_m,
                "score": float(scores[row]),
                "probability": float(share) * (1.0 if is_located else 0.02)
                if self.calibrated
                else None,
                "turn_deg": None,
                "cells": [self.ids[row]],
            }
            for row, share in zip(best[:top], shares, strict=False)
        ]
        reason = (
            "the best tile has a probability of 1 %, less than the 30 % that this gallery asks for"
        )
        first = candidates[0]
        return {
            "candidates": candidates,
            "lat": first["lat"] if is_located else None,
            "lon": first["lon"] if is_located else None,
            "radius_50_m": 430.0 if self.calibrated and is_located else None,
            "radius_90_m": 1650.0 if self.calibrated and is_located else None,
            "heading_deg": None,
            "is_located": is_located,
            "reason": None if is_located else reason,
            "none_probability": 0.05 if self.calibrated else None,
            "note": None,
            "error": None,
            "refined": None,
            "exif": None,
            "photo": name,
        }


def error(status: int, code: str, message: str, **headers: str) -> JSONResponse:
    """An error in the form of the contract."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": {"code": code, "message": message}}, status, names)


class StandIn:
    """The routes of the contract."""

    def __init__(self, gallery: SceneGallery) -> None:
        self.gallery = gallery
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/gallery", self.describe),
                Route("/gallery/tiles", self.tiles_in_view),
                Route("/tiles/{name:int}", self.tile),
                Route("/locate", self.locate, methods=["POST"]),
                Mount("/static", StaticFiles(directory=PAGE)),
            ]
        )

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    def refused(self, request: Request) -> Response | None:
        expected = self.gallery.token
        if expected is None or request.headers.get("authorization") == f"Bearer {expected}":
            return None
        return error(401, "token", "give the token of this service")

    async def describe(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse(self.gallery.describe())

    async def tiles_in_view(self, request: Request) -> Response:
        refused = self.refused(request)
        if refused is not None:
            return refused
        gallery = self.gallery
        west, south, east, north = map(float, request.query_params["bounds"].split(","))
        limit = int(request.query_params["limit"])
        rows = gallery.view.rows((west, south, east, north), limit)
        tiles = [
            {
                "id": gallery.ids[row],
                "lat": gallery.lat[row],
                "lon": gallery.lon[row],
                "size_m": gallery.size_m,
            }
            for row in rows
        ]
        return JSONResponse({"tiles": tiles})

    async def tile(self, request: Request) -> Response:
        data = self.gallery.images.get(request.path_params["name"])
        if data is None:
            return error(404, "no_tile", "the gallery holds no such tile")
        return self.refused(request) or Response(data, media_type="image/jpeg")

    async def locate(self, request: Request) -> Response:
        refused = self.refused(request)
        if refused is not None:
            return refused
        gallery = self.gallery
        started = time.perf_counter()
        gallery.queries.append(dict(request.query_params))
        async with request.form() as form:
            photo = form["photo"]
            assert isinstance(photo, UploadFile)
            name = str(photo.filename)
            data = await photo.read()
        asked = gallery.asked[name] = gallery.asked.get(name, 0) + 1
        if name.startswith("busy") and asked <= 2:
            return error(503, "busy", "20 photos are waiting, the limit is 20", Retry_After="0.1")
        try:
            picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except OSError:
            message = f"{name}: no image; give a JPEG, PNG or WebP file"
            return error(422, "unreadable_photo", message)
        answer = gallery.answer(picture, name, int(request.query_params["top"]))
        facts = {"uri": "stand-in", "version": 3, "num_tiles": len(gallery.ids)}
        seconds = time.perf_counter() - started
        return JSONResponse({"answers": [answer], "gallery": facts, "seconds": seconds})


@contextmanager
def serving_page(gallery: SceneGallery, port: int = 0) -> Iterator[str]:
    """Serve the page over the gallery from a thread; gives the address."""
    config = uvicorn.Config(StandIn(gallery).app, port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        host, number = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{number}/"
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    with serving_page(SceneGallery().cut(), 8123) as address:
        print(json.dumps({"address": address}), flush=True)
        threading.Event().wait()
