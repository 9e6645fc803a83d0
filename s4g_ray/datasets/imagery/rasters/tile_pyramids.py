"""Read pyramids of web mercator tiles as rasters: the pixels of the last zoom, others coarser."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from s4g_ray.data.images import FORMATS, MAX_PIXELS
from s4g_ray.datasets.imagery.rasters.georeference import Georeference
from s4g_ray.datasets.imagery.rasters.raster import ALL_VALID, Piece
from s4g_ray.datasets.imagery.rasters.tile_stores import TileStore, open_store
from s4g_ray.errors import InputError

MERCATOR = "EPSG:3857"
HALF_TURN_M = 20_037_508.342789244  # of the equator of web mercator
_open_stores = threading.local()


@dataclass(frozen=True)
class Pyramid:
    """Tiles of several zooms as one raster. Small and picklable."""

    uri: str
    georeference: Georeference  # of the pixels of the last zoom
    zooms: tuple[int, ...]
    side: int  # pixels of a tile
    left: int  # column of the raster's first tile in the last zoom
    top: int
    bands: tuple[int, ...]  # from 1
    nodata: float | None
    dtype: str = "uint8"
    highest: int = 255
    has_other_bands: ClassVar[bool] = False

    def choose_factor(self, scale: float) -> int:
        """Return how many pixels of the last zoom a pixel of the best zoom for a tile spans.

        That is the coarsest zoom that is not coarser than the tile. scale: pixels of the last zoom
        in a tile's pixel.
        """
        fitting = [1 << (self.zooms[-1] - zoom) for zoom in self.zooms]
        return max(f for f in fitting if f == 1 or (f <= scale * 1.05 and f <= self.side))

    def read(self, column: int, row: int, width: int, height: int, factor: int) -> Piece:
        """Read a window from the zoom of a factor, whose multiples column and row are.

        Raises InputError for a tile that cannot be decoded or has another size.
        """
        zoom = self.zooms[-1] - factor.bit_length() + 1
        store = _store_of(self.uri)
        first = np.array([self.top * self.side + row, self.left * self.side + column]) // factor
        shape = (-(-height // factor), -(-width // factor))
        values = np.zeros((*shape, len(self.bands)), np.uint8)
        valid = np.zeros(shape, np.uint8)
        last = (first + shape - 1) // self.side
        for tile_row in range(first[0] // self.side, last[0] + 1):
            for tile_column in range(first[1] // self.side, last[1] + 1):
                data = store.read(zoom, int(tile_column) % 2**zoom, int(tile_row))
                if data is None:
                    continue
                name = f"{self.uri}: tile {zoom}/{tile_column}/{tile_row}"
                tile, mask = decode_tile(data, name, self.side)
                corner = np.array([tile_row, tile_column]) * self.side
                low = np.maximum(corner, first)
                high = np.minimum(corner + self.side, first + shape)
                there = tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))
                here = tuple(slice(a, b) for a, b in zip(low - corner, high - corner, strict=True))
                values[there] = tile[here][..., [band - 1 for band in self.bands]]
                valid[there] = mask[here]
        if self.nodata is not None:
            valid &= (values != self.nodata).any(axis=2)
        return Piece(values, ALL_VALID if valid.all() else valid)

    def list_files(self) -> list[str]:
        """Return the file or folder that holds the tiles."""
        return [self.uri]

    def describe(self) -> dict[str, Any]:
        """Return what is known of the pyramid, for people and JSON."""
        return {
            "uri": self.uri,
            "width": self.georeference.width,
            "height": self.georeference.height,
            "crs": "WGS 84 / Pseudo-Mercator",
            "resolution_m": self.georeference.resolution_m,
            "bands": list(self.bands),
            "dtype": self.dtype,
            "nodata": [self.nodata],
            "zooms": list(self.zooms),
        }


def open_pyramid(
    uri: str, *, bands: Sequence[int] | None = None, nodata: float | None = None
) -> Pyramid:
    """Return the pyramid of a file or folder, after reading which tiles it has.

    bands and nodata are as in open_raster. Raises InputError for vector tiles, an empty pyramid,
    and bands other than 1 to 3.
    """
    chosen = tuple(bands or (1, 2, 3))
    if not set(chosen) <= {1, 2, 3} or len(chosen) not in (1, 3):
        raise InputError(f"{uri} has bands 1 to 3; {list(chosen)} must be one or three of them")
    store = _store_of(uri)
    zooms, left, top, right, bottom = store.coverage()
    side = _find_side(uri, store, zooms[-1])
    step = 2 * HALF_TURN_M / side / 2 ** zooms[-1]
    georeference = Georeference(
        MERCATOR,
        (
            *(step, 0.0, left * side * step - HALF_TURN_M),
            *(0.0, -step, HALF_TURN_M - top * side * step),
        ),
        (right - left + 1) * side,
        (bottom - top + 1) * side,
    )
    return Pyramid(uri, georeference, zooms, side, left, top, chosen, nodata)


def _find_side(uri: str, store: TileStore, zoom: int) -> int:
    """Return the pixels of a tile's side, from a tile that is there."""
    place = store.find_tile(zoom)
    data = store.read(zoom, *place) if place else None
    if place is None or data is None:
        raise InputError(f"{uri} holds no tile of zoom {zoom}")
    return len(decode_tile(data, f"{uri}: tile {zoom}/{place[0]}/{place[1]}")[0])


def decode_tile(data: bytes, name: str, side: int | None = None) -> tuple[Any, Any]:
    """Return pixels[S, S, 3] of a tile, and 1 where it is opaque [S, S]. Raises InputError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{name} has {image.width} x {image.height} pixels, too many")
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be decoded: {error}; is it a raster tile?") from error
    if pixels.shape[0] != pixels.shape[1] or side not in (None, len(pixels)):
        raise InputError(
            f"{name} has {pixels.shape[1]} x {pixels.shape[0]} pixels, others {side or 'a square'}"
        )
    opaque = pixels[..., 3] >= 128 if has_alpha else np.ones(pixels.shape[:2], bool)
    return pixels[..., :3], opaque.astype(np.uint8)


def _store_of(uri: str) -> TileStore:
    """Return the store of a pyramid, opened once in each thread."""
    if getattr(_open_stores, "pid", None) != os.getpid():
        _open_stores.pid = os.getpid()
        _open_stores.found = {}
    found: dict[str, TileStore] = _open_stores.found
    if uri not in found:
        found[uri] = open_store(uri)
    return found[uri]
