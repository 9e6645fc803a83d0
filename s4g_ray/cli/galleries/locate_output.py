"""Show answers: as tables for a terminal, and as JSON, GeoJSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from s4g_ray.data.sphere import format_metres, metres_between
from s4g_ray.gallery.answer import Answer, Candidate

IN_DETAIL = 3  # photos up to which each is shown with all its candidates
_CANDIDATE = ("id", "lat", "lon", "size_m", "score", "probability", "turn_deg")
_ANSWER = ("lat", "lon", "radius_50_m", "radius_90_m", "heading_deg", "none_probability")
COLUMNS = (
    *("photo", "is_located", "rank", *_CANDIDATE),
    *(f"answer_{name}" for name in _ANSWER),
    *("refined_lat", "refined_lon", "refined_inliers"),
    *("exif_lat", "exif_lon", "exif_heading_deg", "reason", "note", "error"),
)


def json_lines(answers: Iterable[Answer]) -> Iterator[str]:
    """Yield the lines of a JSON list, one answer in each."""
    yield from _list_lines("[", (json.dumps(answer.to_json()) for answer in answers), "]")


def geojson_lines(answers: Iterable[Answer]) -> Iterator[str]:
    """Yield the lines of one FeatureCollection, one feature of any of the answers in each."""
    features = (
        json.dumps(feature) for answer in answers for feature in answer.to_geojson()["features"]
    )
    yield from _list_lines('{"type": "FeatureCollection", "features": [', features, "]}")


def _list_lines(start: str, items: Iterator[str], end: str) -> Iterator[str]:
    """Yield a list, its start once the first item is there: an error before it leaves no output."""
    waiting = next(items, None)
    yield start
    for item in items:
        yield f"{waiting},"
        waiting = item
    if waiting is not None:
        yield waiting
    yield end


def csv_lines(answers: Iterable[Answer]) -> Iterator[str]:
    """Yield a header, and a row for each candidate; one for a photo that has none."""
    is_first = True
    for answer in answers:
        if is_first:
            yield _csv_line(COLUMNS)
            is_first = False
        value = answer.to_json()
        about = {f"answer_{name}": value[name] for name in _ANSWER}
        for part in ("refined", "exif"):
            about |= {f"{part}_{name}": x for name, x in (value[part] or {}).items()}
        about |= {name: value[name] for name in ("photo", "is_located", "reason", "note", "error")}
        for rank, candidate in enumerate(value["candidates"] or [{}], 1):
            row = {**about, **{name: candidate.get(name) for name in _CANDIDATE}}
            row["rank"] = rank if candidate else None
            yield _csv_line([row.get(name) for name in COLUMNS])
    if is_first:
        yield _csv_line(COLUMNS)


def _csv_line(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


FORMATS: dict[str, Callable[[Iterable[Answer]], Iterator[str]]] = {
    "json": json_lines,
    "geojson": geojson_lines,
    "csv": csv_lines,
}


def tables(answers: Sequence[Answer]) -> Iterator[RenderableType]:
    """Yield what a terminal shows: each of few photos in detail, or one row for each of many."""
    if len(answers) > IN_DETAIL:
        yield _summary(answers)
        yield from _count_lines(answers)
    else:
        for answer in answers:
            yield from _detail(answer)
    for note in dict.fromkeys(answer.note for answer in answers if answer.note):
        yield _wrapped(f"note: {note}", "yellow")


def _detail(answer: Answer) -> Iterator[RenderableType]:
    yield Text(_printable(answer.photo), style="bold")
    if not answer.is_located:
        yield _wrapped(f"no answer: {answer.reason}", "yellow", indent=2)
    else:
        yield _wrapped(_describe(answer), "", indent=2)
    if answer.refined is not None:
        refined = answer.refined
        exact = (
            f"exact position {_position(refined.lat, refined.lon)}, by {refined.inliers} matching"
            f" points, heading {refined.heading_deg:.0f}°"
        )
        yield _wrapped(exact, "", indent=2)
    if answer.exif is not None:
        yield _wrapped(_describe_exif(answer), "dim", indent=2)
    if answer.candidates:
        yield _candidate_table(answer.candidates)
    yield Text("")


def _wrapped(text: str, style: str, indent: int = 0) -> Table:
    """Return text that breaks between words; the console itself leaves lines as they are."""
    text = _printable(text)
    grid = Table.grid(padding=(0, 0, 0, indent), pad_edge=True)
    grid.add_row(Text(text, style=style, overflow="fold"))
    return grid


def _describe(answer: Answer) -> str:
    parts = [_position(answer.lat, answer.lon)]
    if answer.radius_50_m is not None and answer.radius_90_m is not None:
        parts.append(f"50 % within {format_metres(answer.radius_50_m)}")
        parts.append(f"90 % within {format_metres(answer.radius_90_m)}")
    if answer.heading_deg is not None and answer.refined is None:
        parts.append(f"heading {answer.heading_deg:.0f}°")
    return ", ".join(parts)


def _describe_exif(answer: Answer) -> str:
    exif = answer.exif
    assert exif is not None
    text = f"EXIF says {_position(exif.lat, exif.lon)}"
    distance_m = _exif_distance(answer)
    if distance_m is not None:
        text += f", {format_metres(distance_m)} away"
    if exif.heading_deg is not None:
        kind = " magnetic" if exif.is_magnetic else ""
        text += f", heading {exif.heading_deg:.0f}°{kind}"
    return text


def _exif_distance(answer: Answer) -> float | None:
    point = answer if answer.refined is None else answer.refined
    if answer.exif is None or point.lat is None or point.lon is None:
        return None
    return float(metres_between(point.lat, point.lon, answer.exif.lat, answer.exif.lon))


def _candidate_table(candidates: Sequence[Candidate]) -> Table:
    has_probability = any(candidate.probability is not None for candidate in candidates)
    has_size = any(candidate.size_m == candidate.size_m for candidate in candidates)
    has_turn = any(candidate.turn_deg is not None for candidate in candidates)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  #", justify="right")
    names = ["probability"] if has_probability else []
    names.extend(("score", "lat, lon"))
    if has_size:
        names.append("size")
    if has_turn:
        names.append("turn")
    for name in (*names, "tile"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, candidate in enumerate(candidates, 1):
        row = [str(rank)]
        if has_probability:
            row.append(_percent(candidate.probability))
        row.append(f"{candidate.score:.3f}")
        row.append(_position(candidate.lat, candidate.lon))
        if has_size:
            row.append(_size(candidate.size_m))
        if has_turn:
            row.append("" if candidate.turn_deg is None else f"{candidate.turn_deg:.0f}°")
        row.append(str(candidate.id))
        table.add_row(*row, style="bold" if rank == 1 else None)
    return table


def _summary(answers: Sequence[Answer]) -> Table:
    has_radius = any(answer.radius_90_m is not None for answer in answers)
    has_exif = any(answer.exif is not None for answer in answers)
    has_heading = any(answer.heading_deg is not None for answer in answers)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("photo", overflow="fold", min_width=10)
    table.add_column("lat, lon", justify="right", no_wrap=True)
    if has_radius:
        table.add_column("90 % within", justify="right", no_wrap=True)
        table.add_column("prob.", justify="right", no_wrap=True)
    else:
        table.add_column("score", justify="right", no_wrap=True)
    if has_heading:
        table.add_column("heading", justify="right", no_wrap=True)
    if has_exif:
        table.add_column("from EXIF", justify="right", no_wrap=True)
    names = _short_names([answer.photo for answer in answers])
    for answer, name in zip(answers, names, strict=True):
        best = answer.candidates[0] if answer.candidates else None
        row = [Text(name), Text(_where(answer))]
        if has_radius:
            radius_m = answer.radius_90_m
            row.append(Text("" if radius_m is None else format_metres(radius_m)))
            row.append(Text(_percent(best.probability if best else None)))
        else:
            row.append(Text(f"{best.score:.3f}" if best else ""))
        if has_heading:
            heading = answer.heading_deg
            row.append(Text("" if heading is None else f"{heading:.0f}°"))
        if has_exif:
            distance_m = _exif_distance(answer)
            row.append(Text("" if distance_m is None else format_metres(distance_m)))
        table.add_row(*row)
    return table


def _printable(text: str) -> str:
    """Replace control characters: names of files may hold escape sequences of terminals."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _short_names(photos: Sequence[str]) -> list[str]:
    """Return the names of photos without the folder that all of them share."""
    parts = [_printable(photo).split("/") for photo in photos]
    num_shared = 0
    for level in zip(*(folders[:-1] for folders in parts), strict=False):
        if len(set(level)) > 1:
            break
        num_shared += 1
    return ["/".join(names[num_shared:]) for names in parts]


def _where(answer: Answer) -> str:
    if answer.error is not None:
        return "unreadable"
    if not answer.is_located:
        return "no answer"
    point = answer if answer.refined is None else answer.refined
    return _position(point.lat, point.lon, 5)


def _count_lines(answers: Sequence[Answer]) -> Iterator[RenderableType]:
    """Yield how many photos are located, and the reasons of the others, with their photos."""
    num_located = sum(answer.is_located for answer in answers)
    yield Text(f"\n{num_located} of {len(answers)} photos located")
    reasons: dict[str, list[str]] = {}
    for answer in answers:
        if not answer.is_located and answer.reason is not None:
            reasons.setdefault(answer.reason, []).append(answer.photo)
    for reason, photos in reasons.items():
        names = ", ".join(photos[:5]) + (f" and {len(photos) - 5} more" if len(photos) > 5 else "")
        yield _wrapped(f"no answer for {names}: {reason}", "yellow")


def _position(lat: float | None, lon: float | None, digits: int = 6) -> str:
    if lat is None or lon is None or lat != lat or lon != lon:
        return "position unknown"
    return f"{lat:.{digits}f}, {lon:.{digits}f}"


def _size(size_m: float) -> str:
    return f"{size_m:,.0f} m" if size_m == size_m else ""


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:.1%}" if share >= 0.0005 else "< 0.1%"
