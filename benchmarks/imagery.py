"""Compare cutting tiles with bare window reads: processor time of reading and JPEG encoding.

    python -m benchmarks.imagery

The imagery is Landsat of Great Salt Lake (package localtileserver), enlarged to SIDE pixels. The
bare reader takes windows of the raster as they are, one a tile: no projection, no grid, no file is
written.
"""

from __future__ import annotations

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
from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets.imagery.convert import ImageryReader
from s4g_ray.datasets.imagery.cutting.cell_blocks import divide_cells
from s4g_ray.datasets.imagery.cutting.region import CutOptions
from s4g_ray.datasets.imagery.cutting.tile_shards import SUBSAMPLING, CutPlan, cut_block
from s4g_ray.datasets.imagery.imagery import find_cells
from s4g_ray.datasets.imagery.rasters.raster import close_files
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.tile_reader import Tile, read_tiles
from s4g_ray.datasets.imagery.world_grid import WorldGrid, split_blocks
from s4g_ray.storage import files

LANDSAT = "package://localtileserver/tiler/data/landsat.tif"
SIDE = 4096
PIXELS = (384, 64)
OPTIONS = CutOptions()
ROUNDS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tiled, deflate": {"tiled": True, "compress": "deflate", "interleave": "pixel"},
    "tiled": {"tiled": True, "interleave": "pixel"},
    "tiled, bands apart": {"tiled": True, "interleave": "band"},
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
    image = np.ascontiguousarray(pixels)
    return len(simplejpeg.encode_jpeg(image, OPTIONS.quality, "RGB", SUBSAMPLING))


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


def cut_shards(path: str, pixels: int) -> int:
    """Cut the same tiles as the command does: into tar shards, which are read back to verify."""
    imagery = open_imagery(path)
    grid = WorldGrid(pixels * imagery.native_resolution_m)
    reader = ImageryReader(imagery, Stretch(), pixels, {grid.size_m: grid})
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        plan = CutPlan(reader, folder, "", OPTIONS.split, OPTIONS.quality, max_nodata=0.999)
        for block in divide_cells(find_cells(imagery, grid), grid, pixels):
            shard = cut_block(plan, block).shard
            count += shard.rows if shard else 0
    return count


def measure(cut: Callable[[str, int], int], path: str, pixels: int) -> float:
    """Return the milliseconds of processor time a tile."""
    started = time.process_time()
    count = cut(path, pixels)
    return (time.process_time() - started) * 1000 / count


def measure_layout(path: str, pixels: int) -> list[float | str]:
    """Measure all ways in turn, ROUNDS times; return the medians, and those of the shares."""
    ways = (cut_bare, cut_tiles, cut_shards)
    for cut in ways:
        cut(path, pixels)  # compiles, and fills the system's cache
    rounds = np.array([[measure(cut, path, pixels) for cut in ways] for _ in range(ROUNDS)])
    times = np.median(rounds, axis=0)
    shares = np.median(rounds[:, :1] / rounds[:, 1:], axis=0)
    return [*(round(float(time), 3) for time in times), *(f"{share:.0%}" for share in shares)]


def main() -> None:
    """Measure each layout and size of tiles, and record the medians."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layout, options in LAYOUTS.items():
            path = str(Path(folder) / "large.tif")
            write_large(path, **options)
            for pixels in PIXELS:
                rows.append([layout, pixels, *measure_layout(path, pixels)])
                print(rows[-1], flush=True)
            close_files()
            Path(path).unlink()
    record(
        "imagery",
        title="Cutting tiles",
        text="processor time of a tile: bare windows of the raster, read and encoded as JPEG,"
        " against tiles of equal ground size on the world grid, each resampled once; the last two"
        " columns of times are without and with writing and verifying the tar shards.",
        command="python -m benchmarks.imagery",
        columns=[
            "GeoTIFF",
            "tile, pixels",
            "bare, ms",
            "tiles, ms",
            "tiles in shards, ms",
            "share of bare speed",
            "in shards",
        ],
        rows=rows,
        config={
            "side": SIDE,
            "quality": OPTIONS.quality,
            "subsampling": SUBSAMPLING,
            "rounds": ROUNDS,
            "crs": "EPSG:4326",
        },
        order=145,
    )


if __name__ == "__main__":
    main()
