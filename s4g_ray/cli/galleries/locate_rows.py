"""Show the answers of many photos in a terminal: a row for each, as they come."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from rich.console import RenderableType
from rich.text import Text

from s4g_ray.amounts import count_noun
from s4g_ray.cli.galleries.locate_words import (
    format_percent,
    format_position,
    measure_exif_distance,
    printable,
    shown_point,
    wrapped,
)
from s4g_ray.data.sphere import format_metres
from s4g_ray.gallery.answer import Answer

LOOKED_AT = 32  # first answers, by which columns and their widths are chosen
NAME_WIDTHS = (10, 40)  # of the column of names
EXIF_WIDTH = len("  12 km from EXIF")
NUM_NAMED = 5  # photos that are named beside a reason
_BEST = (("90 % within", 11), ("prob.", 6))  # columns of a calibrated gallery
_SCORE = (("score", 7),)
_OUTSIDE = "outside of the gallery"  # of photos whose candidates are not probable enough


def answer_rows(answers: Iterable[Answer], width: int | None) -> Iterator[RenderableType]:
    """Yield a header, a row for each answer, and at the end how many photos are located.

    width: columns of the terminal; None: names are not cut off. Memory does not grow with the
    number of answers, but for the reasons of those that are not located.
    """
    answers = iter(answers)
    first = list(islice(answers, LOOKED_AT))
    layout = _Layout(first, width)
    counts = _Counts()
    yield layout.header()
    for answer in chain(first, answers):
        counts.add(answer)
        yield layout.row(answer)
    yield from counts.lines()


class _Layout:
    """Columns that suit the first answers; longer values of later ones move what follows."""

    def __init__(self, first: list[Answer], width: int | None) -> None:
        self.has_radius = any(answer.radius_90_m is not None for answer in first)
        self.has_heading = any(answer.heading_deg is not None for answer in first)
        self.columns = [("lat, lon", 21), *(_BEST if self.has_radius else _SCORE)]
        if self.has_heading:
            self.columns.append(("heading", 7))
        self.folder = _find_shared_folder([answer.photo for answer in first])
        self.most: int | None = None
        if width is not None:
            used = sum(size + 2 for _, size in self.columns)
            if any(answer.exif is not None for answer in first):
                used += EXIF_WIDTH
            self.most = min(max(width - used, NAME_WIDTHS[0]), NAME_WIDTHS[1])
        self.name_width = max((len(self._name(answer)) for answer in first), default=0)

    def header(self) -> Text:
        titles = [title.rjust(size) for title, size in self.columns]
        return Text("  ".join(["photo".ljust(self.name_width), *titles]), style="dim")

    def row(self, answer: Answer) -> Text:
        best = answer.candidates[0] if answer.candidates else None
        row = Text(self._name(answer).ljust(self.name_width))
        where, style = _where(answer)
        values = [where]
        if self.has_radius:
            radius_m = answer.radius_90_m
            values.append("" if radius_m is None else format_metres(radius_m))
            values.append(format_percent(best.probability if best else None))
        else:
            values.append(f"{best.score:.3f}" if best else "")
        if self.has_heading:
            values.append("" if answer.heading_deg is None else f"{answer.heading_deg:.0f}°")
        for number, (value, (_, size)) in enumerate(zip(values, self.columns, strict=True)):
            row.append(f"  {value.rjust(size)}", style if number == 0 else "")
        distance_m = measure_exif_distance(answer)
        if distance_m is not None:
            row.append(f"  {format_metres(distance_m)} from EXIF", "dim")
        row.rstrip()
        return row

    def _name(self, answer: Answer) -> str:
        """Return a photo's name without the shared folder; of a long one the end."""
        name = printable(answer.photo.removeprefix(self.folder))
        if self.most is not None and len(name) > self.most:
            return "…" + name[1 - self.most :]
        return name


def _find_shared_folder(names: list[str]) -> str:
    """Return the folder, with its slash, that all names begin with; empty without one."""
    folders = {name.rpartition("/")[0] for name in names}
    if len(folders) > 1 and len({folder.startswith("/") for folder in folders}) > 1:
        return ""  # absolute and relative names
    shared = os.path.commonpath(folders) if folders else ""
    return f"{shared}/" if shared else ""


def _where(answer: Answer) -> tuple[str, str]:
    """Return the place of an answer, or why there is none, and its style."""
    if answer.error is not None:
        return "unreadable", "red"
    if not answer.is_located:
        return "no answer", "yellow"
    point = shown_point(answer)
    return format_position(point.lat, point.lon, 5), ""


class _Group:
    """Photos without an answer for the same reason."""

    def __init__(self) -> None:
        self._first: list[str] = []  # names
        self._count = 0
        self._probabilities: list[float] = []  # the least and the most, of lying outside

    def add(self, name: str, probability: float | None) -> None:
        self._count += 1
        if len(self._first) < NUM_NAMED:
            self._first.append(name)
        if probability is not None:
            known = [*self._probabilities, probability]
            self._probabilities = [min(known), max(known)]

    def names(self) -> str:
        more = self._count - len(self._first)
        return ", ".join(self._first) + (f" and {more:,} more" if more else "")

    def shares(self) -> str:
        """Return the probabilities of lying outside; nothing for other reasons."""
        shown = list(dict.fromkeys(f"{probability:.0%}" for probability in self._probabilities))
        return f" with a probability of {' to '.join(shown)}" if shown else ""


class _Counts:
    """Counts answers, and the photos without one by their reason."""

    def __init__(self) -> None:
        self.num_photos = 0
        self.num_located = 0
        self.notes: dict[str, None] = {}
        self.groups: dict[str, _Group] = {}  # by the reason

    def add(self, answer: Answer) -> None:
        self.num_photos += 1
        self.num_located += answer.is_located
        if answer.note:
            self.notes[answer.note] = None
        if answer.is_located:
            return
        probability = answer.none_probability if answer.candidates else None
        reason = answer.reason or "" if probability is None else _OUTSIDE
        self.groups.setdefault(reason, _Group()).add(answer.photo, probability)

    def lines(self) -> Iterator[RenderableType]:
        """Yield how many photos are located, and the reasons of the others, with their photos."""
        yield Text(f"\n{self.num_located:,} of {count_noun(self.num_photos, 'photo')} located")
        for reason, group in self.groups.items():
            yield wrapped(f"no answer for {group.names()}: {reason}{group.shares()}", "yellow")
        for note in self.notes:
            yield wrapped(f"note: {note}", "yellow")
