"""Serve a gallery on a port of this machine: replicas in Ray, the HTTP application here.

The application stands in the process that reads the sockets, not behind Ray Serve's proxy, which
keeps a request's whole body, whatever its length.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import socket
import sys
import termios
import time
import warnings
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
MAX_HEAD = 64_000  # bytes of a request's head
WRITE_S = 30.0  # for a client to take a part of what is sent
LEAST_READ = 4_000  # bytes of that part: each connection that waits holds an answer in memory
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
        number = getattr(error, "errno", None)  # its text repeats the address
        reason = os.strerror(number) if number and number > 0 else error
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
    on_open: Callable[[], None] = lambda: None,
    on_start: Callable[[str], None] = lambda _address: None,
) -> None:
    """Serve a gallery until SIGINT or SIGTERM; requests in progress are answered first.

    opener: opens the gallery in a replica. on_open: is called before anything starts, once the
    token and the port are known to be good. on_start: is given the address, once the service
    answers. Raises InputError for a missing token, a port in use and replicas without room;
    RunError when the replicas cannot start.
    """
    token = read_token(config)
    with contextlib.closing(open_port(config)) as listening:
        on_open()
        port = listening.getsockname()[1]
        cluster = cluster or RayConfig(metrics_port=config.metrics_port)
        with ray_session(cluster, storage or StorageConfig()) as nodes:
            if not (cluster.address or os.environ.get("RAY_ADDRESS")):
                check_room(config, nodes)
            name = f"s4g-serve-{port}"
            metrics = ServiceMetrics(RayMirror())
            with running_replicas(config, name, opener) as handle:
                backend = HandleBackend(handle, config.retries, metrics.count_retry)
                app = build_app(
                    backend, config, token=token, hosts=config.allowed_hosts, metrics=metrics
                )
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
            if not serve.status().applications:  # else later ones would have no HTTP proxy
                serve.shutdown()  # type: ignore[no-untyped-call]


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


def count_unread(transport: asyncio.Transport) -> int:
    """Return the bytes that a client has not received: in this process and in the system.

    The system's queue holds megabytes, which a slow client reads for minutes.
    """
    waiting = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    if connection is None:
        return waiting
    queued = bytearray(4)
    with contextlib.suppress(OSError):  # a system that does not count them
        fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, queued)
    return waiting + int.from_bytes(queued, sys.byteorder)


class HeadTimeoutProtocol(HttpToolsProtocol):
    """Close a connection whose request's head takes more than HEADERS_S seconds or MAX_HEAD bytes.

    That holds for each request of a connection, for the trailers of a body, and for bytes that are
    no request at all.
    """

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _is_head = True  # no head is complete since the last request
    _num_head = 0  # bytes of the address and the finished headers
    _num_held = 0  # bytes that the parser keeps: an unfinished header is shown to nobody
    _num_steps = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the clock of a client that does not read: what is sent to it fills memory."""
        super().pause_writing()
        self._stop_write_timer()
        self._await_reading()

    def _await_reading(self) -> None:
        """Close the connection in WRITE_S, unless the client takes LEAST_READ bytes or more."""
        waiting = count_unread(self.transport)

        def check() -> None:
            if count_unread(self.transport) <= waiting - LEAST_READ:
                self._await_reading()
            else:
                self.transport.abort()

        self._write_timer = self.loop.call_later(WRITE_S, check)

    def resume_writing(self) -> None:
        """Stop that clock."""
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse bytes; close the connection when too many bring the request no further."""
        steps = self._num_steps
        super().data_received(data)
        if self._num_steps > steps:
            self._num_held = 0
            return
        self._num_held += len(data)
        if self._num_held > MAX_HEAD:
            self.transport.close()
        elif self._is_head:
            self._start_timer()

    def on_message_begin(self) -> None:
        """Start the clock of a request's head."""
        super().on_message_begin()
        self._num_steps += 1
        self._num_head = 0
        self._is_head = True
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        """Count the bytes of an address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count the bytes of a header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the clock."""
        self._num_steps += 1
        self._is_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Note that the request has come further."""
        self._num_steps += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a head comes next."""
        self._num_steps += 1
        self._is_head = True
        super().on_message_complete()

    def _count(self, length: int) -> None:
        self._num_head += length
        if self._num_head > MAX_HEAD:
            raise ValueError  # the server answers 400 and closes

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self._close_without_head)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _close_without_head(self) -> None:
        self._timer = None
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.close()
        else:  # the request before it is being answered
            self._start_timer()


class _Server(uvicorn.Server):
    """A server that calls a function once it listens, and returns after SIGINT and SIGTERM."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop by a signal; uvicorn would raise it again, before the replicas have ended."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def listen(app: App, listening: socket.socket, on_start: Callable[[], None]) -> None:
    """Answer requests on a socket until SIGINT or SIGTERM."""
    _raise_file_limit()
    # they warn of each damaged form and photo
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")
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
    _Server(config, on_start).run(sockets=[listening])


def _raise_file_limit() -> None:
    """Allow as many connections as the system does: a slow one holds a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        if wanted > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
