"""Word amounts for people: counts with their nouns, bytes and times with their unit, names."""

from __future__ import annotations

import math
from collections.abc import Sequence

NUM_LISTED = 10  # names in one message


def count_noun(count: float, one: str, many: str | None = None) -> str:
    """Return a count with its noun: `1 query`, `2,000 queries`, `0.5 CPUs`.

    many: the plural, where it is not `one` and s.
    """
    is_whole = math.isfinite(count) and count == int(count)
    number = f"{int(count):,}" if is_whole else f"{count:g}"
    noun = one if number == "1" else many or f"{one}s"
    return f"{number} {noun}"


def format_bytes(count: float) -> str:
    """Return a number of bytes with three digits: `12 kB`, `3.4 MB`, `5.67 GB`.

    Units are powers of 1000 everywhere, as in the options and the configuration.
    """
    if not math.isfinite(count):
        return count_noun(count, "byte")
    if count < -0.5:
        return f"-{format_bytes(-count)}"
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return count_noun(round(count), "byte")


def format_duration(seconds: float) -> str:
    """Return a time: `0.4 s`, `12 min`, `3.5 h`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    if 0 < seconds < 0.001:
        return "below 1 ms"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def join_first(names: Sequence[str], most: int = NUM_LISTED) -> str:
    """Join the first names with commas, `most` at most, and add how many more there are."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most:,} more"
    return text
