"""ServiceMetrics: requests, seconds by stage, queue and answers, for Prometheus and for Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# seconds
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
REQUESTS = ("s4g_serve_requests", "Requests by route and status", ("route", "status"))
REFUSALS = ("s4g_serve_refusals", "Refused requests by the code of their error", ("code",))
SECONDS = (
    "s4g_serve_seconds",
    "Seconds of a request in each stage: decode, wait, locate, total",
    ("stage",),
)
QUEUE = ("s4g_serve_queue", "Requests that wait or are answered", ())
PHOTOS = ("s4g_serve_photos", "Photos by answer: located, none or unreadable", ("answer",))
RETRIES = ("s4g_serve_retries", "Requests sent to another replica after theirs had died", ())
VERSION = ("s4g_serve_gallery_version", "Version of the gallery that answers", ())
TILES = ("s4g_serve_gallery_tiles", "Tiles of the gallery that answers", ())

Named = tuple[str, str, tuple[str, ...]]


class Mirror(Protocol):
    """A second place for the same values, such as Ray's metrics."""

    def add(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """Add to a counter."""

    def observe(self, _name: str, value: float, tags: Mapping[str, str]) -> None:
        """Add a value to a histogram."""

    def set(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """Set a gauge."""


class ServiceMetrics:
    """The metrics of a process that answers requests; `text` is the answer of /metrics.

    mirror: is given each value, too.
    """

    def __init__(self, mirror: Mirror | None = None) -> None:
        self._registry = CollectorRegistry()
        self._mirror = mirror
        self._counters = {named[0]: self._make(Counter, named) for named in COUNTERS}
        self._gauges = {named[0]: self._make(Gauge, named) for named in GAUGES}
        self._seconds = self._make(Histogram, SECONDS, buckets=BUCKETS)

    def count_request(self, route: str, status: int) -> None:
        """Count an answered request."""
        self._add(REQUESTS, {"route": route, "status": str(status)})

    def count_refusal(self, code: str) -> None:
        """Count a refused request."""
        self._add(REFUSALS, {"code": code})

    def count_answers(self, kinds: Sequence[str]) -> None:
        """Count photos by their answer: located, none or unreadable."""
        for kind in kinds:
            self._add(PHOTOS, {"answer": kind})

    def count_retry(self) -> None:
        """Count a request that goes to another replica."""
        self._add(RETRIES, {})

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Record the seconds that a request spent in stages."""
        for stage, value in seconds.items():
            self._seconds.labels(stage=stage).observe(value)
            if self._mirror is not None:
                self._mirror.observe(SECONDS[0], value, {"stage": stage})

    def set_queue(self, count: int) -> None:
        """Record how many requests wait or are answered."""
        self._set(QUEUE, count)

    def set_gallery(self, version: int, num_tiles: int) -> None:
        """Record the gallery that answers."""
        self._set(VERSION, version)
        self._set(TILES, num_tiles)

    def text(self) -> bytes:
        """Return all values in Prometheus' text format."""
        return generate_latest(self._registry)

    def _make(self, kind: Any, named: Named, **options: Any) -> Any:
        name, text, labels = named
        return kind(name, text, labels, registry=self._registry, **options)

    def _add(self, named: Named, tags: dict[str, str]) -> None:
        counter = self._counters[named[0]]
        (counter.labels(**tags) if tags else counter).inc()
        if self._mirror is not None:
            self._mirror.add(named[0], 1, tags)

    def _set(self, named: Named, value: float) -> None:
        self._gauges[named[0]].set(value)
        if self._mirror is not None:
            self._mirror.set(named[0], value, {})


COUNTERS = (REQUESTS, REFUSALS, PHOTOS, RETRIES)
GAUGES = (QUEUE, VERSION, TILES)
