"""A service on a port of this process, with a gallery in it, and clients that speak HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from s4g_ray.serving.app import build_app
from s4g_ray.serving.backend import Json, Located, LocateRequest, TileImage
from s4g_ray.serving.config import ServeConfig
from s4g_ray.serving.locator import Locator
from s4g_ray.serving.metrics import ServiceMetrics
from s4g_ray.serving.refusal import Refusal
from s4g_ray.serving.server import HeadTimeoutProtocol

BOUNDARY = "cut-here"


class LocalBackend:
    """Answers from a locator of this process."""

    def __init__(self, locator: Locator) -> None:
        self._locator = locator

    async def locate(self, request: LocateRequest) -> Located | Refusal:
        return await self._locator.locate(request)

    async def read_tile(self, tile_id: int) -> TileImage | Refusal:
        return self._locator.read_tile(tile_id)

    async def list_tiles(self, bounds: tuple[float, float, float, float], limit: int) -> Json:
        return self._locator.list_tiles(bounds, limit)

    async def describe(self) -> Json:
        return self._locator.describe()


@dataclass(frozen=True)
class Answered:
    status: int
    headers: Mapping[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def code(self) -> str:
        """The code of an error."""
        return str(self.json["error"]["code"])


@dataclass(frozen=True)
class Client:
    """Sends requests to a port of this machine, each over its own connection."""

    port: int
    timeout_s: float = 30.0

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answered:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answered(response.status, names, response.read())

    def get(self, path: str, **headers: str) -> Answered:
        return self.ask("GET", path, headers=headers)

    def locate(
        self, *photos: bytes, query: str = "", names: Sequence[str] = (), **headers: str
    ) -> Answered:
        body = make_form(photos, names)
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        return self.ask("POST", f"/locate{query}", body, {**kind, **headers})


def make_form(photos: Sequence[bytes], names: Sequence[str] = ()) -> bytes:
    parts = []
    for number, photo in enumerate(photos):
        name = names[number] if names else f"{number}.jpg"
        head = f'Content-Disposition: form-data; name="photo"; filename="{name}"'
        parts.append(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + photo + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def make_photo(grey: int = 100, size: int = 48, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), grey, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@contextlib.contextmanager
def local_service(
    gallery: Any, token: str | None = None, hosts: Sequence[str] = (), **settings: Any
) -> Iterator[tuple[Client, ServiceMetrics]]:
    """Serve a gallery of this process."""
    config = ServeConfig(gallery=gallery.uri, **settings)
    metrics = ServiceMetrics()
    backend = LocalBackend(Locator(gallery, batch_size=config.batch_size))
    with served(build_app(backend, config, token=token, hosts=hosts, metrics=metrics)) as client:
        yield client, metrics


@contextlib.contextmanager
def served(app: Any) -> Iterator[Client]:
    """Answer from an application in a thread."""
    options = uvicorn.Config(
        app, http=HeadTimeoutProtocol, lifespan="on", log_level="error", access_log=False
    )
    server = uvicorn.Server(options)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True
        )
        thread.start()
        while not server.started and thread.is_alive():
            thread.join(0.01)
        try:
            yield Client(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
