"""A gallery in memory over one smooth random picture of the ground, cut into overlapping tiles.

Has what locating photos uses of gallery.Gallery, computed by plain numpy: an oracle, too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from s4g_ray.config.data_schema import DataConfig
from s4g_ray.data.area import Area
from s4g_ray.data.images import crop_field_of_view, fit_query
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.gallery.store.tiles import Tiles
from tests.conftest import tiny_config

PIXELS = 32  # of a tile's side
SIZE_M = 64.0
ROWS, COLUMNS = 6, 8  # of tiles, half a tile apart
ORIGIN_LAT, ORIGIN_LON = 47.0, 8.0
METRES_PER_DEGREE = 111_195.08


def make_ground(
    pixels: int = PIXELS, *, is_detailed: bool = False, seed: int = 5
) -> NDArray[np.uint8]:
    """A smooth picture [H, W, 3] of the ground, north up, `pixels` for SIZE_M.

    is_detailed: with small features over it.
    """
    size = ((COLUMNS + 1) * pixels // 2, (ROWS + 1) * pixels // 2)
    smooth = _random_picture(3, size, seed)
    if not is_detailed:
        return smooth
    return np.asarray(0.75 * smooth + 0.25 * _random_picture(24, size, seed), np.uint8)


def _random_picture(detail: int, size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (detail * ROWS, detail * COLUMNS, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def position_of(x: float, y: float, pixels: int = PIXELS) -> tuple[float, float]:
    """lat, lon of a pixel of the ground."""
    metres = SIZE_M / pixels
    lat = ORIGIN_LAT - y * metres / METRES_PER_DEGREE
    lon = ORIGIN_LON + x * metres / METRES_PER_DEGREE / np.cos(np.radians(ORIGIN_LAT))
    return lat, lon


@functools.cache
def encoder_of(query_size: tuple[int, int]) -> Encoder:
    torch.set_num_threads(1)
    return Encoder.build(tiny_config("-", "-").model, seed=1).eval()


class TinyGallery:
    """ROWS x COLUMNS tiles of a ground; ids are 100 + row * COLUMNS + column."""

    def __init__(
        self,
        folder: Path,
        *,
        query_size: tuple[int, int] = (PIXELS, PIXELS),
        pixels: int = PIXELS,
        is_detailed: bool = False,
    ) -> None:
        self.uri = str(folder)
        self.version = 1
        self.has_calibration = False
        self.info = {"model": {"weights_sha256": "a" * 64}}
        self._data = DataConfig(uri="-", query_size=query_size, reference_size=(PIXELS, PIXELS))
        self.config = SimpleNamespace(data=self._data)
        self.ground = make_ground(pixels, is_detailed=is_detailed)
        self.num_encoded = 0
        self.batch_sizes: list[int] = []
        half = pixels // 2
        places = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
        self.images = [
            self.ground[row * half : row * half + pixels, column * half : column * half + pixels]
            for row, column in places
        ]
        centres = [position_of((c + 1) * half, (r + 1) * half, pixels) for r, c in places]
        lat, lon = np.array(centres).T
        ids = 100 + np.arange(len(places))
        size_m = np.full(len(ids), SIZE_M)
        self.tiles = Tiles(ids, lat, lon, size_m)
        self.num_tiles = len(ids)
        self._vectors = self.encode(self.images)
        self.dim = self._vectors.shape[1]
        self.num_encoded = 0

    @property
    def snapshot(self) -> Any:
        """What a version holds: it has the tiles, and is its own index."""
        header = SimpleNamespace(model=self.info["model"])
        return SimpleNamespace(header=header, tiles=self.tiles, index=self)

    def __len__(self) -> int:
        return self.num_tiles

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def encoder(self) -> Any:
        """What embeds inputs of the encoder's size, in any thread: the gallery itself."""
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode(self, images: list[NDArray[np.uint8]], view: str = "queries") -> NDArray[np.float32]:
        fitted = []
        rng = np.random.default_rng(0)
        for image in images:
            pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
            fitted.append(crop_field_of_view(fit_query(pixels, self._data, 0.0), self._data, rng))
        return self.embed(torch.stack(fitted).permute(0, 2, 3, 1).numpy())

    def embed(self, inputs: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.num_encoded += len(inputs)
        self.batch_sizes.append(len(inputs))
        images = torch.from_numpy(inputs).permute(0, 3, 1, 2)
        with torch.inference_mode():
            vectors = encoder_of(self._data.query_size).embed(images, "queries")
            return torch.nn.functional.normalize(vectors, dim=1).numpy()

    def search(
        self, queries: NDArray[np.float32], k: int, *, area: Area | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        scores = queries @ self._vectors.T
        if area is not None:
            scores[:, ~area.contains(self.tiles.lat, self.tiles.lon)] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(scores, best, axis=1)
        return np.where(np.isneginf(found), -1, self.tiles.ids[best]), found

    def read_tile(self, tile_id: int) -> NDArray[np.uint8]:
        return self.images[tile_id - 100]
