"""Stand in for a public bucket: objects are read without a signature, and no request with one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NOW = "Thu, 26 Nov 2026 08:00:00 GMT"
SIGNATURES = ("sig", "X-Amz-Signature", "X-Goog-Signature")  # of a URL


@dataclass
class PublicBucket:
    """The only object, the address, and how many requests were signed and unsigned."""

    data: bytes = b"0123456789"
    path: str = "/bucket/folder/object.bin"
    address: str = ""
    num_signed: int = 0
    num_unsigned: int = 0
    requests: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    bucket: PublicBucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None: ...

    def serve(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        self.bucket.requests.append(f"{self.command} {self.path}")
        if "Authorization" in self.headers or any(name in query for name in SIGNATURES):
            self.bucket.num_signed += 1
            self.answer(403, b"<Error><Code>InvalidAccessKeyId</Code></Error>")
            return
        self.bucket.num_unsigned += 1
        if unquote(parts.path) != self.bucket.path:
            self.answer(403, b"<Error><Code>AccessDenied</Code><Message>private</Message></Error>")
            return
        start, _, end = (self.headers.get("Range") or "bytes=0-").partition("=")[2].partition("-")
        data = self.bucket.data[int(start) : int(end or len(self.bucket.data)) + 1]
        total = len(self.bucket.data)
        content_range = f"bytes {start}-{int(start) + len(data) - 1}/{total}"
        status = 206 if "Range" in self.headers else 200
        self.answer(status, data, Content_Range=content_range, ETag='"x"', Last_Modified=NOW)

    do_GET = do_HEAD = do_PUT = serve  # noqa: N815

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def public_bucket() -> Iterator[PublicBucket]:
    """Run the bucket's server on a free port, until the block ends."""
    bucket = PublicBucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    bucket.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
