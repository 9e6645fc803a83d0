"""Tiles against rasterio.warp, which maps every pixel by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.warp import reproject

from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.stretch import Stretch
from s4g_ray.datasets.imagery.tile_reader import Tile, read_tiles
from s4g_ray.datasets.imagery.world_grid import GridCells
from tests.support.rasters import smooth_picture, write_raster

PIXELS = 64


def cells_at(size_m: float, *points: tuple[float, float]) -> GridCells:
    lat, lon = np.array(points, np.float64).T
    return GridCells(np.arange(len(lat)), lat, lon, size_m)


def warp(path: str, cells: GridCells, number: int, bands: list[int]) -> NDArray[np.float64]:
    """Cut a tile by rasterio.warp in the local azimuthal equidistant system."""
    side = cells.size_m
    lat, lon = float(cells.lat[number]), float(cells.lon[number])
    crs = f"+proj=aeqd +lat_0={lat!r} +lon_0={lon!r} +ellps=WGS84"
    with rasterio.open(path) as source:
        out = np.full((len(bands), PIXELS, PIXELS), np.nan)
        reproject(
            source.read(bands).astype(np.float64),
            out,
            src_transform=source.transform,
            src_crs=source.crs,
            dst_transform=from_origin(-side / 2, side / 2, side / PIXELS, side / PIXELS),
            dst_crs=crs,
            src_nodata=np.nan,
            dst_nodata=np.nan,
            resampling=Resampling.bilinear,
            tolerance=0.0,
        )
    return out


def offset_of(tile: NDArray[np.uint8], oracle: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return by how many pixels (x, y) and by what scale a tile differs from the oracle's.

    By least squares over the gradient of the oracle: a shift and a scale about the centre.
    """
    found = tile.astype(np.float64).mean(axis=2)
    wanted = oracle.mean(axis=0)
    down, across = np.gradient(wanted)
    axis = np.arange(PIXELS) - (PIXELS - 1) / 2
    columns = [across, down, across * axis + down * axis[:, None]]
    inside = np.isfinite(across) & np.isfinite(down)
    design = np.stack([column[inside] for column in columns], axis=1)
    x, y, scale = np.linalg.lstsq(design, (found - wanted)[inside], rcond=None)[0]
    return float(x), float(y), float(scale * PIXELS / 2)


CASES = {
    "longlat": ("EPSG:4326", 14.3, 40.8, 2e-4),
    "mercator": ("EPSG:3857", -13_620_000.0, 4_550_000.0, 20.0),
    "utm": ("EPSG:32618", 220_000.0, 2_700_000.0, 20.0),
    "utm far from its meridian": ("EPSG:32618", -420_000.0, 7_200_000.0, 20.0),
    "lambert": ("EPSG:2154", 700_000.0, 6_600_000.0, 20.0),
    "polar": ("EPSG:3413", 100_000.0, -90_000.0, 20.0),
    "pole": ("EPSG:3413", -3_000.0, 3_000.0, 20.0),
    "antarctic": ("EPSG:3031", 1_200_000.0, 500_000.0, 20.0),
    "antimeridian": ("EPSG:3832", 3_330_000.0, -1_800_000.0, 20.0),
    "turned degrees": ("EPSG:4326", 179.97, -16.5, 2e-4),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.3, 0.6])  # of the raster's width: at and above its resolution
def test_centre_and_scale_are_those_of_an_independent_warp(
    tmp_path: Path, name: str, share: float
) -> None:
    crs, west, north, step = CASES[name]
    path = write_raster(
        tmp_path / "a.tif", smooth_picture(300, 300), crs, from_origin(west, north, step, step)
    )
    imagery = open_imagery(path)
    place = imagery.sources[0].georeference
    lat, lon = place.to_degrees([150.3, 160.0], [149.2, 140.0])
    side = 300 * place.resolution_m * share * 0.9
    cells = cells_at(side, *zip(lat, lon, strict=True))
    tiles = list(read_tiles(imagery, cells, pixels=PIXELS, stretch=Stretch()))
    for number, tile in enumerate(tiles):
        assert isinstance(tile, Tile)
        assert tile.nodata_share == 0
        oracle = warp(path, cells, number, [1, 2, 3])
        x, y, scale = offset_of(tile.pixels, oracle)
        assert max(abs(x), abs(y), abs(scale)) < 0.25
        difference = np.abs(tile.pixels - np.moveaxis(oracle, 0, 2))
        assert np.nanmax(difference) < 6
