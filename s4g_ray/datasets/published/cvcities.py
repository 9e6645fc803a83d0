"""Convert CV-Cities: street panoramas and satellite images of sixteen cities on six continents.

Layout as published (arXiv 2411.12431, github.com/GaoShuang98/CVCities): a folder for each city with
img_info.csv, no header: name, longitude, latitude, city, path of the satellite image, path of the
panorama, both relative to the folder of the cities. Train and test are whole cities.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.data.sphere import metres_between
from s4g_ray.datasets.lists.file_names import empty_list_error
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.published.split_names import parse_splits
from s4g_ray.datasets.source import SourceFolder, is_position
from s4g_ray.datasets.source_rows import Row
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

LIST = "img_info.csv"
TRAIN_CITIES = "barcelona,captown,losangeles,maynila,melbourne,mexico,newyork,paris,santiago,tokyo"
TEST_CITIES = "taipei,singapore,london,seattle,rio,sydney"
# latitude and longitude near the middle: they tell a list whose two columns are swapped
CENTRES = {
    "barcelona": (41.4, 2.2),
    "captown": (-33.9, 18.5),
    "london": (51.5, -0.1),
    "losangeles": (34.0, -118.2),
    "maynila": (14.6, 121.0),
    "melbourne": (-37.8, 145.0),
    "mexico": (19.4, -99.1),
    "newyork": (40.7, -74.0),
    "paris": (48.9, 2.3),
    "rio": (-22.9, -43.2),
    "santiago": (-33.4, -70.7),
    "seattle": (47.6, -122.3),
    "singapore": (1.3, 103.8),
    "sydney": (-33.9, 151.2),
    "taipei": (25.0, 121.5),
    "tokyo": (35.7, 139.7),
}
REACH_M = 200_000
NUM_COLUMNS = 6
VIEWS = {"references": "satellite image", "queries": "street panorama"}


def convert(
    source: str,
    target: str,
    *,
    train_cities: str = TRAIN_CITIES,
    test_cities: str = TEST_CITIES,
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a CV-Cities folder; images stay where they are.

    train_cities, test_cities: names of folders, joined by commas; by default those of the
    publication. A place is a row of a city's list; the region is the city. Headings are null: the
    publication does not tell where the panoramas' centres point. Raises InputError for another
    layout, malformed rows, positions far from a city, missing images when `strict`, and a target
    that holds a data set.
    """
    splits = parse_splits(train_cities, test_cities, "city", "cities", "paris,london")
    target = files.absolute(target)
    refuse_existing(target)
    needed = [f"{city}/{LIST}" for city in splits]
    source_folder, _ = open_root(
        source,
        {"CV-Cities": needed},
        report,
        "for a part of the cities, give --train-cities and --test-cities",
    )
    references: list[Row] = []
    queries: list[Row] = []
    number = -1
    for city, split in splits.items():
        for pair in _read_city(source_folder, city):
            number += 1
            if not source_folder.has_pair(pair.satellite, pair.panorama):
                continue
            common: dict[str, Any] = {
                "id": number,
                "place_id": number,
                "split": split,
                "lat": pair.lat,
                "lon": pair.lon,
                "region": city,
                "source_id": pair.name,
            }
            references.append(Row(**common, uri=source_folder.join(pair.satellite)))
            queries.append(Row(**common, uri=source_folder.join(pair.panorama)))
    return source_folder.write(
        target, references, queries, name="cvcities", views=VIEWS, strict=strict
    )


@dataclass(frozen=True)
class _Pair:
    name: str
    lat: float
    lon: float
    satellite: str
    panorama: str


def _read_city(source_folder: SourceFolder, city: str) -> Iterator[_Pair]:
    name = f"{city}/{LIST}"
    uri = source_folder.join(name)
    rows = list(enumerate(csv.reader(io.StringIO(source_folder.read_text(name))), 1))
    if not any(fields for _, fields in rows):
        raise empty_list_error(uri)
    for line, fields in rows:
        if not fields:
            continue
        location = f"{uri}, line {line}"
        if len(fields) < NUM_COLUMNS:
            raise InputError(
                f"{location} has {len(fields)} columns, but needs {NUM_COLUMNS}: name, longitude,"
                " latitude, city, satellite image, panorama"
            )
        lat, lon = _parse_position(location, city, fields)
        satellite, panorama = (_clean_path(field) for field in fields[4:6])
        yield _Pair(fields[0].strip(), lat, lon, satellite, panorama)


def _parse_position(location: str, city: str, fields: list[str]) -> tuple[float, float]:
    """Return latitude and longitude. Raises InputError where they are not of the city."""
    try:
        lon = float(fields[1])
        lat = float(fields[2])
    except ValueError as error:
        raise InputError(f"{location}: {fields[1:3]} is no longitude and latitude") from error
    centre = CENTRES.get(city)
    if centre is not None and not _is_near(lat, lon, centre):
        hint = "restore the list"
        if _is_near(lon, lat, centre):
            hint = "longitude and latitude are swapped: put the longitude first"
        raise InputError(f"{location}: {fields[1:3]} is not in {city}; {hint}")
    if not is_position(lat, lon):
        raise InputError(f"{location}: {fields[1:3]} is not within -180..180 and -90..90 degrees")
    return lat, lon


def _is_near(lat: float, lon: float, centre: tuple[float, float]) -> bool:
    return is_position(lat, lon) and float(metres_between(lat, lon, *centre)) < REACH_M


def _clean_path(field: str) -> str:
    """Return a path relative to the folder of the cities, with slashes."""
    return re.sub(r"/+", "/", field.strip().replace("\\", "/")).removeprefix("./").lstrip("/")
