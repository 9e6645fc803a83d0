"""Convert DenseUAV: drone images of university campuses, satellite images of the same points.

Layout as published (arXiv 2201.09201, github.com/Dmmm1997/DenseUAV): train/VIEW/PLACE and
test/query_VIEW/PLACE, test/gallery_VIEW/PLACE, with VIEW drone or satellite; drone images are
H80.JPG, H90.JPG and H100.JPG, satellite images H80.tif and H80_old.tif. A row of Dense_GPS_ALL.txt
is a path in a place's folder, then E and the longitude, N and the latitude, and the height. The
gallery holds the places to train on, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.published.drone_folders import (
    VIEWS,
    PlaceImage,
    check_views,
    find_images,
    list_places,
    make_rows,
)
from s4g_ray.datasets.source import SourceFolder, is_position
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

POSITIONS = "Dense_GPS_ALL.txt"
Position = tuple[float, float]  # degrees: latitude, longitude


def convert(
    source: str,
    target: str,
    *,
    query_view: str = "drone",
    reference_view: str = "satellite",
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a DenseUAV folder; images stay where they are.

    One view is drone, the other satellite. A place is a numbered folder, with one position, as in
    the published evaluation. The region of an image is its height ("80 m"). The gallery of the test
    split holds the places to train on, too, as published. `strict` makes places without a position
    an error; else their coordinates are null. Raises InputError for other views, another layout,
    malformed rows of positions, and a target that holds a data set.
    """
    check_views(query_view, reference_view)
    target = files.absolute(target)
    refuse_existing(target)
    references = [(f"train/{reference_view}", "train"), (f"test/gallery_{reference_view}", "test")]
    queries = [(f"train/{query_view}", "train"), (f"test/query_{query_view}", "test")]
    needed = [POSITIONS, *(path for path, _ in references + queries)]
    source_folder, _ = open_root(source, {"DenseUAV": needed}, report)
    positions = _read_positions(source_folder)
    found = {
        "references": list(_find_images(source_folder, references, positions)),
        "queries": list(_find_images(source_folder, queries, positions)),
    }
    lost = {image.place_id for images in found.values() for image in images if image.lat is None}
    if lost:
        line = f"places that {POSITIONS} lacks: {len(lost):,}, the first {min(lost)}"
        if strict:
            raise InputError(f"{source_folder.uri}: {line}; add them, or convert without --strict")
        source_folder.add_note(f"{line}; their coordinates are empty")
    return source_folder.write(
        target,
        make_rows(source_folder, found["references"]),
        make_rows(source_folder, found["queries"]),
        name=f"denseuav_{query_view}_to_{reference_view}",
        views={"references": VIEWS[reference_view], "queries": VIEWS[query_view]},
        strict=strict,
    )


def _read_positions(source_folder: SourceFolder) -> dict[str, Position]:
    """Return the position of each place's folder; of several rows the last, as published."""
    positions = {}
    for location, line in source_folder.read_lines(POSITIONS):
        fields = line.split()
        parts = PurePosixPath(fields[0]).parts
        east = _find_degrees(fields[1:], "E")
        north = _find_degrees(fields[1:], "N")
        if len(parts) < 2 or east is None or north is None:
            raise InputError(
                f"{location}: {line!r} is not .../PLACE/IMAGE ELON NLAT HEIGHT; restore the file"
            )
        if not is_position(north, east):
            raise InputError(f"{location}: {line!r} is not within -90..90 and -180..180 degrees")
        positions[parts[-2]] = (north, east)
    return positions


def _find_degrees(fields: list[str], letter: str) -> float | None:
    """Return the number of the field that begins with a letter; None where there is none."""
    for field in fields:
        if re.fullmatch(rf"{letter}-?\d+(\.\d+)?", field):
            return float(field.removeprefix(letter))
    return None


def _find_images(
    source_folder: SourceFolder, folders: list[tuple[str, str]], positions: dict[str, Position]
) -> Iterator[PlaceImage]:
    """Yield the images of folders, each with its split."""
    places = [
        (place, f"{folder}/{place}", split)
        for folder, split in folders
        for place in list_places(source_folder, folder, "place")
    ]
    found = find_images(source_folder, [path for _, path, _ in places])
    for (place, _, split), paths in zip(places, found, strict=True):
        lat, lon = positions.get(place, (None, None))
        for path in paths:
            yield PlaceImage(int(place), path, split, _find_height(path), lat, lon)


def _find_height(path: str) -> str | None:
    """Return the height that an image's name tells, such as "80 m"."""
    match = re.match(r"H(\d+)(?![0-9])", PurePosixPath(path).name)
    return f"{match[1]} m" if match else None
