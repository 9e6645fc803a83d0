"""Compare cutting tiles with bare window reads: processor time of reading and JPEG encoding.

    python -m benchmarks.imagery

The imagery is Landsat of Great Salt Lake (package localtileserver), enlarged to SIDE pixels. The
bare reader takes windows of the raster as they are, one a tile: no projection, no grid.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import simplejpeg
from PIL import Image
from rasterio.transform import from_origin
from rasterio.windows import Window

from benchmarks.support.record import record
from s4g_ray.datasets.imagery.imagery import find_cells
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.stretch import Stretch
from s4g_ray.datasets.imagery.tile_reader import Tile, read_tiles
from s4g_ray.datasets.imagery.world_grid import WorldGrid, split_blocks
from s4g_ray.storage import files

LANDSAT = "package://localtileserver/tiler/data/landsat.tif"
SIDE = 8192
PIXELS = (384, 64)
QUALITY = 90
ROUNDS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tiled, deflate": {"tiled": True, "compress": "deflate", "interleave": "pixel"},
    "tiled": {"tiled": True, "interleave": "pixel"},
    "not tiled": {"interleave": "pixel"},
}


def write_large(path: str, **options: Any) -> None:
    """Write Landsat, true colour, enlarged to SIDE * SIDE pixels."""
    with rasterio.open(files.resolve_package(LANDSAT)) as source:
        pixels = np.moveaxis(source.read([3, 2, 1]), 0, 2)
        west, south, east, north = source.bounds
        crs = source.crs
    large = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    place = from_origin(west, north, (east - west) / SIDE, (north - south) / SIDE)
    profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile, crs=crs, transform=place, **options) as target:
        target.write(np.moveaxis(large, 2, 0))


def encode(pixels: np.ndarray[Any, Any]) -> int:
    """Encode a tile and return its bytes."""
    return len(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB"))


def cut_bare(path: str, pixels: int) -> int:
    """Read a window for each tile and encode it; return the number of tiles."""
    count = 0
    with rasterio.Env(GDAL_CACHEMAX=64), rasterio.open(path) as source:
        for row in range(0, SIDE - pixels + 1, pixels):
            for column in range(0, SIDE - pixels + 1, pixels):
                window = source.read(window=Window(column, row, pixels, pixels))
                encode(np.moveaxis(window, 0, 2))
                count += 1
    return count


def cut_tiles(path: str, pixels: int) -> int:
    """Read tiles of as much ground as the bare ones, on the world grid, and encode them."""
    imagery = open_imagery(path)
    grid = WorldGrid(pixels * imagery.native_resolution_m)
    count = 0
    for block in split_blocks(grid, find_cells(imagery, grid)):
        for tile in read_tiles(imagery, block, pixels=pixels, stretch=Stretch()):
            if isinstance(tile, Tile):
                encode(tile.pixels)
                count += 1
    return count


def measure(cut: Callable[[str, int], int], path: str, pixels: int) -> float:
    """Return the milliseconds of processor time a tile."""
    started = time.process_time()
    count = cut(path, pixels)
    return (time.process_time() - started) * 1000 / count


def main() -> None:
    """Measure both ways in turn, ROUNDS times, and record the medians."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layout, options in LAYOUTS.items():
            path = str(Path(folder) / "large.tif")
            write_large(path, **options)
            for pixels in PIXELS:
                cut_tiles(path, pixels)  # compiles, and fills the system's cache
                times = [
                    (measure(cut_bare, path, pixels), measure(cut_tiles, path, pixels))
                    for _ in range(ROUNDS)
                ]
                bare, tiles = (statistics.median(column) for column in zip(*times, strict=True))
                share = f"{bare / tiles:.0%}"
                rows.append([layout, pixels, round(bare, 3), round(tiles, 3), share])
                print(rows[-1], flush=True)
            Path(path).unlink()
    record(
        "imagery",
        title="Cutting tiles",
        text="processor time of a tile, read and encoded as JPEG: bare windows of the raster,"
        " against tiles of equal ground size on the world grid, each resampled once.",
        command="python -m benchmarks.imagery",
        columns=["GeoTIFF", "tile, pixels", "bare, ms", "tiles, ms", "share of bare speed"],
        rows=rows,
        config={"side": SIDE, "quality": QUALITY, "rounds": ROUNDS, "crs": "EPSG:4326"},
        order=145,
    )


if __name__ == "__main__":
    main()
