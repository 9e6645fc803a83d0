"""Stand in for a public bucket: objects are read without a signature, and no request with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.http_server import Handler, serving

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


class _Handler(Handler):
    bucket: PublicBucket

    def serve(self) -> None:
        self.read_body()
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


@contextmanager
def public_bucket() -> Iterator[PublicBucket]:
    """Run the bucket's server on a free port, until the block ends."""
    bucket = PublicBucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with serving(handler) as bucket.address:
        yield bucket
