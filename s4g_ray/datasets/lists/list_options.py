"""Define ListOptions: how the lists of a folder are read, and how pairs are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from s4g_ray.errors import InputError

Pair = Literal["nearest", "key"]
DELIMITER_NAMES = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|"}


@dataclass(frozen=True)
class ListOptions:
    """How lists are written, how their columns are named, and how pairs are made.

    Paths are relative to the source, or absolute. Columns that an option names are needed in both
    lists; headings (degrees) in the queries only.
    """

    pair: Pair = "nearest"  # a query's place: the nearest tile, or the tiles with its key
    path_column: str = "path"
    lat_column: str = "lat"
    lon_column: str = "lon"
    key_column: str = "key"
    max_distance_m: float | None = None  # farther queries are left out; None: refused when absurd
    split_column: str | None = None
    test_fraction: float = 0.2  # of the places, in the east, without a split column
    region_column: str | None = None
    heading_column: str | None = None
    id_column: str | None = None  # None: rows are numbered
    delimiter: str | None = None  # None: found in a sample of each list, as is the decimal sign
    decimal: str | None = None
    match_names: bool = False  # take files whose names differ by case, Unicode form or extension
    from_exif: bool = False  # take positions and headings from the photos, where a list has none

    def __post_init__(self) -> None:
        if self.pair not in get_args(Pair):
            raise InputError(f"--pair {self.pair!r} is none of {', '.join(get_args(Pair))}")
        if not 0 <= self.test_fraction <= 1:
            raise InputError(f"--test-fraction {self.test_fraction:g} is not within 0..1")
        if self.max_distance_m is not None and not self.max_distance_m > 0:
            raise InputError(f"--max-distance-m {self.max_distance_m:g} must be above 0")
        if self.delimiter is not None:
            delimiter = DELIMITER_NAMES.get(self.delimiter, self.delimiter)
            if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n.':
                raise InputError(
                    f"--delimiter {self.delimiter!r} must be one character, or"
                    f" {', '.join(name for name in DELIMITER_NAMES if name.isalpha())}"
                )
            object.__setattr__(self, "delimiter", delimiter)
        if self.decimal not in (None, ".", ","):
            raise InputError(f"--decimal {self.decimal!r} must be . or ,")
