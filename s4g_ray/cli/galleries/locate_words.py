"""Words and numbers of answers, as a terminal shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from s4g_ray.data.sphere import metres_between
from s4g_ray.gallery.answer import Answer

if TYPE_CHECKING:
    from s4g_ray.gallery.refinement import Refined


def printable(text: str) -> str:
    """Replace control characters: names of files may hold escape sequences of terminals."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def wrapped(text: str, style: str, indent: int = 0) -> Table:
    """Return text that breaks between words; the console itself leaves lines as they are."""
    grid = Table.grid(padding=(0, 0, 0, indent), pad_edge=True)
    grid.add_row(Text(printable(text), style=style, overflow="fold"))
    return grid


def format_position(lat: float | None, lon: float | None, digits: int = 6) -> str:
    """Return latitude and longitude in degrees."""
    if lat is None or lon is None or lat != lat or lon != lon:
        return "position unknown"
    return f"{lat:.{digits}f}, {lon:.{digits}f}"


def format_percent(share: float | None) -> str:
    """Return a probability; nothing for an unknown one."""
    if share is None:
        return ""
    return f"{share:.1%}" if share >= 0.0005 else "< 0.1%"


def shown_point(answer: Answer) -> Answer | Refined:
    """Return what holds the position that is shown: the exact one, where it was found."""
    return answer if answer.refined is None else answer.refined


def measure_exif_distance(answer: Answer) -> float | None:
    """Return the metres between an answer and its photo's EXIF position; None without one."""
    point = shown_point(answer)
    if answer.exif is None or point.lat is None or point.lon is None:
        return None
    return float(metres_between(point.lat, point.lon, answer.exif.lat, answer.exif.lon))
