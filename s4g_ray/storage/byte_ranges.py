"""Read many byte ranges of many objects in few reads.

Near ranges of one object are one read. Remote reads run at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s4g_ray.storage import files

# A gap of so many bytes between two ranges costs less to read than a second read costs.
# A request to a store costs more than a local read, so its gap is larger.
NEAR = 65_536
NEAR_REMOTE = 262_144
Range = tuple[str, int | None, int | None]  # uri, offset, length, as files.read_bytes takes them


def read_ranges(ranges: Sequence[Range]) -> list[bytes | OSError | EOFError]:
    """Return, for each (uri, offset, length), the bytes or the error that files.read_bytes gives.

    Ranges may overlap. Ranges of one file with a gap of at most NEAR bytes (remote: NEAR_REMOTE)
    are one read. Ranges without a length, from the same offset to the file's end, are one read too.
    Remote reads run at the same time.
    """
    spans = _join_ranges(ranges)
    results: list[Any] = [None] * len(ranges)
    for span, data in zip(spans, _read_spans(spans), strict=True):
        for i in span.members:
            if isinstance(data, Exception):
                results[i] = data
            else:
                results[i] = _cut(data, span.start, ranges[i])
    return results


@dataclass
class _Span:
    """A part of an object that holds the ranges `members`; up to its end when length is None."""

    uri: str
    start: int
    length: int | None
    members: list[int]

    def takes(self, start: int, length: int | None) -> bool:
        """Return whether a range that begins no earlier is near enough to share this read."""
        if self.length is None:
            return length is None and start == self.start
        if length is None:
            return False
        near = NEAR if files.is_local(self.uri) else NEAR_REMOTE
        return start <= self.start + self.length + near

    def add(self, member: int, start: int, length: int | None) -> None:
        """Add a range that this span takes, and grow to hold it."""
        self.members.append(member)
        if self.length is not None and length is not None:
            self.length = max(self.length, start + length - self.start)


def _join_ranges(ranges: Sequence[Range]) -> list[_Span]:
    def position(i: int) -> tuple[str, int, bool]:
        uri, offset, length = ranges[i]
        return uri, offset or 0, length is not None

    spans: list[_Span] = []
    for i in sorted(range(len(ranges)), key=position):
        uri, offset, length = ranges[i]
        start = offset or 0
        if spans and spans[-1].uri == uri and spans[-1].takes(start, length):
            spans[-1].add(i, start, length)
        else:
            spans.append(_Span(uri, start, length, [i]))
    return spans


def _read_spans(spans: Sequence[_Span]) -> list[bytes | OSError | EOFError]:
    results: list[Any] = [None] * len(spans)
    remote_uris = {span.uri for span in spans if not files.is_local(span.uri)}
    locations = {uri: files.filesystem_of(uri) for uri in remote_uris}  # file system, path
    remote: dict[Any, list[int]] = {}  # file system -> its spans
    for i, span in enumerate(spans):
        if not files.is_local(span.uri):
            filesystem, _ = locations[span.uri]
            remote.setdefault(filesystem, []).append(i)
            continue
        try:
            results[i] = files.read_available(span.uri, span.start, span.length)
        except OSError as error:
            results[i] = error
    for filesystem, members in remote.items():
        paths = [locations[spans[i].uri][1] for i in members]
        found = _read_remote(filesystem, paths, [spans[i] for i in members])
        for i, result in zip(members, found, strict=True):
            results[i] = result
    return results


def _read_remote(filesystem: Any, paths: Sequence[str], spans: Sequence[_Span]) -> list[Any]:
    """Read spans of one file system at the same time -> bytes, OSError or EOFError of each.

    Raises any other error.
    """
    starts = [span.start for span in spans]
    ends = [None if span.length is None else span.start + span.length for span in spans]
    results: list[Any] = filesystem.cat_ranges(list(paths), starts, ends, on_error="return")
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, OSError | EOFError):
            raise result
    return results


def _cut(data: bytes, start: int, wanted: Range) -> bytes | EOFError:
    """Return a range from `data`, which begins at byte `start` of the object."""
    uri, offset, length = wanted
    first = (offset or 0) - start
    part = data if length is None else data[first : first + length]
    try:
        return files.check_length(part, uri, offset, length)
    except EOFError as error:
        return error
