"""Read the CSV files that list the images of a folder, one row an image.

Every error names the file and the line.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from s4g_ray.data.image_table import View
from s4g_ray.data.schema import SPLITS
from s4g_ray.datasets.source import SourceFolder, is_number, is_position
from s4g_ray.errors import InputError

Pair = Literal["nearest", "key"]


@dataclass(frozen=True)
class ListOptions:
    """How pairs are made and columns are named; see datasets.folder.convert."""

    pair: Pair
    path_column: str
    lat_column: str
    lon_column: str
    key_column: str
    max_distance_m: float | None
    split_column: str | None
    test_fraction: float
    region_column: str | None
    heading_column: str | None
    id_column: str | None

    def __post_init__(self) -> None:
        if self.pair not in get_args(Pair):
            raise InputError(f"pair={self.pair!r} is none of {', '.join(get_args(Pair))}")
        if not 0 <= self.test_fraction <= 1:
            raise InputError(f"test_fraction={self.test_fraction} is not within 0..1")
        if self.max_distance_m is not None and (
            self.pair != "nearest" or not self.max_distance_m > 0
        ):
            raise InputError(
                f"max_distance_m={self.max_distance_m} must be above 0, and needs pair=nearest"
            )


@dataclass(frozen=True)
class ListedImage:
    """A row of a CSV file."""

    location: str  # file and line
    id: int
    path: str
    lat: float | None
    lon: float | None
    key: str
    split: str  # empty until it is known
    region: str | None
    heading: float | None
    place_id: int = -1  # until it is known


def read_list(
    source_folder: SourceFolder, name: str, view: View, options: ListOptions
) -> list[ListedImage]:
    """Read and check all rows of a CSV file with a header.

    Raises InputError for a file without rows, missing columns, bad values and repeated ids.
    """
    reader = csv.reader(io.StringIO(source_folder.read_text(name), newline=""), strict=True)
    uri = source_folder.join(name)
    images: list[ListedImage] = []
    columns: _Columns | None = None
    try:
        for fields in reader:
            location = f"{uri}, line {reader.line_num}"
            if not any(field.strip() for field in fields):
                continue
            if columns is None:
                names = [field.strip() for field in fields]
                columns = _Columns.find(location, names, view, options)
            else:
                images.append(columns.parse_row(location, fields, len(images)))
    except csv.Error as error:
        raise InputError(f"{uri}, line {reader.line_num}: not CSV: {error}") from error
    if columns is None or not images:
        raise InputError(
            f"{uri}, line {reader.line_num + 1}: the file ends without a row; list the {view} in it"
        )
    if "lat" not in columns.index:
        source_folder.add_note(
            f"{uri} has no columns {options.lat_column} and {options.lon_column}:"
            " coordinates are null"
        )
    _check_unique_ids(images)
    return images


def _check_unique_ids(images: Sequence[ListedImage]) -> None:
    location_of: dict[int, str] = {}
    for image in images:
        if image.id in location_of:
            raise InputError(
                f"{image.location}: id {image.id} is already used at {location_of[image.id]};"
                " give each row its own"
            )
        location_of[image.id] = image.location


@dataclass(frozen=True)
class _Columns:
    """The columns of a CSV file: where each value is in a row, and how it is read.

    The keys of `index` are path, lat, lon, key, split, region, heading and id: those that this file
    has a column for.
    """

    names: list[str]
    index: dict[str, int]
    view: View
    needs_position: bool  # coordinates may not be empty

    @classmethod
    def find(cls, location: str, names: list[str], view: View, options: ListOptions) -> _Columns:
        """Find the columns in a header. Raises InputError when one that is needed is missing."""
        wanted = {"path": options.path_column, "lat": options.lat_column, "lon": options.lon_column}
        optional = {
            "split": options.split_column,
            "region": options.region_column,
            "id": options.id_column,
        }
        wanted |= {kind: name for kind, name in optional.items() if name is not None}
        if options.pair == "key":
            wanted["key"] = options.key_column
            has_default_names = (options.lat_column, options.lon_column) == ("lat", "lon")
            if has_default_names and "lat" not in names and "lon" not in names:
                del wanted["lat"], wanted["lon"]  # optional with keys, unless named by an option
        if options.heading_column is not None and view == "queries":
            wanted["heading"] = options.heading_column
        for kind, name in wanted.items():
            if name not in names:
                raise InputError(
                    f"{location}: no column {name!r}{_suggest(name, names)};"
                    f" columns: {', '.join(names)}; name it with {kind}_column"
                )
        index = {kind: names.index(name) for kind, name in wanted.items()}
        return cls(names, index, view, options.pair == "nearest")

    def parse_row(self, location: str, fields: Sequence[str], number: int) -> ListedImage:
        """Return the image of a row; `number` is its id when there is no column of ids."""
        if len(fields) != len(self.names):
            raise InputError(
                f"{location} has {len(fields)} fields, but the header has {len(self.names)}"
            )
        values = {kind: fields[column].strip() for kind, column in self.index.items()}
        for kind in ("path", "key", "id"):
            if values.get(kind) == "":
                raise InputError(f"{location}: {self.name(kind)} is empty; give every row one")
        lat, lon = self._parse_position(location, values)
        split = values.get("split", "")
        if "split" in values and split not in SPLITS[self.view]:
            raise InputError(
                f"{location}: {self.name('split')}={split!r} is none of"
                f" {', '.join(SPLITS[self.view])}"
            )
        image_id = values.get("id", str(number))
        if not is_number(image_id):
            raise InputError(
                f"{location}: {self.name('id')}={image_id!r} is not a whole number, 0 or larger"
            )
        heading = self._parse_number(location, "heading", values.get("heading", ""))
        if heading is not None and not abs(heading) <= 360:
            raise InputError(
                f"{location}: {self.name('heading')}={heading} is not within -360..360;"
                " or leave it empty"
            )
        return ListedImage(
            location=location,
            id=int(image_id),
            path=values["path"],
            lat=lat,
            lon=lon,
            key=values.get("key", ""),
            split=split,
            region=values.get("region") or None,
            heading=heading,
        )

    def name(self, kind: str) -> str:
        """Return the user's name of a column."""
        return self.names[self.index[kind]]

    def _parse_number(self, location: str, kind: str, text: str) -> float | None:
        if not text:
            return None
        try:
            return float(text)
        except ValueError as error:
            raise InputError(f"{location}: {self.name(kind)}={text!r} is not a number") from error

    def _parse_position(
        self, location: str, values: dict[str, str]
    ) -> tuple[float | None, float | None]:
        lat = self._parse_number(location, "lat", values.get("lat", ""))
        lon = self._parse_number(location, "lon", values.get("lon", ""))
        if lat is None or lon is None:
            if self.needs_position:
                raise InputError(
                    f"{location}: coordinates are empty; fill them in, or pair by key (pair=key)"
                )
            if (lat, lon) != (None, None):
                raise InputError(
                    f"{location}: only one of {self.name('lat')} and {self.name('lon')} is given;"
                    " give both or leave both empty"
                )
        elif not is_position(lat, lon):
            raise InputError(
                f"{location}: {lat}, {lon} is not within -90..90 and -180..180 degrees"
            )
        return lat, lon


def _suggest(name: str, names: Sequence[str]) -> str:
    """Return ` (did you mean ...?)` with the nearest name, or an empty text."""
    # a longer spelling first: Lat, latitude
    close = [known for known in names if known.casefold().startswith(name.casefold())]
    close = close or difflib.get_close_matches(name, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
