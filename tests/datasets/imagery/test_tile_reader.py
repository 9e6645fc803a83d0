"""Tiles against rasterio.warp, which maps every pixel by itself."""

from __future__ import annotations

import importlib.util
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.warp import reproject

from s4g_ray.data.area import Area
from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets.imagery import tile_reader
from s4g_ray.datasets.imagery.imagery import choose_stretch, find_cells
from s4g_ray.datasets.imagery.rasters.raster import close_files
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.tile_reader import Dropped, Tile, read_tiles
from s4g_ray.datasets.imagery.world_grid import GridCells, WorldGrid
from s4g_ray.errors import InputError
from tests.support.rasters import smooth_picture, write_raster

PIXELS = 64


def cells_at(size_m: float, *points: tuple[float, float]) -> GridCells:
    lat, lon = np.array(points, np.float64).T
    return GridCells(np.arange(len(lat)), lat, lon, size_m)


@lru_cache(1)
def read_values(path: str, bands: tuple[int, ...]) -> NDArray[np.float64]:
    with rasterio.open(path) as source:
        return np.asarray(source.read(list(bands)), np.float64)


def warp(path: str, cells: GridCells, number: int, bands: list[int]) -> NDArray[np.float64]:
    """Cut a tile by rasterio.warp in the local azimuthal equidistant system."""
    side = cells.size_m
    lat, lon = float(cells.lat[number]), float(cells.lon[number])
    crs = f"+proj=aeqd +lat_0={lat!r} +lon_0={lon!r} +ellps=WGS84"
    with rasterio.open(path) as source:
        out = np.full((len(bands), PIXELS, PIXELS), np.nan)
        reproject(
            read_values(path, tuple(bands)),
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


PACKAGE = importlib.util.find_spec("localtileserver")
PACKAGED = {  # file -> bands and size of a tile in metres
    "landsat.tif": ([3, 2, 1], 3_000.0),
    "landsat7.tif": ([1, 2, 3], 2_500.0),
    "bahamas_rgb.tif": ([1, 2, 3], 25_000.0),
    "srtm90.tif": ([1], 9_000.0),
}


@pytest.mark.skipif(PACKAGE is None, reason="localtileserver is not installed")
@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_files_agree_with_an_independent_warp(name: str) -> None:
    bands, side = PACKAGED[name]
    uri = f"package://localtileserver/tiler/data/{name}"
    imagery = open_imagery(uri, bands=bands)
    path = imagery.sources[0].uri
    cells = find_cells(imagery, WorldGrid(side))
    cells = cells.take(np.linspace(0, len(cells) - 1, 16).astype(int))
    stretch = Stretch((0.0,), (2550.0,)) if name == "srtm90.tif" else Stretch()
    checked = 0
    for number, tile in enumerate(read_tiles(imagery, cells, pixels=PIXELS, stretch=stretch)):
        if not isinstance(tile, Tile) or tile.nodata_share > 0:
            continue
        oracle = warp(path, cells, number, bands)
        if name == "srtm90.tif":
            oracle = np.clip(oracle / 10, 0, 255)
        if np.nanstd(oracle) < 5:
            continue
        x, y, scale = offset_of(tile.pixels, oracle)
        assert max(abs(x), abs(y), abs(scale)) < 0.5
        checked += 1
    assert checked >= 4


def test_a_raster_of_the_whole_earth_has_no_seam_at_the_antimeridian(tmp_path: Path) -> None:
    # a function of longitude that closes around the Earth
    lon = (np.arange(720) + 0.5) / 2 - 180
    rows = np.linspace(60, 200, 360)
    picture = 128 + 100 * np.cos(np.radians(8 * lon))[None] * np.sin(rows / 9)[:, None]
    values = np.repeat(picture[None], 3, axis=0).astype(np.uint8)
    west_half = np.roll(values, 360, axis=2)  # the same ground, cut at Greenwich
    step = 0.5
    one = open_imagery(
        write_raster(tmp_path / "a.tif", values, "EPSG:4326", from_origin(-180, 90, step, step))
    )
    other = open_imagery(
        write_raster(tmp_path / "b.tif", west_half, "EPSG:4326", from_origin(0, 90, step, step))
    )
    assert list(one.extent) == [-180, -90, 180, 90]
    cells = cells_at(1_500_000.0, (10, 179.9), (-40, -179.5), (0, 0.2), (55, 180.0))
    pairs = zip(
        read_tiles(one, cells, pixels=PIXELS, stretch=Stretch()),
        read_tiles(other, cells, pixels=PIXELS, stretch=Stretch()),
        strict=True,
    )
    for tile, same in pairs:
        assert isinstance(tile, Tile)
        assert isinstance(same, Tile)
        assert tile.nodata_share == same.nodata_share == 0
        # at the seam the outermost half pixel repeats its value
        assert np.abs(tile.pixels.astype(int) - same.pixels).max() <= 5


def test_a_coarse_tile_is_an_average_with_and_without_overviews(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 1024, 1024), dtype=np.uint8)
    transform = from_origin(500_000, 5_000_000, 1, 1)
    path = write_raster(tmp_path / "a.tif", noise, "EPSG:32633", transform, tiled=True)
    cells = cells_of(path, 640.0)
    (plain,) = read_tiles(open_imagery(path), cells, pixels=40, stretch=Stretch())
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2, 4, 8, 16], Resampling.average)
    close_files()
    (reduced,) = read_tiles(open_imagery(path), cells, pixels=40, stretch=Stretch())
    for tile in (plain, reduced):
        assert isinstance(tile, Tile)
        # noise of a deviation of 74 becomes that of a mean of 16 * 16 values, or of a little fewer
        assert tile.pixels.std() < 74 / 10
        assert abs(tile.pixels.mean() - 127.5) < 1
    assert isinstance(plain, Tile)
    assert isinstance(reduced, Tile)
    assert np.abs(plain.pixels.astype(int) - reduced.pixels).mean() < 3


def cells_of(path: str, side: float) -> GridCells:
    """Return a cell at the centre of a raster."""
    place = open_imagery(path).sources[0].georeference
    lat, lon = place.to_degrees([place.width / 2], [place.height / 2])
    return cells_at(side, (float(lat[0]), float(lon[0])))


def test_windows_are_bounded_and_give_the_same_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_raster(
        tmp_path / "a.tif",
        smooth_picture(600, 600),
        "EPSG:32633",
        from_origin(500_000, 5_000_000, 1, 1),
    )
    imagery = open_imagery(path)
    cells = find_cells(imagery, WorldGrid(50))
    whole = list(read_tiles(imagery, cells, pixels=50, stretch=Stretch()))
    sizes = []
    read = type(imagery.sources[0]).read

    def counted(self: object, *window: int) -> object:
        sizes.append(window[2] * window[3] * 8)
        return read(self, *window)  # type: ignore[arg-type]

    monkeypatch.setattr(type(imagery.sources[0]), "read", counted)
    monkeypatch.setattr(tile_reader, "MAX_WINDOW_BYTES", 200_000)
    parts = list(read_tiles(imagery, cells, pixels=50, stretch=Stretch()))
    assert len(sizes) > 10
    assert max(sizes) <= 200_000
    for one, other in zip(whole, parts, strict=True):
        assert one.id == other.id
        if isinstance(one, Tile) and isinstance(other, Tile):
            assert np.array_equal(one.pixels, other.pixels)


def test_a_tile_does_not_depend_on_the_others_read_with_it(tmp_path: Path) -> None:
    path = write_raster(
        tmp_path / "a.tif",
        smooth_picture(500, 500),
        "EPSG:3857",
        from_origin(1_000_000, 5_000_000, 1, 1),
    )
    imagery = open_imagery(path)
    cells = find_cells(imagery, WorldGrid(60))
    together = list(read_tiles(imagery, cells, pixels=20, stretch=Stretch()))
    for row in range(0, len(cells), 5):
        (alone,) = read_tiles(
            imagery, cells.take(slice(row, row + 1)), pixels=20, stretch=Stretch()
        )
        other = together[row]
        assert isinstance(alone, Tile) == isinstance(other, Tile)
        if isinstance(alone, Tile) and isinstance(other, Tile):
            difference = np.abs(alone.pixels.astype(int) - other.pixels)
            assert difference.max() <= 1


def test_a_cell_outside_is_dropped_with_the_reason(tmp_path: Path) -> None:
    path = write_raster(
        tmp_path / "a.tif", smooth_picture(50, 50), "EPSG:4326", from_origin(10, 50, 0.001, 0.001)
    )
    imagery = pickle.loads(pickle.dumps(open_imagery(path)))
    cells = cells_at(1000.0, (49.975, 10.025), (49.975, 11.0), (-49.975, 10.025))
    first, *others = read_tiles(imagery, cells, pixels=16, stretch=choose_stretch(imagery))
    assert isinstance(first, Tile)
    assert others == [Dropped(1, "no imagery"), Dropped(2, "no imagery")]


def test_an_area_without_imagery_is_refused_with_both_extents(tmp_path: Path) -> None:
    path = write_raster(
        tmp_path / "a.tif", smooth_picture(50, 50), "EPSG:4326", from_origin(10, 50, 0.001, 0.001)
    )
    imagery = open_imagery(path)
    with pytest.raises(InputError, match=r"10, 49\.95, 10\.05, 50\b.*20, 40, 21, 41"):
        find_cells(imagery, WorldGrid(100), bounds=(20, 40, 21, 41))
    with pytest.raises(InputError, match="smaller cells"):
        find_cells(imagery, WorldGrid(100), Area.circle(49.97, 10.02, 1))
    inside = find_cells(imagery, WorldGrid(100), Area.circle(49.97, 10.02, 500))
    assert len(inside) == pytest.approx(np.pi * 25, rel=0.15)
    assert set(inside.ids) < set(find_cells(imagery, WorldGrid(100)).ids)
