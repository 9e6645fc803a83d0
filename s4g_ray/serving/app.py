"""Build the HTTP application: its routes, and the form of its answers and errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from s4g_ray import __version__
from s4g_ray.serving.backend import Backend, Json, Located, LocateRequest
from s4g_ray.serving.config import ServeConfig
from s4g_ray.serving.limits import Admission, App, MemoryTrimmer, UploadGuard
from s4g_ray.serving.metrics import ServiceMetrics
from s4g_ray.serving.options import (
    LOCATE_SCHEMA,
    RequestOptions,
    check_names,
    read_bounds,
    read_count,
)
from s4g_ray.serving.photo_form import check_photos, read_photos
from s4g_ray.serving.refusal import Refusal

PAGE = Path(__file__).parent / "page"
PROBE_S = 2.0  # seconds between questions for the state of the gallery
STALE_S = 15.0  # without an answer to them: not ready
CHECKERS = 2  # threads that look at photos' headers
MAX_ID_DIGITS = 19
MAX_LISTED = 2000  # tiles in one answer
# the page loads nothing from elsewhere
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline';"
    " object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CODES = {404: "not_found", 405: "bad_method", 400: "bad_request"}


class GalleryState:
    """The facts of the gallery, asked for again and again: health costs no request of a replica."""

    def __init__(self, backend: Backend, metrics: ServiceMetrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._facts: Json | None = None
        self._answered = -STALE_S

    async def watch(self) -> None:
        """Ask every PROBE_S seconds, and give memory back, until cancelled."""
        trimmer = MemoryTrimmer()
        while True:
            with contextlib.suppress(Exception):
                await self.refresh()
            await asyncio.to_thread(trimmer.trim)
            await asyncio.sleep(PROBE_S)

    async def refresh(self) -> None:
        """Ask now."""
        self._facts = await asyncio.wait_for(self._backend.describe(), STALE_S)
        self._answered = time.monotonic()
        self._metrics.set_gallery(self._facts["version"], self._facts["num_tiles"])

    async def read(self) -> Json:
        """Return the facts of the gallery. Raises Refusal (503) while no replica answers."""
        if self._facts is None or time.monotonic() - self._answered > STALE_S:
            try:
                await self.refresh()
            except Exception as error:
                raise Refusal(
                    503, "not_ready", "no replica answers yet; try again later", retry_after_s=2
                ) from error
        assert self._facts is not None
        return self._facts


def build_app(
    backend: Backend,
    config: ServeConfig,
    *,
    token: str | None = None,
    hosts: Sequence[str] = (),
    metrics: ServiceMetrics | None = None,
    page: Path = PAGE,
) -> App:
    """Return the ASGI application of a service.

    token: that requests must send; None: none. hosts: the names by which they may call the service;
    none: any. page: the folder of the page's files.
    """
    metrics = metrics or ServiceMetrics()
    admission = Admission(config.max_queue, metrics.set_queue)
    state = GalleryState(backend, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(state.watch())
        yield
        task.cancel()

    # /docs and /redoc load scripts from elsewhere
    app = FastAPI(
        title="s4g serve",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # they would lead to the host that the request names
        lifespan=lifespan,
    )
    _add_errors(app, metrics)
    _add_locate(app, backend, config, admission, metrics)
    _add_gallery(app, backend, state)
    _add_page(app, page)

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def count(path: str, refusal: Refusal) -> None:
        metrics.count_refusal(refusal.code)
        metrics.count_request(_route_of(path), refusal.status)

    return UploadGuard(app, config, token=token, hosts=hosts, admission=admission, on_refusal=count)


def _add_locate(
    app: FastAPI,
    backend: Backend,
    config: ServeConfig,
    admission: Admission,
    metrics: ServiceMetrics,
) -> None:
    checkers = ThreadPoolExecutor(CHECKERS, thread_name_prefix="check")

    async def check_and_locate(asked: LocateRequest) -> Located | Refusal:
        loop = asyncio.get_running_loop()
        photos = await loop.run_in_executor(checkers, check_photos, asked.photos, config)
        return await backend.locate(replace(asked, photos=photos))

    @app.post("/locate", openapi_extra=LOCATE_SCHEMA)
    async def locate(request: Request) -> Response:
        """Locate one or more photos. A bad one among several has its error in its answer."""
        started = time.monotonic()
        with admission.admit():
            options = RequestOptions.from_query(request.query_params)
            photos = await read_photos(request, config)
            asked = LocateRequest(tuple(photos), options, time.time() + config.max_answer_s)
            try:
                found = await asyncio.wait_for(check_and_locate(asked), config.max_answer_s)
            except TimeoutError:
                raise Refusal(
                    503,
                    "too_late",
                    f"no answer within {config.max_answer_s:g} s, the most that is allowed; try"
                    " again later, with fewer photos or turns",
                    retry_after_s=config.max_answer_s / 2,
                ) from None
        if isinstance(found, Refusal):
            raise found
        seconds = time.monotonic() - started
        metrics.observe_stages({**found.stages, "total": seconds})
        metrics.count_answers(found.kinds)
        body = {
            "answers": found.answers,
            "gallery": found.gallery,
            "seconds": round(seconds, 4),
        }
        if options.as_geojson:
            return _geojson_of(body)
        return JSONResponse(body)


def _geojson_of(body: Json) -> Response:
    """Return one FeatureCollection of all photos, whose features name their photo's number."""
    features = []
    for number, collection in enumerate(body.pop("answers")):
        for feature in collection["features"]:
            properties = {**(feature.get("properties") or {}), "photo_number": number}
            features.append({**feature, "properties": properties})
    value = {"type": "FeatureCollection", "features": features, **body}
    return Response(json.dumps(value, allow_nan=False), media_type="application/geo+json")


def _add_gallery(app: FastAPI, backend: Backend, state: GalleryState) -> None:
    @app.get("/gallery")
    async def describe_gallery() -> Json:
        """Describe the gallery that answers."""
        return await state.read()

    @app.get("/gallery/tiles")
    async def list_tiles(
        request: Request, bounds: str = "-180,-90,180,90", limit: str = "200"
    ) -> Json:
        """List tiles that cover the ground within bounds=W,S,E,N; none if more than `limit`."""
        check_names(request.query_params, ("bounds", "limit"))
        asked = read_bounds(bounds)
        return await backend.list_tiles(asked, read_count("limit", limit, MAX_LISTED))

    @app.get("/healthz")
    async def check_health() -> Json:
        """Answer 200 while a replica answers, else 503."""
        facts = await state.read()
        return {
            "status": "ok",
            "gallery": facts["name"],
            "gallery_version": facts["version"],
            "num_tiles": facts["num_tiles"],
            "version": __version__,
        }

    @app.get("/tiles/{tile_id}", response_class=Response)
    async def read_tile(tile_id: str) -> Response:
        """Return the image of a tile, as it is stored."""
        is_id = tile_id.isascii() and tile_id.isdigit() and len(tile_id) <= MAX_ID_DIGITS
        if not is_id or int(tile_id) >= 2**63:
            raise Refusal(404, "no_tile", "a tile's id is a whole number; see the candidates")
        found = await backend.read_tile(int(tile_id))
        if isinstance(found, Refusal):
            raise found
        headers = {"Cache-Control": "private, max-age=300"}
        return Response(found.data, media_type=found.content_type, headers=headers)


def _add_page(app: FastAPI, page: Path) -> None:
    if not page.is_dir():
        return
    app.mount("/static", StaticFiles(directory=page), name="static")

    @app.get("/", include_in_schema=False)
    async def show_page() -> FileResponse:
        return FileResponse(page / "index.html", headers={"Cache-Control": "no-cache"})


def _add_errors(app: FastAPI, metrics: ServiceMetrics) -> None:
    """Give all answers their headers, count them, and give all errors one form."""

    def answer(refusal: Refusal) -> Response:
        metrics.count_refusal(refusal.code)
        return Response(
            refusal.body(),
            status_code=refusal.status,
            headers=dict(refusal.headers()),
            media_type="application/json",
        )

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return answer(refusal)

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> Response:
        code = CODES.get(error.status_code, "failed")
        return answer(Refusal(error.status_code, code, str(error.detail)))

    @app.middleware("http")
    async def finish(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        try:
            response = await call_next(request)
        except Exception as error:  # one answer for all of them; the log has the traceback
            _log_failure(request, error)
            response = answer(Refusal(500, "failed", "the service failed to answer"))
        response.headers.update(SECURITY_HEADERS)
        metrics.count_request(_route_of(request.url.path), response.status_code)
        return response


def _log_failure(request: Request, error: Exception) -> None:
    import logging

    logging.getLogger("s4g_ray.serving").error(
        "%s %s failed", request.method, _route_of(request.url.path), exc_info=error
    )


def _route_of(path: str) -> str:
    """Return the route of a path, for metrics: few values, none of the sender's choice."""
    first = "/" + path.lstrip("/").partition("/")[0]
    known = ("/", "/locate", "/tiles", "/gallery", "/healthz", "/metrics", "/static")
    return first if first in known else "other"
