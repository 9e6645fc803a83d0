"""Stand in for Azure's blob store: what obstore asks of it, in memory, without checking keys."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.http_server import Handler, serving

NOW = "Thu, 26 Nov 2026 08:00:00 GMT"
CONTAINER = "container"


@dataclass
class Blobs:
    """The objects of the container, the blocks that are not committed, and a fault."""

    address: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    blocks: dict[tuple[str, str], bytes] = field(default_factory=dict)
    num_refused: int = 0  # of the next requests, with status 503
    requests: list[str] = field(default_factory=list)


class _Handler(Handler):
    store: Blobs

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: v[0] for name, v in parse_qs(parts.query).items()}
        _, _, rest = parts.path.partition(f"/{CONTAINER}")
        self.name = unquote(rest.lstrip("/"))
        self.body = self.read_body()
        self.store.requests.append(f"{self.command} {self.query.get('comp', '')}".strip())
        if self.store.num_refused:
            self.store.num_refused -= 1
            self.answer(503, b"<Error><Code>ServerBusy</Code><Message>on cue</Message></Error>")
        elif not parts.path.startswith(f"/{CONTAINER}"):
            self.answer(404, b"<Error><Code>ContainerNotFound</Code></Error>")
        else:
            getattr(self, f"serve_{self.query.get('comp') or self.command.lower()}")()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

    def put(self, data: bytes) -> None:
        prefix = "x-ms-meta-"
        self.store.blobs[self.name] = data
        self.store.metadata[self.name] = {
            name.lower().removeprefix(prefix): value
            for name, value in self.headers.items()
            if name.lower().startswith(prefix)
        }
        self.answer(201, ETag=e_tag(data), Last_Modified=NOW)

    def serve_put(self) -> None:
        source = self.headers.get("x-ms-copy-source")
        if source:
            name = unquote(urlsplit(source).path).partition(f"/{CONTAINER}/")[2]
            self.store.blobs[self.name] = self.store.blobs[name]
            self.answer(202, x_ms_copy_status="success", ETag="x", Last_Modified=NOW)
        else:
            self.put(self.body)

    def serve_block(self) -> None:
        self.store.blocks[self.name, self.query["blockid"]] = self.body
        self.answer(201)

    def serve_blocklist(self) -> None:
        names = re.findall(r"<(?:Uncommitted|Latest)>(.*?)<", self.body.decode())
        self.put(b"".join(self.store.blocks.pop((self.name, name)) for name in names))

    def serve_get(self) -> None:
        data = self.store.blobs.get(self.name)
        if data is None:
            self.answer(404, b"<Error><Code>BlobNotFound</Code></Error>")
            return
        wanted = self.headers.get("Range") or self.headers.get("x-ms-range")
        headers = {"ETag": e_tag(data), "Last_Modified": NOW, "x_ms_blob_type": "BlockBlob"}
        for name, value in self.store.metadata.get(self.name, {}).items():
            headers[f"x_ms_meta_{name}"] = value
        if wanted is None:
            self.answer(200, data, **headers)
            return
        start, end = (int(n) if n else len(data) for n in wanted.partition("=")[2].split("-"))
        if start >= len(data):
            self.answer(416, b"<Error><Code>InvalidRange</Code></Error>")
            return
        end = min(end, len(data) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
        self.answer(206, data[start : end + 1], **headers)

    serve_head = serve_get

    def serve_list(self) -> None:
        prefix = self.query.get("prefix", "")
        delimiter = self.query.get("delimiter")
        entries: list[str] = []
        for name in sorted(self.store.blobs):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folder = prefix + rest.partition(delimiter)[0] + delimiter
                entry = f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>"
            else:
                data = self.store.blobs[name]
                entry = (
                    f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{NOW}"
                    f"</Last-Modified><Content-Length>{len(data)}</Content-Length><Etag>"
                    f"{e_tag(data)}</Etag><Content-Type>x</Content-Type></Properties></Blob>"
                )
            if entry not in entries:
                entries.append(entry)
        text = f"<EnumerationResults><Blobs>{''.join(entries)}</Blobs><NextMarker/>"
        self.answer(200, f"{text}</EnumerationResults>".encode(), Content_Type="application/xml")

    def serve_batch(self) -> None:
        """Delete blobs; one that is missing has status 404."""
        parts = []
        for number, path in enumerate(re.findall(r"DELETE (\S+) HTTP", self.body.decode())):
            name = unquote(urlsplit(path).path).partition(f"/{CONTAINER}/")[2]
            found = self.store.blobs.pop(name, None)
            status = "404 Not Found" if found is None else "202 Accepted"
            code = "x-ms-error-code: BlobNotFound\r\n" if found is None else ""
            parts.append(
                "--batch\r\nContent-Type: application/http\r\n"
                f"Content-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n{code}\r\n\r\n"
            )
        text = "".join(parts) + "--batch--\r\n"
        self.answer(202, text.encode(), Content_Type="multipart/mixed; boundary=batch")


def e_tag(data: bytes) -> str:
    """Return a tag that changes with the content."""
    return f'"{hashlib.sha256(data).hexdigest()[:16]}"'


@contextmanager
def azure_server() -> Iterator[Blobs]:
    """Serve an empty container on a free port until the block ends."""
    store = Blobs()
    handler = type("Handler", (_Handler,), {"store": store})
    with serving(handler) as store.address:
        yield store
