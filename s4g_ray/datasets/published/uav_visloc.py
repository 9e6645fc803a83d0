"""Convert UAV-VisLoc: photos of fixed-wing drones on eleven flights over satellite maps.

Layout as published (arXiv 2405.11936, github.com/IntelliSensing/UAV-VisLoc): a folder FLIGHT of two
digits holds drone/FLIGHT_NUMBER.JPG, FLIGHT.csv (num,filename,date,lat,lon,height,...) and the map
satelliteFLIGHT.tif (flight 09: four files), which is georeferenced. The gallery is tiles of the
maps, cut by `s4g convert imagery`. Published positions are off by 24 to 48 m.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets import folder as plain_folder
from s4g_ray.datasets.lists.file_names import empty_list_error
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.published.split_names import parse_splits
from s4g_ray.datasets.source import SourceFolder, is_position
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

# flights as Game4Loc divides them across areas (scripts/prepare_dataset/visloc.py of its code)
TRAIN_FLIGHTS = "01,03,05,08"
TEST_FLIGHTS = "02,04,11"
COLUMNS = ("filename", "lat", "lon")


def convert(
    source: str,
    target: str,
    *,
    tiles: str | None = None,
    train_flights: str = TRAIN_FLIGHTS,
    test_flights: str = TEST_FLIGHTS,
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a UAV-VisLoc folder; images stay where they are.

    tiles: a data set of tiles of the satellite maps. A photo's place is, of the tiles that hold its
    position, the one with the nearest centre; the others are its semi-positives. The region is the
    flight. Flights of neither list are left out. Raises InputError without tiles, for another
    layout, malformed rows, flights in both lists, missing images when `strict`, and a target that
    holds a data set.
    """
    if tiles is None:
        raise InputError(
            "UAV-VisLoc has maps, not tiles: cut them first with s4g convert imagery"
            f" {source}/*/satellite*.tif TILES --size-m 150 --overlap 0.5, then give --tiles TILES"
        )
    splits = parse_splits(train_flights, test_flights, "flight", "flights", "01,03")
    target = files.absolute(target)
    refuse_existing(target)
    needed = [path for flight in splits for path in (f"{flight}/{flight}.csv", f"{flight}/drone")]
    source_folder, _ = open_root(source, {"UAV-VisLoc": needed}, report)
    photos = [
        photo
        for flight, split in splits.items()
        for photo in _read_flight(source_folder, flight, split)
    ]
    table = pa.table(
        dict(zip(("path", "lat", "lon", "split", "region"), zip(*photos, strict=True), strict=True))
    )
    with tempfile.TemporaryDirectory(prefix="s4g-visloc-") as work:
        listed = str(Path(work) / "queries.parquet")
        pq.write_table(table, listed)
        return plain_folder.convert(
            source_folder.uri,
            target,
            queries=listed,
            references=tiles,
            split_column="split",
            region_column="region",
            name="uav_visloc",
            strict=strict,
            report=report,
        )


def _read_flight(
    source_folder: SourceFolder, flight: str, split: str
) -> Iterator[tuple[str, float, float, str, str]]:
    """Yield path, latitude, longitude, split and region of each photo of a flight."""
    name = f"{flight}/{flight}.csv"
    uri = source_folder.join(name)
    reader = csv.DictReader(io.StringIO(source_folder.read_text(name)))
    header = [column.strip() for column in reader.fieldnames or []]
    if not header:
        raise empty_list_error(uri)
    reader.fieldnames = header
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise InputError(f"{uri} lacks the columns {', '.join(missing)}; it has {header}")
    has_rows = False
    for row in reader:
        has_rows = True
        try:
            lat = float(row["lat"])
            lon = float(row["lon"])
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{uri}, line {reader.line_num}: lat and lon are no numbers"
            ) from error
        if not is_position(lat, lon):
            raise InputError(
                f"{uri}, line {reader.line_num}: {lat}, {lon} is not within -90..90 and -180..180"
                " degrees"
            )
        yield f"{flight}/drone/{row['filename'].strip()}", lat, lon, split, flight
    if not has_rows:
        raise empty_list_error(uri)
