"""Convert VIGOR: street panoramas of four American cities, satellite tiles without gaps.

A label row has 13 columns: the panorama, then four tiles with a pixel offset each. The first tile
is the positive; the other three (semi-positives) also show the place, near their border. File names
contain positions. Panoramas are published with north in their centre column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, get_args

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.source import SourceFolder, is_position
from s4g_ray.datasets.source_rows import Row
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

Area = Literal["same", "cross"]
Labels = Literal["original", "corrected"]

CITIES = ("Chicago", "NewYork", "SanFrancisco", "Seattle")  # the order in which tiles are numbered
IMAGE_FOLDERS = {  # by layout: the folders of panoramas and of tiles
    "upstream": ("{city}/panorama", "{city}/satellite"),
    "published code": ("ground/{city}", "satellite/{city}"),
}
CORRECTED_FOLDERS = ("splits__corrected", "split__corrected")
# by area and split: the cities, and the label file of each
LABEL_FILES: dict[Area, dict[str, tuple[tuple[str, ...], str]]] = {
    "same": {
        "train": (CITIES, "same_area_balanced_train"),
        "test": (CITIES, "same_area_balanced_test"),
    },
    "cross": {
        "train": (("NewYork", "Seattle"), "pano_label_balanced"),
        "test": (("Chicago", "SanFrancisco"), "pano_label_balanced"),
    },
}
NUM_COLUMNS = 13
VIEWS = {"references": "satellite tile, zoom 20", "queries": "street panorama, north in the centre"}


def convert(
    source: str,
    target: str,
    *,
    area: Area = "same",
    labels: Labels = "original",
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a VIGOR folder; images stay where they are.

    A place is a tile. Tiles are numbered over the four cities, so that place_ids are the same in
    all variants. Every tile of the test cities is a `test` reference (a distractor where no query
    matches it). The positives of train panoramas are `train` references; their id is the tile's
    number plus the number of tiles. Other tiles of the train cities have no row. Raises InputError
    for another layout, malformed label rows and names, tiles that satellite_list.txt lacks, missing
    images when `strict`, and a target that holds a data set.
    """
    if area not in get_args(Area):
        raise InputError(f"--area {area!r} is none of {', '.join(get_args(Area))}")
    if labels not in get_args(Labels):
        raise InputError(f"--labels {labels!r} is none of {', '.join(get_args(Labels))}")
    target = files.absolute(target)
    refuse_existing(target)
    source_folder, layout = _open_layout(source, area, labels, report)
    source_folder.prefetch(folder.format(city=city) for folder in layout.images for city in CITIES)
    tiles = _read_tiles(source_folder)
    found = list(_read_labels(source_folder, tiles, area, layout.labels))
    test_cities = LABEL_FILES[area]["test"][0]
    references = _make_references(source_folder, layout, tiles, found, test_cities)
    queries = _make_queries(source_folder, layout, found)
    name = f"vigor_{area}"
    if labels == "corrected":
        name += "_corrected"
    return source_folder.write(target, references, queries, name=name, views=VIEWS, strict=strict)


@dataclass(frozen=True)
class _Layout:
    images: tuple[str, str]  # folders of panoramas and of tiles; {city} stands for the city
    labels: str  # {city} and {name} stand for the city and the file's name without .txt


def _open_layout(
    source: str, area: Area, labels: Labels, report: Report
) -> tuple[SourceFolder, _Layout]:
    names = [(city, name) for cities, name in LABEL_FILES[area].values() for city in cities]
    original = "splits/{city}/{name}.txt"
    lists = [f"splits/{city}/satellite_list.txt" for city in CITIES]
    if labels == "original":
        lists += [original.format(city=city, name=name) for city, name in names]
    layouts = {}
    for layout, folders in IMAGE_FOLDERS.items():
        image_folders = [folder.format(city=city) for folder in folders for city in CITIES]
        layouts[layout] = [*image_folders, *lists]
    source_folder, chosen = open_root(source, layouts, report)
    images = IMAGE_FOLDERS[chosen]
    if labels == "original":
        return source_folder, _Layout(images, original)
    corrected = {
        folder: f"{folder}/{{city}}/{{name}}__corrected.txt" for folder in CORRECTED_FOLDERS
    }
    label_layouts = {
        folder: [path.format(city=city, name=name) for city, name in names]
        for folder, path in corrected.items()
    }
    remedy = "corrected labels are a separate download; give --labels original for the others"
    corrected_labels = corrected[source_folder.choose_layout(label_layouts, remedy)]
    return source_folder, _Layout(images, corrected_labels)


@dataclass(frozen=True)
class _Tile:
    number: int
    city: str
    name: str
    lat: float
    lon: float


@dataclass(frozen=True)
class _Label:
    split: str
    city: str
    panorama: str
    lat: float
    lon: float
    tiles: tuple[int, ...]  # the positive, then the three semi-positives


def _read_tiles(source_folder: SourceFolder) -> dict[str, _Tile]:
    """Return all tiles by name, numbered city by city in the order of satellite_list.txt."""
    tiles: dict[str, _Tile] = {}
    for city in CITIES:
        for location, line in source_folder.read_lines(f"splits/{city}/satellite_list.txt"):
            name = line.strip()
            if name in tiles:
                raise InputError(f"{location}: tile {name!r} is listed twice; remove one")
            parts = PurePosixPath(name).stem.split("_")
            lat, lon = _parse_position(location, name, parts, "satellite_LAT_LON.png")
            tiles[name] = _Tile(len(tiles), city, name, lat, lon)
    return tiles


def _read_labels(
    source_folder: SourceFolder, tiles: dict[str, _Tile], area: Area, path: str
) -> Iterator[_Label]:
    """Yield the label rows of train, city by city, then those of test."""
    for split, (cities, name) in LABEL_FILES[area].items():
        for city in cities:
            for location, line in source_folder.read_lines(path.format(city=city, name=name)):
                yield _parse_label(location, line, split, city, tiles)


def _parse_label(
    location: str, line: str, split: str, city: str, tiles: dict[str, _Tile]
) -> _Label:
    fields = line.split()
    if len(fields) != NUM_COLUMNS:
        raise InputError(
            f"{location} has {len(fields)} columns, but needs {NUM_COLUMNS} (a panorama, and four"
            f" tiles with two offsets each): {line!r}"
        )
    panorama = fields[0]
    names = fields[1::3]
    for name in names:
        if name not in tiles:
            raise InputError(f"{location}: tile {name!r} is in no satellite_list.txt: {line!r}")
    lat, lon = _parse_position(location, panorama, panorama.split(","), "ID,LAT,LON,.jpg")
    numbers = tuple(tiles[name].number for name in names)
    return _Label(split, city, panorama, lat, lon, numbers)


def _parse_position(
    location: str, name: str, parts: Sequence[str], form: str
) -> tuple[float, float]:
    """Return latitude and longitude, which are the second and third part of a name."""
    try:
        lat = float(parts[1])
        lon = float(parts[2])
    except (ValueError, IndexError) as error:
        raise InputError(f"{location}: {name!r} has no position; names are {form}") from error
    if not is_position(lat, lon):
        raise InputError(f"{location}: {name!r} is not within -90..90 and -180..180 degrees")
    return lat, lon


def _make_references(
    source_folder: SourceFolder,
    layout: _Layout,
    tiles: dict[str, _Tile],
    labels: Sequence[_Label],
    test_cities: Sequence[str],
) -> list[Row]:
    """Return the rows of the train gallery, then of the test gallery; a tile of both has two."""
    positives = {label.tiles[0] for label in labels if label.split == "train"}
    chosen = [("train", tile) for tile in tiles.values() if tile.number in positives]
    chosen += [("test", tile) for tile in tiles.values() if tile.city in test_cities]
    rows = []
    for split, tile in chosen:
        path = f"{layout.images[1].format(city=tile.city)}/{tile.name}"
        if not source_folder.has_image(path):
            continue
        row = Row(
            id=tile.number + len(tiles) if split == "train" else tile.number,
            place_id=tile.number,
            uri=source_folder.join(path),
            split=split,
            lat=tile.lat,
            lon=tile.lon,
            region=tile.city,
            source_id=PurePosixPath(tile.name).stem,
        )
        rows.append(row)
    return rows


def _make_queries(
    source_folder: SourceFolder, layout: _Layout, labels: Sequence[_Label]
) -> list[Row]:
    """Return a row for each label whose panorama exists; its id is the label's number."""
    rows = []
    for number, label in enumerate(labels):
        path = f"{layout.images[0].format(city=label.city)}/{label.panorama}"
        if not source_folder.has_image(path):
            continue
        positive = label.tiles[0]
        semi_positives = [tile for tile in dict.fromkeys(label.tiles[1:]) if tile != positive]
        row = Row(
            id=number,
            place_id=positive,
            uri=source_folder.join(path),
            split=label.split,
            lat=label.lat,
            lon=label.lon,
            region=label.city,
            source_id=label.panorama.partition(",")[0],
            heading_deg=0.0,
            semi_positives=semi_positives,
        )
        rows.append(row)
    return rows
