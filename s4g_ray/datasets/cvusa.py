"""CVUSA: a street panorama and a satellite image of each of 44,416 places across the United States.

The split files list pairs; a pair's number is the stem of its satellite image. Panoramas are shipped with
north in their centre column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.source import Report, Row, SourceFolder, is_number, silent, valid_position
from s4g_ray.errors import InputError
from s4g_ray.storage import files

SPLIT_FILES = {"splits/train-19zl.csv": "train", "splits/val-19zl.csv": "test"}
COORDINATE_FILES = ("split_locations/all.csv", "all.csv")  # some archives have it at the root
LAYOUTS = {
    "bingmap": [*SPLIT_FILES, "bingmap/19", "streetview/panos"],
    "nested bingmap": [*SPLIT_FILES, "bingmap/bingmap/19", "streetview/panos"],
}
VIEWS = {
    "references": "Bing Maps satellite image, zoom 19",
    "queries": "street panorama, north in the centre",
}


def convert(
    source: str,
    target: str,
    *,
    coordinates: bool = True,
    strict: bool = False,
    report: Report = silent,
) -> GeoDataset:
    """Convert a CVUSA folder, images referenced where they are; val-19zl.csv becomes the split `test`.

    `coordinates=False` is for archives without all.csv: latitudes and longitudes are null then. Raises
    InputError for another layout, a malformed or repeated row, an id that all.csv does not cover, missing
    images when `strict`, and a target that holds a data set.
    """
    target = files.absolute(target)
    refuse_existing(target)
    source_folder = SourceFolder(source, report)
    nested = source_folder.choose(LAYOUTS) == "nested bingmap"
    positions = _Positions.read(source_folder) if coordinates else None
    references, queries = [], []
    for pair in _pairs(source_folder):
        satellite = f"bingmap/{pair.satellite}" if nested else pair.satellite
        if not source_folder.pair(satellite, pair.panorama):
            continue
        (lat, lon), (own_lat, own_lon) = (
            positions.of(pair.id) if positions else ((None, None), (None, None))
        )
        stem = PurePosixPath(pair.satellite).stem
        place: dict[str, Any] = {
            "id": pair.id,
            "place_id": pair.id,
            "split": pair.split,
            "source_id": stem,
        }
        references.append(Row(**place, uri=source_folder.join(satellite), lat=lat, lon=lon))
        queries.append(
            Row(
                **place,
                uri=source_folder.join(pair.panorama),
                lat=own_lat,
                lon=own_lon,
                heading_deg=0.0,
            )
        )
    return source_folder.write(
        target, references, queries, name="cvusa", views=VIEWS, strict=strict
    )


@dataclass(frozen=True)
class _Pair:
    id: int
    split: str
    satellite: str
    panorama: str


def _pairs(source_folder: SourceFolder) -> Iterator[_Pair]:
    seen: dict[int, str] = {}
    for name, split in SPLIT_FILES.items():
        for at, line in source_folder.lines(name):
            fields = [field.strip() for field in line.split(",")]
            stem = PurePosixPath(fields[0]).stem
            if len(fields) < 2 or not fields[1] or not is_number(stem):
                raise InputError(
                    f"{at}: {line!r} is not NUMBER.jpg,PANORAMA.jpg,...; restore the file"
                )
            if int(stem) in seen:
                raise InputError(
                    f"{at}: id {int(stem)} stands already at {seen[int(stem)]}; remove one"
                )
            seen[int(stem)] = at
            yield _Pair(int(stem), split, fields[0], fields[1])


LatLon = tuple[float, float]


@dataclass(frozen=True)
class _Positions:
    """all.csv: row id - 1 holds sat_lat, sat_lon, ground_lat, ground_lon and a figure of unknown meaning."""

    uri: str
    rows: list[str]

    @classmethod
    def read(cls, source_folder: SourceFolder) -> _Positions:
        for name in COORDINATE_FILES:
            if source_folder.has(name):
                return cls(source_folder.join(name), source_folder.read_text(name).splitlines())
        raise InputError(
            f"{source_folder.uri} has neither {' nor '.join(COORDINATE_FILES)}; add it, or give --no-coordinates"
            " (coordinates=False) for null coordinates"
        )

    def of(self, number: int) -> tuple[LatLon, LatLon]:
        """The positions of the satellite image and of the panorama, in degrees."""
        if not 1 <= number <= len(self.rows):
            raise InputError(
                f"{self.uri} has rows 1 to {len(self.rows)}, but image {number} needs row {number}"
            )
        line = self.rows[number - 1]
        try:
            lat, lon, own_lat, own_lon = (float(field) for field in line.split(",")[:4])
        except ValueError as error:
            raise InputError(
                f"{self.uri}, row {number}: {line!r} is not sat_lat,sat_lon,ground_lat,ground_lon,..."
            ) from error
        if not (valid_position(lat, lon) and valid_position(own_lat, own_lon)):
            raise InputError(
                f"{self.uri}, row {number}: {line!r} is not within -90..90 and -180..180 degrees"
            )
        return (lat, lon), (own_lat, own_lon)
