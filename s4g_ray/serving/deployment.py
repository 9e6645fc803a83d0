"""Run Locators as replicas of a Ray Serve deployment, and ask them from the HTTP application."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Gauge, Histogram

from s4g_ray.freed_memory import keeping_variables
from s4g_ray.serving.app import build_app
from s4g_ray.serving.backend import Json, Located, LocateRequest, TileImage
from s4g_ray.serving.config import ServeConfig, make_config, read_token
from s4g_ray.serving.limits import App
from s4g_ray.serving.metrics import BUCKETS, COUNTERS, GAUGES, SECONDS, ServiceMetrics
from s4g_ray.serving.refusal import Refusal

LOCATOR = "locator"
FRONT = "front"
BESIDE = 64  # calls for tiles and facts that a replica takes beside those of the queue
RETRY_PAUSE_S = 0.2  # while Serve notices that a replica is gone


Opener = Callable[[str], Any]  # the address of a gallery -> the opened one


def open_for_service(uri: str) -> Any:
    """Open a gallery and load its encoder, so that the first request does not wait for it."""
    from s4g_ray.gallery.gallery import open_gallery

    gallery = open_gallery(uri)
    gallery.encode([np.zeros((64, 64, 3), np.uint8)])
    return gallery


class LocatorReplica:
    """A replica: the gallery with its encoder and index. Opens it when it starts."""

    def __init__(self, config: ServeConfig, opener: Opener) -> None:
        import torch

        from s4g_ray.serving.locator import Locator

        torch.set_num_threads(config.threads_per_replica or count_threads(config))
        gallery = opener(config.gallery)
        self._locator = Locator(gallery, batch_size=config.batch_size, reload_s=config.reload_s)
        self._watch: asyncio.Task[None] | None = None

    async def locate(self, request: LocateRequest) -> Located | Refusal:
        """Locate the photos of a request."""
        self._start_watch()
        return await self._locator.locate(request)

    async def read_tile(self, tile_id: int) -> TileImage | Refusal:
        """Read the image of a tile."""
        return await asyncio.to_thread(self._locator.read_tile, tile_id)

    async def list_tiles(self, bounds: tuple[float, float, float, float], limit: int) -> Json:
        """List tiles within bounds."""
        return await asyncio.to_thread(self._locator.list_tiles, bounds, limit)

    async def describe(self) -> Json:
        """Return the facts of the gallery."""
        self._start_watch()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._locator.control, self._locator.describe)

    async def check_health(self) -> None:
        """Start the watch for new versions, in the event loop that Ray Serve gives a replica."""
        self._start_watch()

    def __del__(self) -> None:
        """Leave the shards of the gallery; Ray Serve calls it when it stops the replica."""
        locator = getattr(self, "_locator", None)  # none where the gallery could not be opened
        if locator is not None:
            locator.close()

    def _start_watch(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._locator.watch_versions())


def count_threads(config: ServeConfig) -> int:
    """Return the encoder's threads of a replica: the node's processors, shared by the replicas."""
    return max(1, len(os.sched_getaffinity(0)) // config.replica_range[0])


def bind_locator(config: ServeConfig, opener: Opener = open_for_service) -> serve.Application:
    """Return the deployment of the replicas, to be run."""
    least, most = config.replica_range
    options: dict[str, Any] = {"num_replicas": least}
    if least < most:
        autoscaling = AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=config.requests_per_replica,
            upscale_delay_s=config.upscale_after_s,
            downscale_delay_s=config.downscale_after_s,
        )
        options = {"autoscaling_config": autoscaling}
    actor_options: dict[str, Any] = {
        "num_cpus": config.cpus_per_replica,
        "num_gpus": config.gpus_per_replica,
    }
    if not config.gpus_per_replica:
        actor_options["runtime_env"] = {"env_vars": keeping_variables()}
    make: Any = serve.deployment(
        name=LOCATOR,
        # the application's queue is the only one
        max_ongoing_requests=config.max_queue + BESIDE,
        ray_actor_options=actor_options,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=config.max_answer_s,
        graceful_shutdown_wait_loop_s=0.5,
        **options,
    )
    bound: serve.Application = make(LocatorReplica).bind(config, opener)
    return bound


def build_service(values: dict[str, Any]) -> serve.Application:
    """Return the service for Serve's own HTTP proxies, from the `args` of a Serve configuration.

    The application runs in a replica, too. The proxies keep a request's whole body, whatever its
    length: limit it before them; or, where their Python has s4g_ray, name
    s4g_ray.serving.limits:guard_proxy in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Raises
    InputError for unknown or impossible values.
    """
    return bind_service(make_config(values), open_for_service)


def bind_service(config: ServeConfig, opener: Opener) -> serve.Application:
    """Return the deployments of the application and of the replicas behind it."""

    def make_app() -> App:
        name = serve.get_replica_context().app_name
        metrics = ServiceMetrics(RayMirror())
        handle = serve.get_deployment_handle(LOCATOR, app_name=name)
        backend = HandleBackend(handle, config.retries, metrics.count_retry)
        return build_app(
            backend, config, token=read_token(config), hosts=config.hosts, metrics=metrics
        )

    ingress: Any = serve.ingress(make_app)
    make: Any = serve.deployment(
        name=FRONT,
        num_replicas=1,
        max_ongoing_requests=2 * config.max_queue + BESIDE,
        ray_actor_options={"num_cpus": config.cpus_of_front},
    )
    bound: serve.Application = make(ingress()).bind(bind_locator(config, opener))
    return bound


class HandleBackend:
    """Ask the replicas through a handle; a request whose replica dies goes to another one.

    Each call only reads the gallery: it can be made again. on_retry: is called before each.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        retries: int,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self._handle = handle
        self._retries = retries
        self._on_retry = on_retry

    async def locate(self, request: LocateRequest) -> Located | Refusal:
        """Locate the photos of a request."""
        return await self._call("locate", request)  # type: ignore[no-any-return]

    async def read_tile(self, tile_id: int) -> TileImage | Refusal:
        """Read the image of a tile."""
        return await self._call("read_tile", tile_id)  # type: ignore[no-any-return]

    async def list_tiles(self, bounds: tuple[float, float, float, float], limit: int) -> Json:
        """List tiles within bounds."""
        return await self._call("list_tiles", bounds, limit)  # type: ignore[no-any-return]

    async def describe(self) -> Json:
        """Return the facts of the gallery."""
        return await self._call("describe")  # type: ignore[no-any-return]

    async def _call(self, method: str, *arguments: Any) -> Any:
        for tries_left in range(self._retries, -1, -1):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except (RayActorError, RayServeException):
                if not tries_left:
                    raise
                self._on_retry()
                await asyncio.sleep(RETRY_PAUSE_S)
        raise AssertionError


class RayMirror:
    """The service's metrics as Ray's, with `ray_` before names, for Prometheus."""

    def __init__(self) -> None:
        self._counters = {name: Counter(name, text, labels) for name, text, labels in COUNTERS}
        self._gauges = {name: Gauge(name, text, labels) for name, text, labels in GAUGES}
        name, text, labels = SECONDS
        self._seconds = Histogram(name, text, list(BUCKETS), labels)

    def add(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """Add to a counter."""
        self._counters[name].inc(value, dict(tags))

    def observe(self, _name: str, value: float, tags: Mapping[str, str]) -> None:
        """Add a value to the histogram."""
        self._seconds.observe(max(value, 1e-9), dict(tags))

    def set(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """Set a gauge."""
        self._gauges[name].set(value, dict(tags))
