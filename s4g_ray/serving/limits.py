"""Bound what requests may take: bytes, seconds, and the number that is answered at one time.

UploadGuard is plain ASGI: it stands before the application, in the process that reads the socket.
"""

from __future__ import annotations

import asyncio
import ctypes
import resource
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from s4g_ray.serving.config import MB, ServeConfig
from s4g_ray.serving.refusal import Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

BODILESS = ("GET", "HEAD", "OPTIONS")
# without a token: the page asks for one, and a probe of Kubernetes has none
PROBE = "/healthz"
OPEN_PATHS = ("/", PROBE, "/favicon.ico")
OPEN_FOLDER = "/static/"
DRAINED = 4  # a body of up to so many times its limit is read to its end, so that its sender hears
DRAIN_S = 2.0  # and for so long
KEPT_MB = 200  # of freed memory that a process keeps
TRIM_S = 15.0
LATENCIES = 16  # of the last answers, whose mean tells when to try again


class Admission:
    """Count the requests that wait or are answered, and refuse those beyond a limit.

    on_change: is given each new count.
    """

    def __init__(
        self, max_queue: int, on_change: Callable[[int], None] = lambda _num_admitted: None
    ) -> None:
        self.max_queue = max_queue
        self._on_change = on_change
        self.num_admitted = 0
        self._latencies: deque[float] = deque(maxlen=LATENCIES)

    def check(self) -> None:
        """Raise Refusal (503) while the queue is full."""
        if self.num_admitted >= self.max_queue:
            mean_s = sum(self._latencies) / max(1, len(self._latencies))
            raise Refusal(
                503,
                "overloaded",
                f"{self.num_admitted} requests wait, the most that are allowed; try again later",
                retry_after_s=max(1.0, mean_s),
            )

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place in the queue within the block. Raises Refusal (503) while it is full."""
        self.check()
        self.num_admitted += 1
        self._on_change(self.num_admitted)
        started = time.monotonic()
        try:
            yield
        finally:
            self.num_admitted -= 1
            self._on_change(self.num_admitted)
            self._latencies.append(time.monotonic() - started)


class UploadGuard:
    """Check the token, and receive a request's whole body within its limits, before the app runs.

    A body is held in memory, never in a file. What arrives beyond a limit is not kept.

    hosts: the names by which requests may call the service; none: any. admission: of the
    application behind; None where it is in another process. on_refusal: is given the path and the
    refusal.
    """

    def __init__(
        self,
        app: App,
        config: ServeConfig,
        *,
        token: str | None = None,
        hosts: Sequence[str] = (),
        admission: Admission | None = None,
        on_refusal: Callable[[str, Refusal], None] = lambda _path, _refusal: None,
    ) -> None:
        self._app = app
        self._token = token.encode() if token else None
        self._hosts = frozenset(name.lower().encode() for name in hosts)
        self._max_body = round(config.max_request_mb * MB)
        self._max_buffered = round(config.max_buffered_mb * MB)
        self._max_upload_s = config.max_upload_s
        self._admission = admission
        self._on_refusal = on_refusal
        self.num_buffered = 0  # bytes of all bodies

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request. WebSockets are not served."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        body = _Body(self)
        try:
            self._check_host(scope)
            self._check_site(scope)
            self._check_token(scope)
            if scope["method"] not in BODILESS:
                await self._receive_body(scope, receive, body)
        except Refusal as refusal:
            body.release()
            self._on_refusal(scope["path"], refusal)
            await send_refusal(send, refusal, is_read=body.is_complete)
        except ConnectionError:  # the sender has gone
            body.release()
        else:
            try:
                await self._app(scope, body.replay(receive), send)
            finally:
                body.release()

    def _check_host(self, scope: MutableMapping[str, Any]) -> None:
        """Refuse another name: a site may let its own name point here, to read the answers."""
        host = _header(scope, b"host").lower()
        name = host if host.endswith(b"]") else host.rpartition(b":")[0] or host
        if not self._hosts or not name or name in self._hosts or scope["path"] == PROBE:
            return
        shown = name.decode("ascii", "replace")[:80]
        raise Refusal(
            421,
            "wrong_host",
            f"this service does not answer to the name {shown!r}; start it with"
            f" 'hosts=[{shown}]' to allow it",
        )

    def _check_site(self, scope: MutableMapping[str, Any]) -> None:
        """Refuse what a page of another site asks for; it may link to the page."""
        path = scope["path"]
        if _header(scope, b"sec-fetch-site") != b"cross-site" or path in OPEN_PATHS:
            return
        raise Refusal(
            403,
            "cross_site",
            "a page of another site asks; use the page of this service, or a program",
        )

    def _check_token(self, scope: MutableMapping[str, Any]) -> None:
        path = scope["path"]
        if self._token is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        kind, _, given = _header(scope, b"authorization").partition(b" ")
        if kind.lower() == b"bearer" and secrets.compare_digest(given.strip(), self._token):
            return
        raise Refusal(
            401, "unauthorized", "this service needs a token; send `Authorization: Bearer TOKEN`"
        )

    async def _receive_body(
        self, scope: MutableMapping[str, Any], receive: Receive, body: _Body
    ) -> None:
        declared = _header(scope, b"content-length")
        length = int(declared) if declared.isdigit() and len(declared) < 20 else 0
        refusal = self._find_early_refusal(length)
        if refusal is not None and length > DRAINED * self._max_body:
            raise refusal
        deadline = time.monotonic() + self._max_upload_s
        num_received = 0
        while not body.is_complete:
            if refusal is not None:
                deadline = min(deadline, time.monotonic() + DRAIN_S)
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise refusal or self._too_slow(num_received) from None
            if message["type"] != "http.request":
                raise ConnectionError
            chunk = message.get("body", b"")
            num_received += len(chunk)
            body.is_complete = not message.get("more_body", False)
            if refusal is None:
                refusal = self._find_refusal(num_received, len(chunk))
            if refusal is None:
                body.add(chunk)
            else:
                body.release()
                if num_received > DRAINED * self._max_body:
                    raise refusal
        if refusal is not None:
            raise refusal

    def _find_early_refusal(self, length: int) -> Refusal | None:
        if self._admission is not None:
            try:
                self._admission.check()
            except Refusal as refusal:
                return refusal
        return self._find_refusal(length, 0)

    def _find_refusal(self, num_received: int, num_more: int) -> Refusal | None:
        if num_received > self._max_body:
            return Refusal(
                413,
                "too_large",
                f"the request is larger than {self._max_body / MB:g} MB, the most that is allowed;"
                " send fewer or smaller photos",
            )
        if self.num_buffered + num_more > self._max_buffered:
            return Refusal(
                503,
                "overloaded",
                "other requests are being received and fill the memory for it; try again later",
                retry_after_s=1,
            )
        return None

    def _too_slow(self, num_received: int) -> Refusal:
        return Refusal(
            408,
            "too_slow",
            f"{num_received} bytes of the request arrived within {self._max_upload_s:g} s, the most"
            " that is allowed; send smaller photos or use a faster connection",
        )


class MemoryTrimmer:
    """Give freed memory back to the system; the C library keeps it for itself.

    In a trial, 900 MB of two threads that had decoded photos of 64 million pixels.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._start_mb = read_resident_mb()
        self._trimmed_at = -TRIM_S

    def trim(self) -> None:
        """Give back what is free while the process is KEPT_MB larger than it was at first.

        That takes tenths of seconds, and is done every TRIM_S seconds at most: what is freed later
        is not seen in the size of the process.
        """
        now = time.monotonic()
        is_large = read_resident_mb() > self._start_mb + KEPT_MB
        if is_large and now - self._trimmed_at >= TRIM_S and hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)
            self._trimmed_at = time.monotonic()


def read_resident_mb() -> float:
    """Return the memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize() / MB


def guard_proxy() -> list[Middleware]:
    """Return what limits the bodies of requests in an HTTP proxy of Ray Serve, by the defaults."""
    return [Middleware(UploadGuard, config=ServeConfig(gallery="-"))]


class _Body:
    """The chunks of a request's body, counted in the guard until they are released."""

    def __init__(self, guard: UploadGuard) -> None:
        self._guard = guard
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self.is_complete = False

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._num_bytes += len(chunk)
        self._guard.num_buffered += len(chunk)

    def release(self) -> None:
        self._guard.num_buffered -= self._num_bytes
        self._num_bytes = 0
        self._chunks.clear()

    def replay(self, receive: Receive) -> Receive:
        """Return a `receive` that gives the body as one message, then what else arrives."""
        is_given = not self.is_complete  # of a request without a body: what the server gives

        async def replay() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            data = b"".join(self._chunks)
            self._chunks.clear()
            return {"type": "http.request", "body": data, "more_body": False}

        return replay


async def send_refusal(send: Send, refusal: Refusal, *, is_read: bool) -> None:
    """Answer a refused request. A connection whose request was not read to its end is closed."""
    data = refusal.body()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        **refusal.headers(),
    }
    if not is_read:
        headers["Connection"] = "close"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": data})


def _header(scope: MutableMapping[str, Any], name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""
