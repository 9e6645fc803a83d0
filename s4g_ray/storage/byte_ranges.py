"""Byte ranges of many objects at once: near ones by one read, remote ones at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s4g_ray.storage import files

# bytes between two ranges of a file that cost less to read than a second read does; a request to a store costs more
NEAR, NEAR_REMOTE = 65_536, 262_144
Range = tuple[str, int | None, int | None]  # uri, offset, length, as storage.read_bytes takes them


def read_ranges(ranges: Sequence[Range]) -> list[bytes | OSError | EOFError]:
    """What storage.read_bytes gives for each (uri, offset, length), or what it raises; ranges may overlap.

    Ranges of a file that lie NEAR (NEAR_REMOTE) each other are one read, and so are those of the same offset to its
    end; remote reads run at the same time.
    """
    spans = _spans(ranges)
    found: list[Any] = [None] * len(ranges)
    for span, data in zip(spans, _read_spans(spans), strict=True):
        for i in span.members:
            found[i] = data if isinstance(data, Exception) else _cut(data, span.start, ranges[i])
    return found


@dataclass
class _Span:
    """A part of an object that holds the ranges `members`; to its end, where length is None."""

    uri: str
    start: int
    length: int | None
    members: list[int]


def _spans(ranges: Sequence[Range]) -> list[_Span]:
    spans: list[_Span] = []
    order = sorted(
        range(len(ranges)),
        key=lambda i: (ranges[i][0], ranges[i][1] or 0, ranges[i][2] is not None),
    )
    for i in order:
        uri, start, length = ranges[i][0], ranges[i][1] or 0, ranges[i][2]
        last = spans[-1] if spans and spans[-1].uri == uri else None
        near = NEAR if files.is_local(uri) else NEAR_REMOTE
        if last is not None and last.length is None and (start, length) == (last.start, None):
            last.members.append(i)
        elif (
            last is None
            or last.length is None
            or length is None
            or start > last.start + last.length + near
        ):
            spans.append(_Span(uri, start, length, [i]))
        else:
            last.length = max(last.length, start + length - last.start)
            last.members.append(i)
    return spans


def _read_spans(spans: Sequence[_Span]) -> list[bytes | OSError | EOFError]:
    found: list[Any] = [None] * len(spans)
    reached = {
        uri: files.filesystem_of(uri) for uri in {s.uri for s in spans} if not files.is_local(uri)
    }
    remote: dict[Any, list[int]] = {}  # by file system
    for i, span in enumerate(spans):
        if files.is_local(span.uri):
            try:
                found[i] = files.read_available(span.uri, span.start, span.length)
            except OSError as error:
                found[i] = error
        else:
            remote.setdefault(reached[span.uri][0], []).append(i)
    for filesystem, members in remote.items():
        paths = [reached[spans[i].uri][1] for i in members]
        edges = [(spans[i].start, spans[i].length) for i in members]
        ends = [None if length is None else start + length for start, length in edges]
        results = filesystem.cat_ranges(
            paths, [start for start, _ in edges], ends, on_error="return"
        )
        for i, result in zip(members, results, strict=True):
            if isinstance(result, Exception) and not isinstance(result, OSError | EOFError):
                raise result
            found[i] = result
    return found


def _cut(data: bytes, start: int, wanted: Range) -> bytes | EOFError:
    """A range out of what was read from `start` on."""
    uri, offset, length = wanted
    first = (offset or 0) - start
    part = data if length is None else data[first : first + length]
    try:
        return files.check_length(part, uri, offset, length)
    except EOFError as error:
        return error
