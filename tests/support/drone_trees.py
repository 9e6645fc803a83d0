"""Write small folders in the layouts of SUES-200, DenseUAV, GTA-UAV, UAV-VisLoc and CV-Cities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from s4g_ray.data.dataset import GeoDataset, write_dataset
from tests.support.source_trees import save_view, write_lines

SIZE = (32, 32)


def sues_archive(root: Path, *, places: tuple[int, ...] = (1, 2, 8, 12), drones: int = 2) -> Path:
    """Write the archive of SUES-200. Places 8 and 12 are of its test split."""
    for place in places:
        save_view(root / f"satellite-view/{place:04d}/0.png", place, 0, SIZE)
        for height in (150, 200, 250, 300):
            for number in range(drones):
                path = root / f"drone_view_512/{place:04d}/{height}/{number}.jpg"
                save_view(path, place, height + number, SIZE)
    return root


def sues_divided(root: Path, *, heights: tuple[int, ...] = (150, 300), drones: int = 2) -> Path:
    """Write SUES-200 as its script divides it: places 1 and 2 to train on, 8 and 12 to test."""
    folders = {
        "Training/{}/drone": (1, 2),
        "Training/{}/satellite": (1, 2),
        "Testing/{}/query_drone": (8, 12),
        "Testing/{}/query_satellite": (8, 12),
        "Testing/{}/gallery_drone": (1, 2, 8, 12),
        "Testing/{}/gallery_satellite": (1, 2, 8, 12),
    }
    for height in heights:
        for folder, places in folders.items():
            for place in places:
                above = root / folder.format(height) / f"{place:04d}"
                if folder.endswith("satellite"):
                    save_view(above / "0.png", place, 0, SIZE)
                    continue
                for number in range(drones):
                    save_view(above / f"{number}.jpg", place, height + number, SIZE)
    return root


def dense_position(place: int) -> tuple[float, float]:
    """Return latitude and longitude of a place of dense_tree, about 20 m from the next."""
    return 30.3 + place / 8192, 120.3 + place / 8192


def dense_tree(
    root: Path, *, train: tuple[int, ...] = (0, 1), test: tuple[int, ...] = (7,)
) -> Path:
    """Write a DenseUAV folder."""
    folders = {
        "train/drone": train,
        "train/satellite": train,
        "test/query_drone": test,
        "test/query_satellite": test,
        "test/gallery_drone": (*train, *test),
        "test/gallery_satellite": (*train, *test),
    }
    for folder, places in folders.items():
        for place in places:
            above = root / folder / f"{place:06d}"
            for height in (80, 90):
                if folder.endswith("drone"):
                    save_view(above / f"H{height}.JPG", place, height, SIZE)
                    continue
                save_view(above / f"H{height}.tif", place, 0, SIZE)
                save_view(above / f"H{height}_old.tif", place, 1, SIZE)
    lines = []
    for part, places in (("train", train), ("test", test)):
        for place in places:
            lat, lon = dense_position(place)
            for height in (80, 90):
                path = f"{part}/drone/{place:06d}/H{height}.JPG"
                lines.append(f"{path} E{lon!r} N{lat!r} {height}.5")
    write_lines(root / "Dense_GPS_ALL.txt", lines)
    return root


def gta_entry(
    name: str,
    position: tuple[float, float],
    positive: dict[str, float],
    semi_positive: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Return an entry of GTA-UAV's lists: tiles with their overlap."""
    listed = {**positive, **(semi_positive or {})}
    return {
        "drone_img_dir": "drone/images",
        "drone_img_name": name,
        "drone_loc_x_y": list(position),
        "sate_img_dir": "satellite",
        "pair_pos_sate_img_list": list(positive),
        "pair_pos_sate_weight_list": list(positive.values()),
        "pair_pos_semipos_sate_img_list": list(listed),
        "pair_pos_semipos_sate_weight_list": list(listed.values()),
        "drone_metadata": {"height": 200.0, "drone_yaw": 12.0},
    }


def gta_tree(root: Path, lists: dict[str, list[dict[str, Any]]], tiles: list[str]) -> Path:
    """Write a GTA-UAV folder. lists: the entries of each list, as "cross-train"."""
    for number, tile in enumerate(tiles):
        save_view(root / "satellite" / tile, number, 0, SIZE)
    for name, entries in lists.items():
        area, split = name.split("-")
        for number, entry in enumerate(entries):
            path = root / entry["drone_img_dir"] / entry["drone_img_name"]
            save_view(path, number, 1, SIZE)
        (root / f"{area}-area-drone2sate-{split}.json").write_text(json.dumps(entries))
    return root


def visloc_tree(root: Path, flights: dict[str, list[tuple[float, float]]]) -> Path:
    """Write a UAV-VisLoc folder: for each flight the positions of its photos."""
    for flight, positions in flights.items():
        # flight 07 of the archive has six columns alone
        header = "num,filename,date,lat,lon,height"
        rows = [header if flight == "07" else f"{header},Omega,Kappa,Phi1,Phi2"]
        for number, (lat, lon) in enumerate(positions, 1):
            name = f"{flight}_{number:04d}.JPG"
            save_view(root / flight / "drone" / name, number, 0, SIZE)
            row = f"{number},{name},2023-01-01T10:00:00,{lat!r},{lon!r},400.0"
            rows.append(row if flight == "07" else f"{row},1.0,2.0,-90.5,-90.1")
        write_lines(root / flight / f"{flight}.csv", rows)
    return root


def visloc_tiles(root: Path, centres: list[tuple[float, float]], size_m: float) -> GeoDataset:
    """Write a data set of tiles, as `s4g convert imagery` makes one, without queries."""
    for number in range(len(centres)):
        save_view(root / f"{number}.png", number, 0, SIZE)
    references = pa.table(
        {
            "id": pa.array(range(100, 100 + len(centres)), pa.int64()),
            "place_id": pa.array(range(100, 100 + len(centres)), pa.int64()),
            "uri": [f"{number}.png" for number in range(len(centres))],
            "offset": pa.nulls(len(centres), pa.int64()),
            "length": pa.nulls(len(centres), pa.int64()),
            "lat": [lat for lat, _ in centres],
            "lon": [lon for _, lon in centres],
            "split": ["gallery"] * len(centres),
            "region": pa.nulls(len(centres), pa.string()),
            "source_id": pa.nulls(len(centres), pa.string()),
            "size_m": pa.array([size_m] * len(centres), pa.float32()),
        }
    )
    fields = {
        **{
            field: pa.array([], references.schema.field(field).type)
            for field in references.column_names
            if field != "size_m"
        },
        "heading_deg": pa.array([], pa.float32()),
        "semi_positives": pa.array([], pa.list_(pa.int64())),
    }
    return write_dataset(str(root), references, pa.table(fields), name="tiles")


def cities_tree(root: Path, cities: dict[str, list[tuple[float, float]]]) -> Path:
    """Write a CV-Cities folder: for each city the positions of its pairs."""
    for city, positions in cities.items():
        rows = []
        for number, (lat, lon) in enumerate(positions):
            satellite = f"{city}/sat/{number}_sat.jpg"
            panorama = f"{city}/pano/{number}_pano.jpg"
            save_view(root / satellite, number, 0, SIZE)
            save_view(root / panorama, number, 1, SIZE)
            rows.append(f"{city}_{number},{lon!r},{lat!r},{city},{satellite},{panorama}")
        write_lines(root / city / "img_info.csv", rows)
    return root
