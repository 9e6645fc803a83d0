"""Read numbers as users write them: with a decimal comma, or as whole ten-millionths of a degree.

Degrees have no thousands; a comma or point within a whole number of E7 is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.datasets.lists.column_names import is_e7

E7 = 1e7
MOST_METRES = 2.1e7  # of projected coordinates: the half of the equator is 2.004e7 m
MOST_MILLIONTHS = {"lat": 9.0e7, "lon": 1.8e8}  # of a degree
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:([., '\u00a0\u202f\u2019])\d{3})(?:\1\d{3})*")
_WHOLE = re.compile(r"[+-]?\d+(?:\.0*)?")


@dataclass(frozen=True)
class NumberFormat:
    """How the numbers of a list are written.

    e7: whether lat and lon are whole ten-millionths of a degree, as in Google's exports.
    """

    decimal: str = "."
    e7: bool = False

    @classmethod
    def from_sample(
        cls, names: Mapping[str, str], values: Mapping[str, Sequence[str]], decimal: str | None
    ) -> NumberFormat:
        """Find the format by a sample of values[kind] and the names of the columns, by kind.

        A decimal comma: some numbers have a comma, and none a point. E7: by the column's name, or
        when all coordinates are whole numbers and too large for degrees, metres and, at least one
        of them, millionths of a degree.
        """
        named = any(is_e7(names[kind]) for kind in ("lat", "lon") if kind in names)
        e7 = named or _look_like_e7(values)
        kinds = ("heading",) if e7 else ("lat", "lon", "heading")
        written = [text for kind in kinds for text in values.get(kind, ())]
        if decimal is None:
            has_comma = any("," in text for text in written)
            decimal = "," if has_comma and not any("." in text for text in written) else "."
        return cls(decimal, e7)

    def parse(self, kind: str, text: str) -> float:
        """Read a number. Raises ValueError."""
        if self.e7 and kind in ("lat", "lon"):
            return int(_whole(text)) / E7
        if self.decimal == ",":
            if "." in text:
                raise ValueError(f"{text!r} has a point; decimals are written with a comma")
            text = text.replace(",", ".")
        return float(text)

    def parse_column(self, kind: str, column: Any) -> Any:
        """Read a column of texts or numbers as float64. Raises pa.ArrowInvalid for other texts."""
        is_text = not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type))
        if self.e7 and kind in ("lat", "lon"):
            whole = column.cast(pa.int64()) if is_text else column
            return pc.divide(whole.cast(pa.float64()), E7)
        if is_text and self.decimal == ",":
            if pc.any(pc.match_substring(column, ".")).as_py():
                raise pa.ArrowInvalid("a point in a column of decimal commas")
            column = pc.replace_substring(column, ",", ".")
        return column.cast(pa.float64())

    def explain(self, kind: str, text: str) -> str:
        """Return what a number must look like, where a text may have another format."""
        if self.e7 and kind in ("lat", "lon"):
            return " of E7 (whole ten-millionths of a degree), which the list's others are"
        if self.decimal == "." and "," in text:
            return "; for a list with decimal commas give --decimal ,"
        if self.decimal == "," and "." in text:
            return "; the list has decimal commas; for points give --decimal ."
        return ""

    def describe(self) -> list[str]:
        """Return what differs from plain degrees with a decimal point."""
        found = []
        if self.decimal == ",":
            found.append("decimals are written with ','")
        if self.e7:
            found.append("coordinates are whole ten-millionths of a degree (E7)")
        return found


PLAIN_NUMBERS = NumberFormat()


def _look_like_e7(values: Mapping[str, Sequence[str]]) -> bool:
    """Return whether coordinates are whole numbers that are neither degrees, metres nor E6."""
    columns = {kind: [text for text in values.get(kind, ()) if text] for kind in ("lat", "lon")}
    if not all(columns.values()):
        return False
    try:
        numbers = {kind: [abs(int(_whole(text))) for text in columns[kind]] for kind in columns}
    except ValueError:
        return False
    return max(float(np.median(column)) for column in numbers.values()) > MOST_METRES and any(
        max(numbers[kind]) > MOST_MILLIONTHS[kind] for kind in numbers
    )


def explain_position(lat: float, lon: float) -> str:
    """Return what to write for a position of whole numbers that may be E7 or millionths."""
    if max(abs(lat), abs(lon)) > MOST_METRES and lat.is_integer() and lon.is_integer():
        return (
            "; for ten-millionths of a degree name the columns latitudeE7 and longitudeE7; write"
            " other coordinates in degrees"
        )
    return ""


def _whole(text: str) -> str:
    """Return a whole number without separators and zeros after a point. Raises ValueError."""
    plain = _ungroup(text)
    if not _WHOLE.fullmatch(plain):
        raise ValueError(f"{text!r} is no whole number")
    return plain.partition(".")[0]


def _ungroup(text: str) -> str:
    """Remove the separators of thousands of a whole number."""
    found = _GROUPED.fullmatch(text)
    return text.replace(found[1], "") if found else text
