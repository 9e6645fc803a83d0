"""Write a data set of packed 16-pixel tiles at clustered positions, in the order of geography."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from s4g_ray.data.dataset import write_dataset

SIDE = 16  # pixels
CITY = 1000  # places
SPREAD_DEG = 0.05  # standard deviation of a city's places
IMAGES_PER_FILE = 100_000
TESTED = 256  # places of the test split


def write_scale_dataset(folder: Path, num_places: int) -> str:
    """Write num_places train places and TESTED test places, two images each; return the URI.

    The images of a city are alike, and ids follow the cities: an index over ranges of ids would
    have all candidates of a query on one shard.
    """
    rng = np.random.default_rng(0)
    total = num_places + TESTED
    city = np.arange(total) // CITY
    num_cities = int(city[-1]) + 1
    centres = np.stack([rng.uniform(-60, 60, num_cities), rng.uniform(-170, 170, num_cities)], 1)
    positions = centres[city] + SPREAD_DEG * rng.standard_normal((total, 2))
    colours = rng.integers(40, 216, (num_cities, 2, 2, 3))
    tables = {}
    for view in ("references", "queries"):
        ids = np.arange(total)
        columns: dict[str, Any] = {
            "id": ids,
            "place_id": ids,
            "lat": positions[:, 0],
            "lon": positions[:, 1],
            "region": pa.array(city % 16).cast(pa.string()),
            "split": ["train"] * num_places + ["test"] * TESTED,
        }
        columns |= _write_images(folder, view, colours[city], rng)
        tables[view] = pa.table(columns)
    return write_dataset(
        str(folder), tables["references"], tables["queries"], name=f"scale-{num_places}"
    ).uri


def _write_images(
    folder: Path, view: str, coarse: NDArray[np.int64], rng: np.random.Generator
) -> dict[str, Any]:
    """Write JPEG tiles of coarse[N, 2, 2, 3] with noise into a few files; return their places."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    count = len(coarse)
    offsets = np.zeros(count, np.int64)
    lengths = np.zeros(count, np.int64)
    names = []
    for start in range(0, count, IMAGES_PER_FILE):
        name = f"images/{view}-{start // IMAGES_PER_FILE:04d}.bin"
        own = coarse[start : start + IMAGES_PER_FILE]
        noise = rng.integers(-40, 41, (len(own), 4, 4, 3))
        small = np.clip(own.repeat(2, 1).repeat(2, 2) + noise, 0, 255).astype(np.uint8)
        tiles = small.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
        at = 0
        with (folder / name).open("wb") as file:
            for row, image in enumerate(tiles, start=start):
                data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90)
                offsets[row] = at
                lengths[row] = len(data)
                at += file.write(data)
        names.extend([name] * len(own))
    return {"uri": names, "offset": offsets, "length": lengths}
