"""Make an S3 server fail by a rule: a proxy before it counts requests and answers some with errors.

A rule decides on each request by its operation, its bucket and key, and how often it was made.
"""

from __future__ import annotations

import http.client
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from benchmarks.support.s3_server import ACCESS_KEY
from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.storage import files
from tests.support.http_server import Handler, serving

# slow_down, internal: status 503 and 500; the server does not see the request
# refuse: the connection ends without an answer; the server does not see the request
# cut: the server handles the request, but its answer ends within the body, or before an empty body
# deny: status 403, which is not retried
# partial: a bulk delete leaves its first key, and reports that with status 200
# gone: the upload does not exist
# moved: the bucket is in another region
# unsupported: status 501; unconditional: the server writes whatever the condition is
Failure = Literal["slow_down", "internal", "refuse", "cut", "deny", "partial", "gone", "moved"]
Fault = Failure | Literal["unsupported", "unconditional"]
PASSING: tuple[Fault, ...] = ("slow_down", "internal", "refuse", "cut")
ANSWERS = {
    "slow_down": (503, "<Error><Code>SlowDown</Code><Message>on cue</Message></Error>"),
    "internal": (500, "<Error><Code>InternalError</Code><Message>on cue</Message></Error>"),
    "deny": (403, "<Error><Code>AccessDenied</Code><Message>on cue</Message></Error>"),
    "gone": (404, "<Error><Code>NoSuchUpload</Code><Message>on cue</Message></Error>"),
    "moved": (301, "<Error><Code>PermanentRedirect</Code><Message>on cue</Message></Error>"),
    "unsupported": (501, "<Error><Code>NotImplemented</Code><Message>a header</Message></Error>"),
    "partial": (
        200,
        "<DeleteResult><Error><Key>a</Key><Code>InternalError</Code></Error></DeleteResult>",
    ),
}
# the server takes any key, but wants one, and tells S3 from other services by the scope
UNCHECKED = (
    f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20260101/us-east-1/s3/aws4_request,"
    " SignedHeaders=host, Signature=0"
)
CONDITIONS = ("if-match", "if-none-match")  # of conditional writes
# operation, bucket/key, number of the request among its like (from 1) -> its fault
Rule = Callable[[str, str, int], Fault | None]


def seeded(seed: int, share: float) -> Rule:
    """Return a rule by which a share of all requests fails.

    The failing requests do not depend on the order of requests of different keys.
    """

    def rule(operation: str, key: str, number: int) -> Fault | None:
        rng = random.Random(f"{seed} {operation} {key} {number}")
        return rng.choice(PASSING) if rng.random() < share else None

    return rule


def no_fault(operation: str, key: str, number: int) -> None:
    """Let every request succeed."""


@dataclass
class Proxy:
    """The requests that a proxy has seen, and the rule by which it fails."""

    upstream: str  # host:port
    endpoint: str = ""
    rule: Rule = no_fault
    requests: list[tuple[str, str]] = field(default_factory=list)  # operation, bucket/key
    faults: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_running: int = 0  # requests that the server works on now
    max_running: int = 0

    def decide(self, operation: str, key: str) -> Fault | None:
        """Count a request, and return its fault."""
        with self.lock:
            self.requests.append((operation, key))
            self.seen[operation, key] += 1
            number = self.seen[operation, key]
            rule = self.rule
        fault = rule(operation, key, number)  # which may wait, while others go on
        if fault:
            with self.lock:
                self.faults[fault] += 1
        return fault

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a request that the server works on."""
        with self.lock:
            self.num_running += 1
            self.max_running = max(self.num_running, self.max_running)
        try:
            yield
        finally:
            with self.lock:
                self.num_running -= 1

    def reset(self, rule: Rule = no_fault) -> None:
        """Clear the counts, and fail by another rule."""
        with self.lock:
            self.rule = rule
            self.requests.clear()
            self.faults.clear()
            self.seen.clear()


def operation_of(method: str, query: str, headers: Mapping[str, str]) -> str:
    """Return the S3 operation of a request; for a plain one, its method."""
    if method == "PUT" and any(name.lower() in CONDITIONS for name in headers):
        return "PUT_IF"
    names = parse_qs(query, keep_blank_values=True)
    special = {
        ("GET", "list-type"): "LIST",
        ("POST", "delete"): "DELETE_MANY",
        ("POST", "uploads"): "BEGIN_UPLOAD",
        ("PUT", "uploadId"): "PUT_PART",
        ("POST", "uploadId"): "END_UPLOAD",
        ("DELETE", "uploadId"): "ABORT_UPLOAD",
    }
    for (special_method, name), operation in special.items():
        if special_method == method and name in names:
            return operation
    return method


class _Handler(Handler):
    """Answers the requests of one connection to the proxy of its subclass."""

    proxy: Proxy

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that was killed
            super().handle()

    def relay(self) -> None:
        body = self.read_body()
        parts = urlsplit(self.path)
        operation = operation_of(self.command, parts.query, dict(self.headers.items()))
        prefix = ""
        if operation == "LIST":
            prefix = parse_qs(parts.query).get("prefix", [""])[0]
        fault = self.proxy.decide(operation, f"{unquote(parts.path)}/{prefix}".strip("/"))
        if fault == "refuse":
            self.close_connection = True
        elif fault in ANSWERS:
            status, text = ANSWERS[fault]
            self.answer(status, text.encode(), Content_Type="application/xml")
        else:
            self.forward(
                body, CONDITIONS if fault == "unconditional" else (), is_cut=fault == "cut"
            )

    def forward(self, body: bytes, skipped: Sequence[str], is_cut: bool) -> None:
        """Send the request to the server, and its answer, or half of it, to the client."""
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        sent = {name.lower(): value for name, value in self.headers.items()}
        wanted = {name: sent[name] for name in sent if name not in skipped}
        if not wanted.get("authorization", "").startswith("AWS4"):  # of a client of gs://
            wanted = {name.replace("x-goog-", "x-amz-"): wanted[name] for name in wanted}
            wanted["authorization"] = UNCHECKED
        with self.proxy.running():  # not while the answer is sent: the client may go on by then
            upstream.request(self.command, self.path, body, wanted)
            found = upstream.getresponse()
            data = found.read()
        length = int(found.headers.get("Content-Length", 0))
        upstream.close()
        replaced = {"content-length", "transfer-encoding", "connection", "date", "server"}
        headers = {
            name: value for name, value in found.getheaders() if name.lower() not in replaced
        }
        if is_cut:
            self.close_connection = True
            if len(data) < 2:
                return
            length = len(data)
            data = data[: length // 2]
        self.answer(found.status, data, **headers, Content_Length=str(length))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay  # noqa: N815


@contextmanager
def proxied(endpoint: str) -> Iterator[Proxy]:
    """Run a proxy before a server, on a free port, until the block ends."""
    proxy = Proxy(endpoint.removeprefix("http://"))
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with serving(handler) as proxy.endpoint:
        yield proxy


def copy_dataset(dataset: GeoDataset, target: str) -> GeoDataset:
    """Copy a data set with all its images to an object store."""
    opened = open_dataset(dataset.uri)
    tables = {view: getattr(opened, view).to_table() for view in VIEWS}

    def copy(uri: str) -> None:
        files.write_bytes(files.join(target, uri), files.read_bytes(files.join(dataset.uri, uri)))

    uris: list[str] = []
    for view in VIEWS:
        uris.extend(tables[view]["uri"].to_pylist())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, uris))
    return write_dataset(target, tables["references"], tables["queries"], name=dataset.name)


def pieces_left(client: Any, bucket: str) -> list[Any]:
    """Return the parts of uploads that were neither completed nor aborted."""
    parts: list[Any] = []
    for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", []):
        key = upload["Key"]
        answer = client.list_parts(Bucket=bucket, Key=key, UploadId=upload["UploadId"])
        parts.extend(answer.get("Parts", []))
    return parts


def objects(client: Any, bucket: str, prefix: str = "") -> dict[str, bytes]:
    """Read every object of a bucket below a prefix with a plain client."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@dataclass
class Store:
    """A server with a bucket `data`, behind a proxy.

    The variables of this process lead to the proxy, while `client` goes past it to the server.
    """

    proxy: Proxy
    client: Any
