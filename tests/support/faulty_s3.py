"""An object store that fails on cue: a proxy before an S3 server, which counts requests and has some of them fail."""

from __future__ import annotations

import http.client
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.storage import files

# slow_down, internal: 503 and 500, nothing done. refuse: the connection ends without an answer, nothing done.
# cut: it is done, but the answer ends within its body, or before it where there is none. deny: 403, for good.
# partial: of a bulk delete, which does not delete its first key and says so with status 200
# gone: there is no such upload
Fault = Literal["slow_down", "internal", "refuse", "cut", "deny", "partial", "gone"]
PASSING: tuple[Fault, ...] = ("slow_down", "internal", "refuse", "cut")
ANSWERS = {
    "slow_down": (503, "<Error><Code>SlowDown</Code><Message>on cue</Message></Error>"),
    "internal": (500, "<Error><Code>InternalError</Code><Message>on cue</Message></Error>"),
    "deny": (403, "<Error><Code>AccessDenied</Code><Message>on cue</Message></Error>"),
    "gone": (404, "<Error><Code>NoSuchUpload</Code><Message>on cue</Message></Error>"),
    "partial": (
        200,
        "<DeleteResult><Error><Key>a</Key><Code>InternalError</Code></Error></DeleteResult>",
    ),
}
Rule = Callable[
    [str, str, int], Fault | None
]  # what is asked, of which bucket/key, for the how manieth time


def seeded(seed: int, share: float) -> Rule:
    """A share of all requests fails, the same ones however requests of different keys follow each other."""

    def rule(what: str, key: str, number: int) -> Fault | None:
        rng = random.Random(f"{seed} {what} {key} {number}")
        return rng.choice(PASSING) if rng.random() < share else None

    return rule


def always_well(what: str, key: str, number: int) -> None:
    return None


@dataclass
class Proxy:
    """What has passed a proxy, and the rule by which it fails."""

    upstream: str  # host:port
    endpoint: str = ""
    rule: Rule = always_well
    requests: list[tuple[str, str]] = field(
        default_factory=list
    )  # what was asked, and of which bucket/key
    faults: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    open: int = 0  # connections now
    most_open: int = 0

    def decide(self, what: str, key: str) -> Fault | None:
        """Count a request, and say how it is to fail."""
        with self.lock:
            self.requests.append((what, key))
            self.seen[what, key] += 1
            fault = self.rule(what, key, self.seen[what, key])
            self.faults.update([fault] if fault else [])
            return fault

    def reset(self, rule: Rule = always_well) -> None:
        """Forget what was counted, and fail by another rule."""
        with self.lock:
            self.rule = rule
            for counted in (self.requests, self.faults, self.seen):
                counted.clear()


def what_is_asked(method: str, query: str) -> str:
    """The S3 operation, in a word."""
    names = parse_qs(query, keep_blank_values=True)
    special = {
        ("GET", "list-type"): "LIST",
        ("POST", "delete"): "DELETE_MANY",
        ("POST", "uploads"): "BEGIN_UPLOAD",
        ("PUT", "uploadId"): "PUT_PART",
        ("POST", "uploadId"): "END_UPLOAD",
        ("DELETE", "uploadId"): "ABORT_UPLOAD",
    }
    return next(
        (word for (verb, name), word in special.items() if verb == method and name in names), method
    )


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = (
            True  # else each answer waits 40 ms for the client's word that it has the head
        )

        def handle(self) -> None:
            with proxy.lock:
                proxy.open += 1
                proxy.most_open = max(proxy.open, proxy.most_open)
            try:
                super().handle()
            except ConnectionError:  # of a client that was killed
                pass
            finally:
                with proxy.lock:
                    proxy.open -= 1

        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = urlsplit(self.path)
            what = what_is_asked(self.command, parts.query)
            listed = parse_qs(parts.query).get("prefix", [""])[0] if what == "LIST" else ""
            fault = proxy.decide(what, f"{unquote(parts.path)}/{listed}".strip("/"))
            if fault == "refuse":
                self.close_connection = True
                return
            if fault in ANSWERS:
                status, said = ANSWERS[fault]
                self.answer(status, [("Content-Type", "application/xml")], said.encode(), len(said))
                return
            upstream = http.client.HTTPConnection(proxy.upstream, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            found = upstream.getresponse()
            data, length = found.read(), int(found.headers.get("Content-Length", 0))
            upstream.close()
            skipped = {"content-length", "transfer-encoding", "connection", "date", "server"}
            headers = [
                (name, value) for name, value in found.getheaders() if name.lower() not in skipped
            ]
            if fault == "cut":
                self.close_connection = True
                if len(data) < 2:
                    return
                data, length = data[: len(data) // 2], len(data)
            self.answer(found.status, headers, data, length)

        def answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, length: int
        ) -> None:
            self.send_response(status)
            for name, value in [*headers, ("Content-Length", str(length))]:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay  # noqa: N815

    return Handler


@contextmanager
def proxied(endpoint: str) -> Iterator[Proxy]:
    """A proxy before a server, on a port of its own; it ends with the block."""
    proxy = Proxy(endpoint.removeprefix("http://"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def copy_dataset(dataset: GeoDataset, target: str) -> GeoDataset:
    """A data set with all its images, copied to an object store."""
    opened = open_dataset(dataset.uri)
    tables = {view: getattr(opened, view).to_table() for view in VIEWS}

    def copy(uri: str) -> None:
        files.write_bytes(files.join(target, uri), files.read_bytes(files.join(dataset.uri, uri)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, [uri for view in VIEWS for uri in tables[view]["uri"].to_pylist()]))
    return write_dataset(target, tables["references"], tables["queries"], name=dataset.name)


def pieces_left(client: Any, bucket: str) -> list[Any]:
    """Parts of uploads that were neither completed nor given up."""
    uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    answers = [
        client.list_parts(Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])
        for one in uploads
    ]
    return [part for answer in answers for part in answer.get("Parts", [])]


def objects(client: Any, bucket: str, prefix: str = "") -> dict[str, bytes]:
    """Every object of a bucket below a prefix, as a plain client sees them."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@dataclass
class Store:
    """A server with a bucket `data`, the proxy that this process's variables lead to, and a client past the proxy."""

    proxy: Proxy
    client: Any
