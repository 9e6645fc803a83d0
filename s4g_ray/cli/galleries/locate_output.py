"""Show answers: as tables for a terminal, and as JSON, GeoJSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from s4g_ray.cli.galleries.locate_rows import answer_rows
from s4g_ray.cli.galleries.locate_words import (
    format_percent,
    format_position,
    measure_exif_distance,
    printable,
    wrapped,
)
from s4g_ray.data.sphere import format_metres
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


def tables(answers: Iterable[Answer], width: int | None = 80) -> Iterator[RenderableType]:
    """Yield what a terminal shows: each of few photos in detail, or one row for each of many.

    width: columns of the terminal; None: unlimited.
    """
    answers = iter(answers)
    first = list(islice(answers, IN_DETAIL + 1))
    if len(first) > IN_DETAIL:
        yield from answer_rows(chain(first, answers), width)
        return
    for answer in first:
        yield from _detail(answer)
    for note in dict.fromkeys(answer.note for answer in first if answer.note):
        yield wrapped(f"note: {note}", "yellow")


def _detail(answer: Answer) -> Iterator[RenderableType]:
    yield Text(printable(answer.photo), style="bold")
    if not answer.is_located:
        yield wrapped(f"no answer: {answer.reason}", "yellow", indent=2)
    else:
        yield wrapped(_describe(answer), "", indent=2)
    if answer.refined is not None:
        refined = answer.refined
        exact = (
            f"exact position {format_position(refined.lat, refined.lon)}, by {refined.inliers}"
            f" matching points, heading {refined.heading_deg:.0f}°"
        )
        yield wrapped(exact, "", indent=2)
    if answer.exif is not None:
        yield wrapped(_describe_exif(answer), "dim", indent=2)
    if answer.candidates:
        yield _candidate_table(answer.candidates)
    yield Text("")


def _describe(answer: Answer) -> str:
    parts = [format_position(answer.lat, answer.lon)]
    if answer.radius_50_m is not None and answer.radius_90_m is not None:
        parts.append(f"50 % within {format_metres(answer.radius_50_m)}")
        parts.append(f"90 % within {format_metres(answer.radius_90_m)}")
    if answer.heading_deg is not None and answer.refined is None:
        parts.append(f"heading {answer.heading_deg:.0f}°")
    return ", ".join(parts)


def _describe_exif(answer: Answer) -> str:
    exif = answer.exif
    assert exif is not None
    text = f"EXIF says {format_position(exif.lat, exif.lon)}"
    distance_m = measure_exif_distance(answer)
    if distance_m is not None:
        text += f", {format_metres(distance_m)} away"
    if exif.heading_deg is not None:
        kind = " magnetic" if exif.is_magnetic else ""
        text += f", heading {exif.heading_deg:.0f}°{kind}"
    return text


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
            row.append(format_percent(candidate.probability))
        row.append(f"{candidate.score:.3f}")
        row.append(format_position(candidate.lat, candidate.lon))
        if has_size:
            row.append(_size(candidate.size_m))
        if has_turn:
            row.append("" if candidate.turn_deg is None else f"{candidate.turn_deg:.0f}°")
        row.append(str(candidate.id))
        table.add_row(*row, style="bold" if rank == 1 else None)
    return table


def _size(size_m: float) -> str:
    return f"{size_m:,.0f} m" if size_m == size_m else ""
