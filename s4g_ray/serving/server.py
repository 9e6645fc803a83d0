"""Serve a gallery on a port of this machine: replicas in Ray, the HTTP application here.

The application stands in the process that reads the sockets, not behind Ray Serve's proxy, which
keeps a request's whole body, whatever its length.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed.placement import Node
from s4g_ray.distributed.session import ray_session
from s4g_ray.errors import InputError, RunError, reason_of
from s4g_ray.serving.app import build_app
from s4g_ray.serving.config import ServeConfig, read_token
from s4g_ray.serving.deployment import (
    HandleBackend,
    Opener,
    RayMirror,
    bind_locator,
    open_for_service,
)
from s4g_ray.serving.limits import App
from s4g_ray.serving.metrics import ServiceMetrics
from s4g_ray.storage import files
from s4g_ray.storage.s3_settings import StorageConfig

HEADERS_S = 10.0  # to receive a request's head, or to send the first one
STOP_S = 10  # for requests in progress, when the service is stopped
BACKLOG = 1024  # connections that wait to be accepted


def check_gallery(uri: str) -> str:
    """Return a gallery's name and version. Raises InputError for what is no gallery."""
    from s4g_ray.gallery.store.header import GalleryHeader

    header = GalleryHeader.load(files.absolute(uri))
    return f"{header.name}, version {header.current}"


def open_port(config: ServeConfig) -> socket.socket:
    """Return a listening socket. Raises InputError for a port or host that cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"port {config.port} of {config.host} cannot be used: {reason}; choose another with"
            " --port, or stop what uses it"
        ) from error


def check_room(config: ServeConfig, nodes: list[Node]) -> None:
    """Check that the nodes have room for the smallest number of replicas. Raises InputError."""
    least = config.replica_range[0]
    for kind, each in (("cpus", config.cpus_per_replica), ("gpus", config.gpus_per_replica)):
        room = sum(int(getattr(node, kind) / each) for node in nodes) if each else least
        if room < least:
            raise InputError(
                f"replicas={least} with {kind}_per_replica={each:g}: the nodes have room for"
                f" {room}; lower replicas or {kind}_per_replica"
            )


def run_service(
    config: ServeConfig,
    *,
    cluster: RayConfig | None = None,
    storage: StorageConfig | None = None,
    opener: Opener = open_for_service,
    on_start: Callable[[str], None] = lambda _address: None,
) -> None:
    """Serve a gallery until SIGINT or SIGTERM; requests in progress are answered first.

    opener: opens the gallery in a replica. on_start: is given the address, once the service
    answers. Raises InputError for a port in use,
    a missing token and replicas without room; RunError when the replicas cannot start.
    """
    token = read_token(config)
    with contextlib.closing(open_port(config)) as listening:
        port = listening.getsockname()[1]
        cluster = cluster or RayConfig()
        with ray_session(cluster, storage or StorageConfig()) as nodes:
            if not (cluster.address or os.environ.get("RAY_ADDRESS")):
                check_room(config, nodes)
            name = f"s4g-serve-{port}"
            metrics = ServiceMetrics(RayMirror())
            with running_replicas(config, name, opener) as handle:
                backend = HandleBackend(handle, config.retries, metrics.count_retry)
                app = build_app(backend, config, token=token, metrics=metrics)
                host = f"[{config.host}]" if ":" in config.host else config.host
                listen(app, listening, lambda: on_start(f"http://{host}:{port}/"))


@contextlib.contextmanager
def running_replicas(
    config: ServeConfig, name: str, opener: Opener = open_for_service
) -> Iterator[DeploymentHandle[Any]]:
    """Start the replicas as a Serve application and yield its handle; delete it at the end.

    Raises RunError when they cannot start in time.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=quiet)
    try:
        target = serve.RunTarget(bind_locator(config, opener), name, None, quiet)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        await_replicas(name, config)
        yield handle
    finally:
        with contextlib.suppress(Exception):
            serve.delete(name)


def await_replicas(name: str, config: ServeConfig) -> None:
    """Wait until all replicas have opened the gallery. Raises RunError with Serve's reason."""
    deadline = time.monotonic() + config.start_timeout_s
    while time.monotonic() < deadline:
        found = serve.status().applications.get(name)
        if found is not None and found.status == ApplicationStatus.RUNNING:
            return
        if found is not None and found.status == ApplicationStatus.DEPLOY_FAILED:
            texts = [one.message for one in found.deployments.values()]
            reason = reason_of(RuntimeError("\n".join([found.message, *texts])))
            raise RunError(f"the replicas cannot open the gallery: {reason}")
        time.sleep(0.1)
    raise RunError(
        f"the replicas did not open the gallery within start_timeout_s={config.start_timeout_s:g};"
        " raise it, or look whether the cluster has room for them"
    )


class HeadTimeoutProtocol(HttpToolsProtocol):
    """Close a connection that has not sent a request's head within HEADERS_S seconds."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self.loop.call_later(HEADERS_S, self._close_without_request)

    def _close_without_request(self) -> None:
        cycle: object | None = self.cycle
        if cycle is None:
            self.transport.close()


class _Server(uvicorn.Server):
    """A server that calls a function once it listens."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_start()


def listen(app: App, listening: socket.socket, on_start: Callable[[], None]) -> None:
    """Answer requests on a socket until SIGINT or SIGTERM."""
    _raise_file_limit()
    # it warns of each damaged form
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=HeadTimeoutProtocol,
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=STOP_S,
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after it has stopped
        _Server(config, on_start).run(sockets=[listening])


def _raise_file_limit() -> None:
    """Allow as many connections as the system does: a slow one holds a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        if wanted > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
