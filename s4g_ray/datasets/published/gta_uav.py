"""Convert GTA-UAV: drone images of a game's map, and tiles of its satellite map at four zooms.

Layout as published (arXiv 2409.16925, github.com/Yux1angJi/GTA-UAV): drone/images,
satellite/ZOOM_OFFSET_X_Y.png (in the first release ZOOM_X_Y.png), and for each area, cross or same,
AREA-area-drone2sate-train.json and -test.json: a list of drone images, each with its position in
metres on the map and the tiles that it overlaps.

The map is of no place on the earth. Its centre is put at 0 N, 0 E, which keeps distances to 1 mm a
km: the map is 11 km wide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from s4g_ray.amounts import join_first
from s4g_ray.data.dataset import GeoDataset, refuse_existing
from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.datasets.lists.file_names import empty_list_error
from s4g_ray.datasets.published.archive_root import open_root
from s4g_ray.datasets.published.drone_folders import make_tile_rows
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.datasets.source_rows import Row, ViewRows
from s4g_ray.errors import InputError
from s4g_ray.progress import Report, ignore_report
from s4g_ray.storage import files

Area = Literal["cross", "same"]
TILES = "satellite"
MAP_PIXELS = 24_576  # side of the satellite map, of 256-pixel tiles at the largest zoom
TILE_PIXELS = 256
METRES_A_PIXEL = 0.45
MAP_M = MAP_PIXELS * METRES_A_PIXEL
VIEWS = {"references": "satellite tile of a game's map", "queries": "drone image of a game"}


def convert(
    source: str,
    target: str,
    *,
    area: Area = "cross",
    strict: bool = False,
    report: Report = ignore_report,
) -> GeoDataset:
    """Convert a GTA-UAV folder; images stay where they are.

    A place is a tile. A drone image's own tile is that of the largest overlap: of the positive
    tiles (overlap above 0.39, intersection over union), or in train of all listed ones where none
    is positive. Semi-positives are, in train, all other tiles that its row lists, and in test the
    other positive ones, so that hit_rate_literal is the published recall@1. Test images without a
    positive tile are left out, as published. The gallery is all tiles, in train those that are a
    drone image's own. Raises InputError for another layout, malformed rows, missing images when
    `strict`, and a target that holds a data set.
    """
    if area not in get_args(Area):
        raise InputError(f"--area {area!r} is none of {', '.join(get_args(Area))}")
    target = files.absolute(target)
    refuse_existing(target)
    lists = {split: f"{area}-area-drone2sate-{split}.json" for split in ("train", "test")}
    source_folder, _ = open_root(source, {"GTA-UAV": [*lists.values(), TILES]}, report)
    tiles = _list_tiles(source_folder)
    images = [
        image for split, name in lists.items() for image in _read_images(source_folder, name, split)
    ]
    num_lost = sum(image.tile is None for image in images)
    if num_lost:
        source_folder.add_note(f"drone images left out because no tile matches: {num_lost:,}")
    queries = _make_queries(source_folder, tiles, images)
    references = _make_references(source_folder, tiles, queries)
    return source_folder.write_rows(
        target,
        references,
        ViewRows.from_list(queries, "queries"),
        name=f"gta_uav_{area}",
        views=VIEWS,
        strict=strict,
    )


@dataclass(frozen=True)
class _Tile:
    number: int
    name: str
    x_m: float  # of the centre, on the map, eastward
    y_m: float  # southward
    size_m: float


@dataclass(frozen=True)
class _Image:
    path: str
    split: str
    x_m: float
    y_m: float
    tile: str | None  # of the largest overlap
    others: list[str]


def to_degrees(x_m: float, y_m: float) -> tuple[float, float]:
    """Return latitude and longitude of a point on the map: x eastward and y southward, metres."""
    return (MAP_M / 2 - y_m) / METRES_A_DEGREE, (x_m - MAP_M / 2) / METRES_A_DEGREE


def _list_tiles(source_folder: SourceFolder) -> dict[str, _Tile]:
    """Return all tiles by name, numbered in the order of their names."""
    tiles: dict[str, _Tile] = {}
    others = []
    for name in sorted(source_folder.list_names(TILES)):
        match = re.fullmatch(r"(\d+)_(?:(\d+)_)?(\d+)_(\d+)\.(?:png|jpg|jpeg)", name)
        if not match:
            others.append(name)
            continue
        zoom, offset, column, row = (int(part or 0) for part in match.groups())
        side_m = MAP_M / 2**zoom
        shift = 0.5 + offset / TILE_PIXELS
        x_m = side_m * (column + shift)
        y_m = side_m * (row + shift)
        tiles[name] = _Tile(len(tiles), name, x_m, y_m, side_m)
    if others:
        source_folder.add_note(
            f"files of {TILES} left out that are not ZOOM_OFFSET_X_Y.png: {join_first(others)}"
        )
    return tiles


def _read_images(source_folder: SourceFolder, name: str, split: str) -> Iterator[_Image]:
    uri = source_folder.join(name)
    text = source_folder.read_text(name)
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InputError(f"{uri} is not JSON ({error}); download it again") from error
    if not isinstance(entries, list):
        raise InputError(f"{uri} is no list of drone images; download it again")
    if not entries:
        raise empty_list_error(uri)
    for number, entry in enumerate(entries, 1):
        try:
            yield _parse_image(entry, split)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{uri}, entry {number}: not a drone image with its position and tiles"
                f" ({type(error).__name__}: {error}); download it again"
            ) from error


def _parse_image(entry: dict[str, Any], split: str) -> _Image:
    """Read an entry of a list. Raises KeyError, TypeError and ValueError where it is malformed."""
    x_m, y_m = map(float, entry["drone_loc_x_y"])
    positive = _read_overlaps(entry, "pos")
    listed = _read_overlaps(entry, "pos_semipos")
    if split == "test":
        listed = positive
    choice = positive or listed
    tile = max(choice, key=lambda one: choice[one], default=None)
    others = sorted({*listed, *positive} - {tile})
    path = f"{entry['drone_img_dir']}/{entry['drone_img_name']}"
    return _Image(path, split, x_m, y_m, tile, others)


def _read_overlaps(entry: dict[str, Any], kind: str) -> dict[str, float]:
    """Return the overlap of each tile of a kind, by the tile's name."""
    names = entry[f"pair_{kind}_sate_img_list"]
    weights = entry[f"pair_{kind}_sate_weight_list"]
    return {str(name): float(weight) for name, weight in zip(names, weights, strict=True)}


def _make_queries(
    source_folder: SourceFolder, tiles: dict[str, _Tile], images: list[_Image]
) -> list[Row]:
    """Return a row for each drone image with a tile; its id is its number in both lists."""
    rows = []
    for number, image in enumerate(images):
        if image.tile is None:
            continue
        if not source_folder.has_pair(f"{TILES}/{image.tile}", image.path):
            continue
        if image.tile not in tiles:
            raise InputError(
                f"{image.path} matches {image.tile!r}, whose name is not ZOOM_OFFSET_X_Y.png;"
                " restore the list"
            )
        lat, lon = to_degrees(image.x_m, image.y_m)
        row = Row(
            id=number,
            place_id=tiles[image.tile].number,
            uri=source_folder.join(image.path),
            split=image.split,
            lat=lat,
            lon=lon,
            source_id=image.path.rpartition("/")[2],
            semi_positives=[tiles[other].number for other in image.others if other in tiles],
        )
        rows.append(row)
    return rows


def _make_references(
    source_folder: SourceFolder, tiles: dict[str, _Tile], queries: list[Row]
) -> ViewRows:
    """Return the tiles that train images have, then the test gallery: all tiles."""
    own = {row.place_id for row in queries if row.split == "train"}
    chosen = [("train", tile) for tile in tiles.values() if tile.number in own]
    chosen += [("test", tile) for tile in tiles.values()]
    rows = []
    for split, tile in chosen:
        lat, lon = to_degrees(tile.x_m, tile.y_m)
        row = Row(
            id=tile.number + len(tiles) if split == "train" else tile.number,
            place_id=tile.number,
            uri=source_folder.join(f"{TILES}/{tile.name}"),
            split=split,
            lat=lat,
            lon=lon,
            source_id=tile.name,
        )
        rows.append(row)
    return make_tile_rows(rows, [tile.size_m for _, tile in chosen])
