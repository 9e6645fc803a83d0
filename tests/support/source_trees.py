"""Write small folders in the exact layouts of the public data sets, with generated images.

Both images of a place show the same smooth pattern, so that they can be matched; all is seeded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.io
from PIL import Image

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.format.image_paths import resolve
from s4g_ray.data.image_table import View

Size = tuple[int, int]  # height, width in pixels

CITIES = {  # VIGOR: latitude and longitude of each city's first tile
    "Chicago": (41.88, -87.64),
    "NewYork": (40.73, -73.99),
    "SanFrancisco": (37.78, -122.42),
    "Seattle": (47.61, -122.33),
}
TILE_STEP = 0.0005  # degrees of longitude between neighboring tiles: each overlaps the next by half


def rows(dataset: GeoDataset, view: View, *columns: str) -> list[tuple[Any, ...]]:
    """Return columns of a written table as tuples, sorted by the first column; uris absolute."""
    source = dataset.references if view == "references" else dataset.queries
    table = source.to_table(columns=list(columns)).sort_by(columns[0])
    values = {column: table[column].to_pylist() for column in columns}
    if "uri" in values:
        values["uri"] = [resolve(dataset.images_root, uri) for uri in values["uri"]]
    return list(zip(*values.values(), strict=True))


def save_view(path: Path, place: int, view: int, size: Size) -> None:
    """Write an image of a place: its pattern at a size, with noise that depends on the view."""
    coarse = np.random.default_rng((11, place)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.int64
    )
    noise = np.random.default_rng((12, place, view)).integers(-12, 13, smooth.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(path)


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file of the given lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cvusa_position(number: int) -> tuple[float, float, float, float]:
    """Return the values of all.csv for an id up to 2,500.

    Latitude and longitude of the satellite image, then of the panorama.
    """
    lat = 38 + number / 64
    lon = -100 - number / 32
    return lat, lon, lat + 2**-14, lon - 2**-14


def cvusa_ids(train: int, test: int) -> tuple[list[int], list[int]]:
    """Return the ids of train and of test, counted from 1; test ids are spread evenly."""
    total = train + test
    tested = [(number + 1) * total // test for number in range(test)]
    return [number for number in range(1, total + 1) if number not in tested], tested


def cvusa_tree(
    root: Path,
    *,
    train: int = 4,
    test: int = 2,
    nested: bool = False,
    csv_at_root: bool = False,
    satellite_size: Size = (48, 48),
    panorama_size: Size = (24, 132),
) -> Path:
    """Write a CVUSA folder; `nested`: images in bingmap/bingmap, as in some archives."""
    ids = dict(zip(("train", "val"), cvusa_ids(train, test), strict=True))
    for split, numbers in ids.items():
        lines = []
        for number in numbers:
            satellite = f"bingmap/19/{number:07d}.jpg"
            panorama = f"streetview/panos/{number:07d}.jpg"
            lines.append(f"{satellite},{panorama},streetview/annotations/{number:07d}.png")
            save_view(root / ("bingmap" if nested else "") / satellite, number, 0, satellite_size)
            save_view(root / panorama, number, 1, panorama_size)
        write_lines(root / f"splits/{split}-19zl.csv", lines)
    rows = []
    for number in range(1, train + test + 1):
        values = (*cvusa_position(number), 180.0)
        rows.append(",".join(map(repr, values)))
    write_lines(root / ("all.csv" if csv_at_root else "split_locations/all.csv"), rows)
    return root


def cvact_name(row: int) -> str:
    """Return the panorama id of a 0-based row of ACT_data.mat; ids do not sort as rows do."""
    return f"{'zyxwvutsrq'[row % 10]}-_{row:04d}AbCdEfGhIjKlMnO"


def cvact_utm(row: int) -> tuple[float, float]:
    """Return easting and northing of a 0-based row: metres in UTM zone 55 south, Canberra."""
    return 692_000.0 + 75.0 * row, 6_090_000.0 + 50.0 * row


def cvact_tree(
    root: Path,
    *,
    train: int = 4,
    val: int = 2,
    test: int = 3,
    unlisted: int = 0,
    characters: bool = False,
    northing_first: bool = False,
    satellite_size: Size = (48, 48),
    panorama_size: Size = (32, 64),
) -> Path:
    """Write a CVACT folder: the first rows are train, then val, then those in test only.

    Test begins with the last val row. `unlisted` test images are not in ACT_data.mat;
    `characters`: panoIds is a character matrix, not cells.
    """
    num_rows = train + val + max(test - 1, 0)
    names = [cvact_name(row) for row in range(num_rows)]
    names[1] = names[1][:-2]  # shorter: padded in a character matrix
    utm = np.array([cvact_utm(row) for row in range(num_rows)])
    tested = list(range(train + val - 1, train + val - 1 + test))
    strange = [f"not-in-the-list-{number:02d}-xyz" for number in range(unlisted)]
    folders = {"ANU_data_small": [(names[row], row) for row in range(train + val)]}
    folders["ANU_data_test"] = [(names[row], row) for row in tested]
    folders["ANU_data_test"] += [(name, 10_000 + number) for number, name in enumerate(strange)]
    for folder, images in folders.items():
        for name, place in images:
            satellite = root / folder / f"satview_polish/{name}_satView_polish.jpg"
            save_view(satellite, place, 0, satellite_size)
            save_view(root / folder / f"streetview/{name}_grdView.jpg", place, 1, panorama_size)
    train_set = _cvact_set("train", range(train))
    val_set = _cvact_set("val", range(train, train + val))
    save_cvact_mat(
        root / "ACT_data.mat",
        panoIds=np.array(names) if characters else np.array(names, dtype=object)[:, None],
        utm=utm[:, ::-1] if northing_first else utm,
        trainSet=train_set,
        valSet=val_set,
        valSetAll=val_set,
    )
    return root


def _cvact_set(kind: str, rows: range) -> dict[str, Any]:
    return {f"{kind}Num": len(rows), f"{kind}Ind": np.array(rows)[:, None] + 1}


def save_cvact_mat(path: Path, **variables: Any) -> None:
    """Write variables as MATLAB 5; a dictionary becomes a 1 x 1 struct, its fields in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(str(path), variables)


def vigor_tile(city: str, number: int) -> str:
    """Return the name of a city's tile, from its number within the city."""
    lat, lon = CITIES[city]
    return f"satellite_{lat:.10f}_{lon + number * TILE_STEP:.10f}.png"


def vigor_panorama(city: str, number: int, tile: int) -> str:
    """Return the name of a city's panorama, a little north-east of the centre of its tile."""
    lat, lon = CITIES[city]
    own_lat = lat + 0.0001
    own_lon = lon + tile * TILE_STEP + number * 1e-6
    return f"{city[:3]}-{number:04d}_aBcDeFgHiJkLm,{own_lat:.6f},{own_lon:.6f},.jpg"


def vigor_row(city: str, panorama: str, tiles: list[int]) -> str:
    """Return a label row: the panorama, then four tiles with their pixel offsets.

    `tiles[0]` is the positive.
    """
    offsets = ("-35.5 12.25", "-35.5 -307.75", "284.5 12.25", "284.5 -307.75")
    shown = [
        f"{vigor_tile(city, tile)} {offset}" for tile, offset in zip(tiles, offsets, strict=True)
    ]
    return " ".join([panorama, *shown])


def vigor_tree(
    root: Path,
    *,
    layout: Literal["upstream", "published"] = "upstream",
    tiles_per_city: int = 6,
    corrected: bool = True,
    satellite_size: Size = (48, 48),
    panorama_size: Size = (32, 64),
) -> Path:
    """Write a VIGOR folder: in each city a panorama on each tile but the last, two on the first.

    Even panoramas of a city are train in the same area, odd ones test. A panorama's semi-positives
    are the next three tiles. The corrected labels give the first panorama of each city the second
    tile instead of the first.
    """
    for order, city in enumerate(CITIES):
        if layout == "upstream":
            panoramas = root / city / "panorama"
            tiles = root / city / "satellite"
        else:
            panoramas = root / "ground" / city
            tiles = root / "satellite" / city
        for tile in range(tiles_per_city):
            save_view(tiles / vigor_tile(city, tile), 1000 * order + tile, 0, satellite_size)
        positive = [number % (tiles_per_city - 1) for number in range(tiles_per_city)]
        names = [vigor_panorama(city, number, tile) for number, tile in enumerate(positive)]
        for number, name in enumerate(names):
            save_view(panoramas / name, 1000 * order + positive[number], 1 + number, panorama_size)
        listed = [vigor_tile(city, tile) for tile in range(tiles_per_city)]
        write_lines(root / f"splits/{city}/satellite_list.txt", listed)
        for end in ("", "__corrected") if corrected else ("",):
            shown = [[(tile + step) % tiles_per_city for step in range(4)] for tile in positive]
            if end:
                shown[0] = [1, 0, 2, 3]
            rows = [vigor_row(city, name, four) for name, four in zip(names, shown, strict=True)]
            folder = root / f"splits{end}" / city
            write_lines(folder / f"same_area_balanced_train{end}.txt", rows[0::2])
            write_lines(folder / f"same_area_balanced_test{end}.txt", rows[1::2])
            write_lines(folder / f"pano_label_balanced{end}.txt", rows)
    return root


def university_tree(
    root: Path,
    *,
    train: int = 4,
    test: int = 2,
    distractors: int = 1,
    drones: int = 3,
    streets: int = 2,
    size: Size = (48, 48),
) -> Path:
    """Write a University-1652 folder.

    Odd buildings are train, even ones test, and those from 1000 on are distractors.
    """
    counts = {"satellite": 1, "drone": drones, "street": streets, "google": streets}
    tested = [2 * number + 2 for number in range(test)]
    gallery = [*tested, *(1000 + number for number in range(distractors))]
    folders = {f"train/{view}": [2 * number + 1 for number in range(train)] for view in counts}
    for view in ("drone", "satellite", "street"):
        folders |= {f"test/query_{view}": tested, f"test/gallery_{view}": gallery}
    for folder, buildings in folders.items():
        view = folder.rpartition("/")[2].rpartition("_")[2]
        for building in buildings:
            for number in range(1, counts[view] + 1):
                name = {
                    "drone": f"image-{number:02d}.jpeg",
                    "satellite": f"{building:04d}.jpg",
                }.get(view, f"{number}.jpg")
                # the same image as a query and in the gallery
                seed = 100 * list(counts).index(view) + number
                save_view(root / folder / f"{building:04d}" / name, building, seed, size)
    return root
