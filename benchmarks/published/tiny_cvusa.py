"""Write a tiny folder in the layout of CVUSA, and read it as published, line by line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.published.geography import nearest
from benchmarks.published.loading import load_batch
from s4g_ray.arrays import Ints
from s4g_ray.config.data_schema import Size

PANORAMA: Size = (32, 128)  # height, width
SATELLITE: Size = (64, 64)
# images are stored in so many times these sizes. By an odd factor both forms resize to the same
# pixels; by others they round halves differently, to one level
STORED = 3
LatLon = NDArray[np.float64]


def draw_positions(count: int, seed: int = 0) -> tuple[LatLon, LatLon]:
    """Draw latitudes and longitudes of places in towns of the width of some kilometres."""
    rng = np.random.default_rng(seed)
    towns = rng.uniform((30.0, -100.0), (45.0, -80.0), (max(1, count // 200), 2))
    points = towns[rng.integers(len(towns), size=count)] + rng.normal(0, 0.03, (count, 2))
    return points[:, 0], points[:, 1]


def write_tree(folder: Path, num_train: int, num_test: int) -> None:
    """Write a folder in CVUSA's layout. Both views of a place show the same four colours."""
    rng = np.random.default_rng(1)
    for name in ("splits", "split_locations", "bingmap/19", "streetview/panos"):
        (folder / name).mkdir(parents=True)
    lat, lon = draw_positions(num_train + num_test)
    positions = [
        f"{y!r},{x!r},{y!r},{x!r},0" for y, x in zip(lat.tolist(), lon.tolist(), strict=True)
    ]
    (folder / "split_locations/all.csv").write_text("\n".join(positions) + "\n")
    numbers = rng.permutation(num_train + num_test) + 1
    for name, chosen in (("train", numbers[:num_train]), ("val", numbers[num_train:])):
        lines = []
        for number in chosen.tolist():
            satellite = f"bingmap/19/{number:07d}.jpg"
            panorama = f"streetview/panos/{number:07d}.jpg"
            lines.append(f"{satellite},{panorama},streetview/annotations/{number:07d}.png")
            colours = rng.integers(0, 256, (2, 2, 3))
            _write_image(folder / satellite, colours, SATELLITE, rng)
            in_a_row = colours.reshape(1, 4, 3)
            _write_image(folder / panorama, in_a_row, PANORAMA, rng)
        (folder / f"splits/{name}-19zl.csv").write_text("\n".join(lines) + "\n")


def _write_image(path: Path, colours: Ints, size: Size, rng: np.random.Generator) -> None:
    height, width = (STORED * side for side in size)
    tall = np.repeat(colours, height // len(colours), axis=0)
    pixels = np.repeat(tall, width // colours.shape[1], axis=1)
    noisy = (pixels + rng.normal(0, 40, pixels.shape)).clip(0, 255)
    Image.fromarray(noisy.astype(np.uint8)).save(path, quality=95)


class PublishedData:
    """The pairs of a folder in CVUSA's layout, read line by line."""

    def __init__(self, folder: Path, split: str, mean: Tensor, std: Tensor) -> None:
        self._folder = folder
        self._mean = mean.flatten().numpy()
        self._std = std.flatten().numpy()
        self.files: dict[int, tuple[str, str]] = {}  # panorama, satellite image
        with (folder / f"splits/{split}-19zl.csv").open() as stream:
            for satellite, panorama, _ in csv.reader(stream):
                self.files[int(Path(satellite).stem)] = (panorama, satellite)
        with (folder / "split_locations/all.csv").open() as stream:
            rows = list(csv.reader(stream))
        self.latlon = {
            number: (float(rows[number - 1][0]), float(rows[number - 1][1]))
            for number in self.files
        }

    def load(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Load the panoramas and satellite images of places, normalised."""
        panoramas = [f"{self._folder}/{self.files[number][0]}" for number in numbers]
        satellites = [f"{self._folder}/{self.files[number][1]}" for number in numbers]
        queries = load_batch(panoramas, PANORAMA, self._normalise)
        return queries, load_batch(satellites, SATELLITE, self._normalise)

    def _normalise(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = (image.astype(np.float32) - self._mean) / self._std
        return np.asarray(pixels, dtype=np.float32)

    def find_neighbors(self, k: int) -> dict[int, list[int]]:
        """Find the nearest places on the ground."""
        numbers = list(self.latlon)
        lat, lon = np.array(list(self.latlon.values())).T
        rows = nearest(lat, lon, k).tolist()
        return {numbers[i]: [numbers[j] for j in row] for i, row in enumerate(rows)}
