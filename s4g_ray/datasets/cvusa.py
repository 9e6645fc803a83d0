"""Convert CVUSA: a street panorama and a satellite image of 44,416 places across the United States.

The split files list pairs; a pair's number is the stem of its satellite image. Panoramas are
published with north in their centre column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.source import SourceFolder, is_number, is_position
from s4g_ray.datasets.source_rows import Row
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
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
LatLon = tuple[float, float]


def convert(
    source: str,
    target: str,
    *,
    coordinates: bool = True,
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a CVUSA folder; images stay where they are. val-19zl.csv becomes the split `test`.

    Use `coordinates=False` for archives without all.csv: latitudes and longitudes are then null.
    Raises InputError for another layout, a malformed or repeated row, an id that all.csv does not
    cover, missing images when `strict`, and a target that holds a data set.
    """
    target = files.absolute(target)
    refuse_existing(target)
    source_folder, layout = open_root(source, LAYOUTS, report)
    nested = layout == "nested bingmap"
    positions = _Positions.read(source_folder) if coordinates else None
    references: list[Row] = []
    queries: list[Row] = []
    for pair in _read_pairs(source_folder):
        satellite = f"bingmap/{pair.satellite}" if nested else pair.satellite
        if not source_folder.has_pair(satellite, pair.panorama):
            continue
        place: dict[str, Any] = {
            "id": pair.id,
            "place_id": pair.id,
            "split": pair.split,
            "source_id": PurePosixPath(pair.satellite).stem,
        }
        reference = Row(**place, uri=source_folder.join(satellite))
        query = Row(**place, uri=source_folder.join(pair.panorama), heading_deg=0.0)
        if positions is not None:
            of_satellite, of_panorama = positions.parse_row(pair.id)
            reference = _locate(reference, of_satellite)
            query = _locate(query, of_panorama)
        references.append(reference)
        queries.append(query)
    return source_folder.write(
        target, references, queries, name="cvusa", views=VIEWS, strict=strict
    )


def _locate(row: Row, position: LatLon) -> Row:
    lat, lon = position
    return replace(row, lat=lat, lon=lon)


@dataclass(frozen=True)
class _Pair:
    id: int
    split: str
    satellite: str
    panorama: str


def _read_pairs(source_folder: SourceFolder) -> Iterator[_Pair]:
    location_of: dict[int, str] = {}
    for name, split in SPLIT_FILES.items():
        for location, line in source_folder.read_lines(name):
            fields = [field.strip() for field in line.split(",")]
            stem = PurePosixPath(fields[0]).stem
            if len(fields) < 2 or not fields[1] or not is_number(stem):
                raise InputError(
                    f"{location}: {line!r} is not NUMBER.jpg,PANORAMA.jpg,...; restore the file"
                )
            number = int(stem)
            if number in location_of:
                raise InputError(
                    f"{location}: id {number} is already used at {location_of[number]}; remove one"
                )
            location_of[number] = location
            yield _Pair(number, split, fields[0], fields[1])


@dataclass(frozen=True)
class _Positions:
    """The rows of all.csv: row N has the positions of pair N.

    A row is sat_lat, sat_lon, ground_lat, ground_lon and a figure of unknown meaning.
    """

    uri: str
    rows: list[str]

    @classmethod
    def read(cls, source_folder: SourceFolder) -> _Positions:
        for name in COORDINATE_FILES:
            if source_folder.has(name):
                return cls(source_folder.join(name), source_folder.read_text(name).splitlines())
        raise InputError(
            f"{source_folder.uri} has neither {' nor '.join(COORDINATE_FILES)}; add it, or give"
            " --no-coordinates (coordinates=False) for null coordinates"
        )

    def parse_row(self, number: int) -> tuple[LatLon, LatLon]:
        """Return the positions of a pair's satellite image and of its panorama, in degrees."""
        if not 1 <= number <= len(self.rows):
            raise InputError(
                f"{self.uri} has rows 1 to {len(self.rows)}, but image {number} needs row {number}"
            )
        line = self.rows[number - 1]
        try:
            lat, lon, panorama_lat, panorama_lon = (float(field) for field in line.split(",")[:4])
        except ValueError as error:
            raise InputError(
                f"{self.uri}, row {number}: {line!r} is not"
                " sat_lat,sat_lon,ground_lat,ground_lon,..."
            ) from error
        if not (is_position(lat, lon) and is_position(panorama_lat, panorama_lon)):
            raise InputError(
                f"{self.uri}, row {number}: {line!r} is not within -90..90 and -180..180 degrees"
            )
        return (lat, lon), (panorama_lat, panorama_lon)
