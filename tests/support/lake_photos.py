"""Photos with positions over the Landsat scene: its infrared bands, as another camera."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.page_server import landsat

PIXELS = 64


def write_lake_photos(folder: Path, count: int, *, seed: int = 0) -> None:
    """Write `count` photos of 1920 m of ground, north up, and queries.csv with their positions."""
    import rasterio

    with rasterio.open(landsat()) as scene:
        bands = scene.read([7, 5, 4]).transpose(1, 2, 0).astype(float)
        place = scene.transform
    low, high = np.percentile(bands[bands.max(axis=2) > 0], (2, 98), axis=0)
    picture = (np.clip((bands - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    side = 1920 / (6_371_008.8 * np.pi / 180)
    rows = round(side / abs(place.e))
    columns = round(side / np.cos(np.radians(40.8)) / place.a)
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with (folder / "queries.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "lat", "lon"])
        for number in range(count):
            top = int(rng.integers(0, picture.shape[0] - rows))
            left = int(rng.integers(0, picture.shape[1] - columns))
            part = Image.fromarray(picture[top : top + rows, left : left + columns])
            part.resize((PIXELS, PIXELS)).save(folder / f"{number:04}.jpg", quality=90)
            lat = place.f + place.e * (top + rows / 2)
            lon = place.c + place.a * (left + columns / 2)
            table.writerow([f"{number:04}.jpg", f"{lat:.6f}", f"{lon:.6f}"])
