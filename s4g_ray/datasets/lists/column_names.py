"""Find the columns of a list by their names, as users write them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from s4g_ray.data.image_table import View
from s4g_ray.datasets.lists.list_options import ListOptions
from s4g_ray.errors import InputError

# names of Google Takeout, for an option that is left at its default
E7_NAMES = {"lat": "latitudee7", "lon": "longitudee7"}


def name_columns(names: Sequence[str], view: View, options: ListOptions) -> dict[str, str]:
    """Return the name that each column of a list should have, by kind: path, lat, lon, key ...

    names: those of the header, which decide whether optional coordinates are wanted.
    """
    wanted = {"path": options.path_column, "lat": options.lat_column, "lon": options.lon_column}
    optional = {
        "split": options.split_column,
        "region": options.region_column,
        "id": options.id_column,
    }
    wanted |= {kind: name for kind, name in optional.items() if name is not None}
    if options.pair == "key":
        wanted["key"] = options.key_column
    has_exif = options.from_exif and view == "queries"
    # optional with keys and with EXIF positions, unless named by an option
    if (options.pair == "key" or has_exif) and not has_position(names, options):
        del wanted["lat"], wanted["lon"]
    if options.heading_column is not None and view == "queries":
        wanted["heading"] = options.heading_column
    return wanted


def has_position(names: Sequence[str], options: ListOptions) -> bool:
    """Return whether a column of coordinates is there, or is named by an option."""
    if (options.lat_column, options.lon_column) != ("lat", "lon"):
        return True
    return any(list_matches(kind, kind, names) for kind in ("lat", "lon"))


def find_columns(location: str, names: Sequence[str], wanted: Mapping[str, str]) -> dict[str, int]:
    """Return the position of each wanted column, by kind.

    A name counts as equal when it differs by letter case, spaces, `_` and `-` alone, and when it
    ends in E7 (lat and lon, in ten-millionths of a degree). Raises InputError for a column that is
    missing, or there twice.
    """
    index = {}
    for kind, name in wanted.items():
        found = list_matches(kind, name, names)
        if not found:
            raise InputError(
                f"{location}: no column {name!r}{_suggest(name, names)};"
                f" columns: {', '.join(names)}; name it with --{kind}-column"
            )
        if len(found) > 1:
            twice = " and ".join(repr(names[column]) for column in found)
            raise InputError(
                f"{location}: columns {twice} could each be {name!r}; rename all but one, or name"
                f" it with --{kind}-column"
            )
        index[kind] = found[0]
    return index


def list_matches(kind: str, name: str, names: Sequence[str]) -> list[int]:
    """Return the columns that a name means: those of the same name, or else those most like it."""
    exact = [column for column, known in enumerate(names) if known == name]
    if exact:
        return exact
    plain = [_normalize(known) for known in names]
    wanted = [_normalize(name)]
    if kind in E7_NAMES:
        wanted.append(f"{wanted[0]}e7")
        if name == kind:
            wanted.append(E7_NAMES[kind])
    for normal in wanted:
        found = [column for column, known in enumerate(plain) if known == normal]
        if found:
            return found
    return []


def is_e7(name: str) -> bool:
    """Return whether a column's name says that it holds ten-millionths of a degree."""
    return _normalize(name).endswith("e7")


def _normalize(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _suggest(name: str, names: Sequence[str]) -> str:
    """Return ` (did you mean ...?)` with the nearest name, or an empty text."""
    # a longer spelling first: latitude
    close = [known for known in names if known.casefold().startswith(name.casefold())]
    close = close or difflib.get_close_matches(name, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
