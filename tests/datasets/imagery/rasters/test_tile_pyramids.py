from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pmtiles.reader import Reader
from pmtiles.tile import Compression, TileType, deserialize_header, tileid_to_zxy, zxy_to_tileid
from pmtiles.writer import Writer
from rasterio.transform import from_origin

from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets.imagery.imagery import Imagery, choose_stretch, find_cells
from s4g_ray.datasets.imagery.rasters.tile_pyramids import HALF_TURN_M, Pyramid
from s4g_ray.datasets.imagery.rasters.tile_stores import open_store
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.tile_reader import Tile, read_tiles
from s4g_ray.datasets.imagery.world_grid import WorldGrid
from s4g_ray.errors import InputError
from tests.support.rasters import smooth_picture, write_raster

ZOOM = 12
LEFT, TOP = 656, 1582  # of 2 x 2 tiles of the last zoom
Tiles = dict[tuple[int, int, int], bytes]


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_tiles() -> tuple[NDArray[np.uint8], Tiles]:
    """Return a picture [3, 512, 512] and its tiles by zoom, column and row: two zooms."""
    picture = smooth_picture(512, 512)
    pixels = np.moveaxis(picture, 0, 2)
    tiles = {}
    for row in range(2):
        for column in range(2):
            part = pixels[row * 256 : row * 256 + 256, column * 256 : column * 256 + 256]
            tiles[ZOOM, LEFT + column, TOP + row] = png(part)
    half = np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BOX))
    tiles[ZOOM - 1, LEFT // 2, TOP // 2] = png(half)
    return picture, tiles


def write_mbtiles(folder: Path, tiles: Tiles) -> str:
    path = folder / "a.mbtiles"
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE metadata (name text, value text)")
        file.execute("INSERT INTO metadata VALUES ('format', 'png')")
        file.execute(
            "CREATE TABLE tiles (zoom_level int, tile_column int, tile_row int, tile_data blob)"
        )
        for (zoom, column, row), data in tiles.items():
            file.execute(
                "INSERT INTO tiles VALUES (?,?,?,?)", (zoom, column, 2**zoom - 1 - row, data)
            )
    file.close()
    return str(path)


def write_folder(folder: Path, tiles: Tiles) -> str:
    for (zoom, column, row), data in tiles.items():
        path = folder / f"xyz/{zoom}/{column}/{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder / "xyz")


def write_pmtiles(folder: Path, tiles: Tiles, left: int = LEFT) -> str:
    from pmtiles import convert

    source = write_mbtiles(folder, tiles)
    west, north = (left / 2**ZOOM) * 360 - 180, latitude(TOP)
    east, south = ((left + 2) % 2**ZOOM / 2**ZOOM) * 360 - 180, latitude(TOP + 2)
    with sqlite3.connect(source) as file:
        for name, value in {
            "bounds": f"{west},{south},{east},{north}",
            "minzoom": str(ZOOM - 1),
            "maxzoom": str(ZOOM),
        }.items():
            file.execute("INSERT INTO metadata VALUES (?, ?)", (name, value))
    file.close()
    write_archive: Any = convert.mbtiles_to_pmtiles
    write_archive(source, str(folder / "a.pmtiles"), ZOOM)
    return str(folder / "a.pmtiles")


def write_pmtiles_across(folder: Path, tiles: Tiles) -> str:
    return write_pmtiles(folder, tiles, 2**ZOOM - 1)


def latitude(row: int) -> float:
    return float(np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * row / 2**ZOOM)))))


@pytest.mark.parametrize("write", [write_mbtiles, write_folder, write_pmtiles_across])
def test_a_pyramid_across_the_antimeridian_is_as_wide_as_its_tiles(
    tmp_path: Path, write: Callable[[Path, Tiles], str]
) -> None:
    picture, tiles = make_tiles()
    across = {
        (zoom, (column - LEFT - 1) % 2**ZOOM, row): data
        for (zoom, column, row), data in tiles.items()
        if zoom == ZOOM
    }
    imagery = open_imagery(write(tmp_path, across))
    (pyramid,) = imagery.sources
    west, _, east, _ = imagery.extent
    side = 360 / 2**ZOOM
    assert (west, east) == pytest.approx((180 - side, 180 + side))
    piece = pyramid.read(0, 0, 512, 512, 1)
    np.testing.assert_array_equal(piece.values, np.moveaxis(picture, 0, 2))
    cells = find_cells(imagery, WorldGrid(imagery.native_resolution_m * 128))
    cut = [
        tile
        for tile in read_tiles(imagery, cells, pixels=32, stretch=Stretch())
        if isinstance(tile, Tile) and tile.nodata_share == 0
    ]
    assert {np.sign(tile.lon) for tile in cut} == {-1, 1}


@pytest.mark.parametrize("write", [write_mbtiles, write_folder, write_pmtiles])
@pytest.mark.parametrize("pixels", [128, 30])  # of the last zoom, and of the one before
def test_a_pyramid_gives_the_tiles_of_the_same_geotiff(
    tmp_path: Path, write: Callable[[Path, Tiles], str], pixels: int
) -> None:
    picture, tiles = make_tiles()
    step = 2 * HALF_TURN_M / 256 / 2**ZOOM
    transform = from_origin(
        LEFT * 256 * step - HALF_TURN_M, HALF_TURN_M - TOP * 256 * step, step, step
    )
    geotiff = open_imagery(write_raster(tmp_path / "a.tif", picture, "EPSG:3857", transform))
    pyramid = open_imagery(write(tmp_path, tiles))
    assert np.allclose(pyramid.extent, geotiff.extent, atol=1e-9)
    assert pyramid.native_resolution_m == pytest.approx(geotiff.native_resolution_m)
    grid = WorldGrid(pyramid.native_resolution_m * 128)
    cells = find_cells(geotiff, grid)

    def cut(imagery: Imagery) -> list[Tile]:
        found = list(read_tiles(imagery, cells, pixels=pixels, stretch=Stretch()))
        return [tile for tile in found if isinstance(tile, Tile)]

    for tile, other in zip(cut(pyramid), cut(geotiff), strict=True):
        assert tile.id == other.id
        assert tile.nodata_share == other.nodata_share
        difference = np.abs(tile.pixels.astype(int) - other.pixels)
        assert difference.mean() < 1
        assert difference.max() <= (1 if pixels == 128 else 6)


def test_the_coarsest_zoom_that_is_fine_enough_is_read(tmp_path: Path) -> None:
    (pyramid,) = open_imagery(write_folder(tmp_path, make_tiles()[1])).sources
    assert isinstance(pyramid, Pyramid)
    assert [pyramid.choose_factor(scale) for scale in (0.5, 1.9, 2.0, 9.0)] == [1, 1, 2, 2]


def test_a_stretch_needs_windows_alone_of_a_large_pyramid_of_one_zoom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = {
        (15, x, y): png(np.full((256, 256, 3), 4 * x, np.uint8)) for x in (0, 39) for y in (0, 39)
    }
    imagery = open_imagery(write_folder(tmp_path, tiles))
    sizes = []
    read = Pyramid.read

    def note(pyramid: Pyramid, *window: int) -> Any:
        sizes.append(window[2] * window[3])
        return read(pyramid, *window)

    monkeypatch.setattr(Pyramid, "read", note)
    stretch = choose_stretch(imagery, Stretch(percentiles=(0, 100)))
    assert (stretch.low, stretch.high) == ((0,) * 3, (156,) * 3)
    assert len(sizes) == 256
    assert max(sizes) == 64 * 64


def test_tiles_that_are_missing_or_transparent_hold_no_data(tmp_path: Path) -> None:
    _, tiles = make_tiles()
    del tiles[ZOOM, LEFT, TOP]
    clear = np.zeros((256, 256, 4), np.uint8)
    tiles[ZOOM, LEFT + 1, TOP] = png(clear)
    (pyramid,) = open_imagery(write_folder(tmp_path, tiles)).sources
    piece = pyramid.read(0, 0, 512, 512, 1)
    assert piece.valid[:256].max() == 0
    assert piece.valid[256:].min() == 1


@pytest.mark.parametrize("num_low", [0, 30_000])  # tiles of zoom 9: some fit in one directory
def test_a_sparse_archive_with_bounds_of_the_world_is_opened_by_few_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_low: int
) -> None:
    picture = png(np.full((256, 256, 3), 7, np.uint8))
    low = np.random.default_rng(0).choice(4**9, num_low, replace=False) + zxy_to_tileid(9, 0, 0)
    places = [*map(int, np.sort(low)), zxy_to_tileid(14, 9000, 12000)]
    bounds = {"min_lon_e7": -1_800_000_000, "max_lon_e7": 1_800_000_000}
    bounds |= {"min_lat_e7": -850_000_000, "max_lat_e7": 850_000_000}
    header = {"tile_type": TileType.PNG, "tile_compression": Compression.NONE}
    center = {"center_zoom": 14, "center_lon_e7": 0, "center_lat_e7": 0}
    path = tmp_path / "a.pmtiles"
    with path.open("wb") as file:
        archive: Any = Writer(file)  # type: ignore[no-untyped-call]
        for place in places:
            archive.write_tile(place, picture + bytes(place % 7))
        archive.finalize({**header, **center, **bounds, "min_zoom": 9, "max_zoom": 14}, {})
    looks = []
    find: Any = Reader.get

    def note(*place: Any) -> Any:
        looks.append(place)
        return find(*place)

    monkeypatch.setattr(Reader, "get", note)
    (pyramid,) = open_imagery(str(path)).sources
    assert isinstance(pyramid, Pyramid)
    assert pyramid.side == 256
    assert len(looks) == 1
    assert (deserialize_header(path.read_bytes())["leaf_directory_length"] > 0) == (num_low > 0)
    store = open_store(str(path))
    assert [store.find_tile(zoom) for zoom in (8, 12, 14, 15)] == [None, None, (9000, 12000), None]
    if num_low:
        assert store.find_tile(9) == tileid_to_zxy(places[0])[1:]


def test_vector_tiles_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    _, tiles = make_tiles()
    path = write_mbtiles(tmp_path, tiles)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE metadata SET value = 'pbf'")
    file.close()
    with pytest.raises(InputError, match="type pbf, not images"):
        open_imagery(path)
    tiles = dict.fromkeys(tiles, b"no image")
    with pytest.raises(InputError, match=r"xyz: tile 12/656/1582 cannot be decoded"):
        open_imagery(write_folder(tmp_path, tiles))
    (tmp_path / "b.mbtiles").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match="cannot be read as MBTiles"):
        open_imagery(str(tmp_path / "b.mbtiles"))
    (tmp_path / "b.pmtiles").write_bytes(b"no tiles" * 100)
    with pytest.raises(InputError, match="cannot be read as PMTiles"):
        open_imagery(str(tmp_path / "b.pmtiles"))
    with pytest.raises(InputError, match="bands 1 to 3"):
        open_imagery(write_folder(tmp_path, make_tiles()[1]), bands=[4])
