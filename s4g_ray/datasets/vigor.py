"""VIGOR: street panoramas of four American cities against satellite tiles that cover the cities without gaps.

A label row has 13 columns: the panorama, then four tiles with a pixel offset each; the first tile is the
positive, the other three (semi-positives) show the place too, near their border. File names carry positions.
Panoramas are shipped with north in their centre column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, get_args

from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.datasets.source import Report, Row, SourceFolder, silent, valid_position
from s4g_ray.errors import InputError
from s4g_ray.storage import files

Area = Literal["same", "cross"]
Labels = Literal["original", "corrected"]

CITIES = ("Chicago", "NewYork", "SanFrancisco", "Seattle")  # the order in which tiles are numbered
IMAGE_FOLDERS = {  # layout: of panoramas, of tiles
    "upstream": ("{city}/panorama", "{city}/satellite"),
    "published code": ("ground/{city}", "satellite/{city}"),
}
CORRECTED_FOLDERS = ("splits__corrected", "split__corrected")
LABEL_FILES: dict[
    Area, dict[str, tuple[tuple[str, ...], str]]
] = {  # area: of each split, the cities and their file
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
    report: Report = silent,
) -> GeoDataset:
    """Convert a VIGOR folder, images referenced where they are.

    A place is a tile, numbered over the four cities, so that place_ids are the same in all variants. Every
    tile of the test cities is a `test` reference (a distractor where no query has it); the positives of train
    panoramas are `train` references, whose ids are the tile's number plus the number of tiles. Other tiles of
    the train cities have no row. Raises InputError for another layout, malformed label rows and names, tiles
    that satellite_list.txt lacks, missing images when `strict`, and a target that holds a data set.
    """
    for name, value, allowed in (
        ("area", area, get_args(Area)),
        ("labels", labels, get_args(Labels)),
    ):
        if value not in allowed:
            raise InputError(f"{name}={value!r} is none of {', '.join(allowed)}")
    target = files.absolute(target)
    refuse_existing(target)
    source_folder = SourceFolder(source, report)
    layout = _choose_layout(source_folder, area, labels)
    source_folder.prefetch(folder.format(city=city) for folder in layout.images for city in CITIES)
    tiles = _read_tiles(source_folder)
    found = list(_read_labels(source_folder, tiles, area, layout.labels))
    test_cities = LABEL_FILES[area]["test"][0]
    references = _references(source_folder, layout, tiles, found, test_cities)
    queries = [
        Row(
            id=number,
            place_id=label.tiles[0],
            uri=source_folder.join(path),
            split=label.split,
            lat=label.lat,
            lon=label.lon,
            region=label.city,
            source_id=label.panorama.partition(",")[0],
            heading_deg=0.0,
            semi_positives=[
                tile for tile in dict.fromkeys(label.tiles[1:]) if tile != label.tiles[0]
            ],
        )
        for number, label in enumerate(found)
        if source_folder.image(
            path := f"{layout.images[0].format(city=label.city)}/{label.panorama}"
        )
    ]
    name = f"vigor_{area}" + ("_corrected" if labels == "corrected" else "")
    return source_folder.write(target, references, queries, name=name, views=VIEWS, strict=strict)


@dataclass(frozen=True)
class _Layout:
    images: tuple[str, str]  # of panoramas, of tiles; {city} stands for the city
    labels: str  # {city} and {name} stand for the city and the file's name without .txt


def _choose_layout(source_folder: SourceFolder, area: Area, labels: Labels) -> _Layout:
    names = [(city, name) for cities, name in LABEL_FILES[area].values() for city in cities]
    original, corrected = (
        "splits/{city}/{name}.txt",
        [f"{f}/{{city}}/{{name}}__corrected.txt" for f in CORRECTED_FOLDERS],
    )
    lists = [f"splits/{city}/satellite_list.txt" for city in CITIES]
    if labels == "original":
        lists += [original.format(city=city, name=name) for city, name in names]
    variants = {
        layout: [*(folder.format(city=city) for folder in folders for city in CITIES), *lists]
        for layout, folders in IMAGE_FOLDERS.items()
    }
    images = IMAGE_FOLDERS[source_folder.choose(variants)]
    if labels == "original":
        return _Layout(images, original)
    wanted = {
        folder: [path.format(city=city, name=name) for city, name in names]
        for folder, path in zip(CORRECTED_FOLDERS, corrected, strict=True)
    }
    remedy = "corrected labels are a separate download; give --labels original (labels='original') for the others"
    return _Layout(images, corrected[CORRECTED_FOLDERS.index(source_folder.choose(wanted, remedy))])


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
    """All tiles by name, numbered city by city in the order of satellite_list.txt."""
    tiles: dict[str, _Tile] = {}
    for city in CITIES:
        for at, line in source_folder.lines(f"splits/{city}/satellite_list.txt"):
            name = line.strip()
            if name in tiles:
                raise InputError(f"{at}: tile {name!r} is listed twice; remove one")
            lat, lon = _position(
                at, name, PurePosixPath(name).stem.split("_"), "satellite_LAT_LON.png"
            )
            tiles[name] = _Tile(len(tiles), city, name, lat, lon)
    return tiles


def _read_labels(
    source_folder: SourceFolder, tiles: dict[str, _Tile], area: Area, path: str
) -> Iterator[_Label]:
    """The rows of the train source_folder, city by city, then of the test source_folder."""
    for split, (cities, name) in LABEL_FILES[area].items():
        for city in cities:
            for at, line in source_folder.lines(path.format(city=city, name=name)):
                fields = line.split()
                if len(fields) != NUM_COLUMNS:
                    raise InputError(
                        f"{at} has {len(fields)} columns, but {NUM_COLUMNS} are wanted (a panorama, and four tiles"
                        f" with two offsets each): {line!r}"
                    )
                panorama, shown = fields[0], fields[1::3]
                unknown = [tile for tile in shown if tile not in tiles]
                if unknown:
                    raise InputError(
                        f"{at}: tile {unknown[0]!r} is in no satellite_list.txt: {line!r}"
                    )
                lat, lon = _position(at, panorama, panorama.split(","), "ID,LAT,LON,.jpg")
                yield _Label(
                    split, city, panorama, lat, lon, tuple(tiles[tile].number for tile in shown)
                )


def _position(at: str, name: str, parts: Sequence[str], form: str) -> tuple[float, float]:
    """Latitude and longitude, which are the second and third part of a name."""
    try:
        lat, lon = float(parts[1]), float(parts[2])
    except (ValueError, IndexError) as error:
        raise InputError(f"{at}: {name!r} carries no position; names are {form}") from error
    if not valid_position(lat, lon):
        raise InputError(f"{at}: {name!r} is not within -90..90 and -180..180 degrees")
    return lat, lon


def _references(
    source_folder: SourceFolder,
    layout: _Layout,
    tiles: dict[str, _Tile],
    labels: Sequence[_Label],
    test_cities: Sequence[str],
) -> list[Row]:
    """The train gallery, then the test gallery; a tile of both has two rows."""
    positives = {label.tiles[0] for label in labels if label.split == "train"}
    chosen = [("train", tile) for tile in tiles.values() if tile.number in positives]
    chosen += [("test", tile) for tile in tiles.values() if tile.city in test_cities]
    return [
        Row(
            id=tile.number + len(tiles) * (split == "train"),
            place_id=tile.number,
            uri=source_folder.join(path),
            split=split,
            lat=tile.lat,
            lon=tile.lon,
            region=tile.city,
            source_id=PurePosixPath(tile.name).stem,
        )
        for split, tile in chosen
        if source_folder.image(path := f"{layout.images[1].format(city=tile.city)}/{tile.name}")
    ]
