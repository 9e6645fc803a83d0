from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin
from rasterio.warp import transform as transform_points
from shapely.geometry import Point

from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.datasets.imagery.imagery import choose_stretch, find_cells
from s4g_ray.datasets.imagery.rasters.raster import Raster, close_files
from s4g_ray.datasets.imagery.sources import open_imagery
from s4g_ray.datasets.imagery.tile_reader import Tile, read_tiles
from s4g_ray.datasets.imagery.world_grid import WorldGrid
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from tests.support.faulty_s3 import Store
from tests.support.rasters import smooth_picture, write_raster

UTM = "EPSG:32633"
PLACE = from_origin(500_000, 5_000_000, 1, 1)


def plain(value: int, side: int = 100, dtype: str = "uint8") -> NDArray[Any]:
    return np.full((3, side, side), value, dtype)


def read_all(source: str | list[str], size_m: float = 20, **options: Any) -> dict[int, Tile]:
    imagery = open_imagery(source, **options)
    cells = find_cells(imagery, WorldGrid(size_m))
    stretch = choose_stretch(imagery)
    found = read_tiles(imagery, cells, pixels=20, stretch=stretch)
    return {tile.id: tile for tile in found if isinstance(tile, Tile)}


def test_the_first_source_counts_and_others_fill_what_it_lacks(tmp_path: Path) -> None:
    first = plain(50)
    first[:, :, 60:] = 0
    one = write_raster(tmp_path / "1.tif", first, UTM, PLACE, nodata=0)
    other = write_raster(tmp_path / "2.tif", plain(200), UTM, PLACE)
    tiles = read_all([one, other])
    values = np.unique(np.concatenate([tile.pixels.ravel() for tile in tiles.values()]))
    assert set(values) <= {0, 50, 200}  # not mixed at the border
    reversed_values = {v for t in read_all([other, one]).values() for v in np.unique(t.pixels)}
    assert reversed_values <= {0, 200}
    alone = read_all(one)
    assert max(tile.nodata_share for tile in alone.values()) > 0.5
    for number, tile in tiles.items():
        assert tile.nodata_share <= alone[number].nodata_share if number in alone else True


def test_zones_of_utm_meet_without_a_gap(tmp_path: Path) -> None:
    # two rasters on both sides of 12 degrees east, each in its own zone
    uris = []
    for zone, west in ((32, 11.98), (33, 11.995)):
        crs = f"EPSG:326{zone}"
        x, y = transform_points("EPSG:4326", crs, [west], [48.01])
        place = from_origin(x[0], y[0], 5, 5)
        uris.append(write_raster(tmp_path / f"{zone}.tif", plain(100, 300), crs, place))
    imagery = open_imagery(str(tmp_path))
    assert imagery.describe()["num_sources"] == 2
    assert len(imagery.describe()["crs"]) == 2
    grid = WorldGrid(100)
    cells = find_cells(imagery, grid, bounds=(11.99, 48.0, 12.008, 48.005))
    tiles = list(read_tiles(imagery, cells, pixels=20, stretch=Stretch()))
    for tile in tiles:
        assert isinstance(tile, Tile)
        assert tile.nodata_share == 0
        assert (tile.pixels == 100).all()


def test_ids_are_those_of_the_ground_in_any_source(tmp_path: Path) -> None:
    picture = smooth_picture(200, 200)
    lat, lon = 45.15, 15.0
    uris = []
    for name, crs in (("a", UTM), ("b", "EPSG:4326"), ("c", "EPSG:3857")):
        x, y = transform_points("EPSG:4326", crs, [lon], [lat])
        step = 1e-4 if name == "b" else 10.0
        place = from_origin(x[0] - 100 * step, y[0] + 100 * step, step, step)
        uris.append(write_raster(tmp_path / f"{name}.tif", picture, crs, place))
    sets = [set(read_all(uri, 50)) for uri in uris]
    shared = sets[0] & sets[1] & sets[2]
    assert len(shared) > 100
    grid = WorldGrid(50)
    near = grid.cells_in(bounds=(lon - 0.002, lat - 0.002, lon + 0.002, lat + 0.002))
    assert set(near.ids) <= shared


@pytest.mark.parametrize("kind", ["nodata", "alpha", "mask", "nan", "option"])
def test_pixels_without_data_are_known_by(kind: str, tmp_path: Path) -> None:
    values = smooth_picture(100, 100).astype("float32" if kind == "nan" else "uint8")
    hole = (slice(20, 50), slice(30, 70))
    path = tmp_path / "a.tif"
    options: dict[str, Any] = {}
    if kind == "nodata":
        options = {"nodata": 0}
    if kind in ("nodata", "option"):
        values[(slice(None), *hole)] = 0
    elif kind == "nan":
        values[(slice(None), *hole)] = np.nan
    elif kind == "alpha":
        alpha = np.full((1, 100, 100), 255, np.uint8)
        alpha[(0, *hole)] = 0
        values = np.concatenate([values, alpha])
        options = {"photometric": "RGB", "alpha": "yes"}
    uri = write_raster(path, values, UTM, PLACE, **options)
    if kind == "mask":
        mask = np.full((100, 100), 255, np.uint8)
        mask[hole] = 0
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(uri, "r+") as target:
            target.write_mask(mask)
    (source,) = open_imagery(uri, nodata=0 if kind == "option" else None).sources
    assert isinstance(source, Raster)
    piece = source.read(0, 0, 100, 100, 1)
    expected = np.ones((100, 100), bool)
    expected[hole] = False
    assert piece.values.shape == (100, 100, 3)
    assert np.array_equal(piece.valid > 0, expected)
    coarse = source.read(0, 0, 100, 100, 10)
    assert np.array_equal(coarse.valid > 0, expected[::10, ::10])


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("factor", [1, 4])
def test_tiles_are_cut_from_bytes_with_alpha(tmp_path: Path, hole: bool, factor: int) -> None:
    values = np.full((4, 100, 100), 255, np.uint8)
    values[:3] = 90
    if hole:
        values[:, 20:60, 20:60] = 0
    uri = write_raster(tmp_path / "a.tif", values, UTM, PLACE, photometric="RGB", alpha="yes")
    imagery = open_imagery(uri)
    cells = find_cells(imagery, WorldGrid(20))
    found = read_tiles(imagery, cells, pixels=20 // factor, stretch=choose_stretch(imagery))
    tiles = [tile for tile in found if isinstance(tile, Tile)]
    assert {v for tile in tiles for v in np.unique(tile.pixels)} <= {0, 90}
    whole = [tile for tile in tiles if tile.nodata_share == 0]
    assert len(whole) >= 4
    assert all((tile.pixels == 90).all() for tile in whole)
    plain_uri = write_raster(tmp_path / "b.tif", plain(90), UTM, PLACE)
    stretch = choose_stretch(imagery)
    others = list(read_tiles(open_imagery(plain_uri), cells, pixels=20 // factor, stretch=stretch))
    missing = sum(tile.nodata_share for tile in tiles) + len(cells) - len(tiles)
    without = sum(tile.nodata_share for tile in others if isinstance(tile, Tile))
    assert missing - without == pytest.approx(4 if hole else 0, abs=0.3 if hole else 1e-9)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32", "float64"])
def test_other_types_are_stretched(tmp_path: Path, dtype: str) -> None:
    ramp = np.linspace(100, 3100, 100 * 100).reshape(100, 100).astype(dtype)
    uri = write_raster(tmp_path / "a.tif", ramp[None], UTM, PLACE)
    imagery = open_imagery(uri)
    stretch = choose_stretch(imagery)
    low, high = stretch.low, stretch.high
    assert low == pytest.approx((160,), abs=3)
    assert high == pytest.approx((3040,), abs=3)
    tiles = read_all(uri)
    assert all((tile.pixels == tile.pixels[..., :1]).all() for tile in tiles.values())
    top = max(tiles.values(), key=lambda tile: tile.lat)
    bottom = min(tiles.values(), key=lambda tile: tile.lat)
    assert top.pixels.mean() < bottom.pixels.mean()
    if dtype.startswith("float"):
        with pytest.raises(InputError, match="no full range"):
            choose_stretch(imagery, Stretch())


def test_bands_are_those_that_are_asked_for_or_shown(tmp_path: Path) -> None:
    values = np.stack([np.full((20, 20), band * 10, np.uint8) for band in range(1, 6)])
    uri = write_raster(tmp_path / "a.tif", values, UTM, PLACE)
    assert open_imagery(uri).describe()["bands"] == [1, 2, 3]
    with rasterio.open(uri, "r+") as target:
        kinds = [ColorInterp.undefined, ColorInterp.blue, ColorInterp.green, ColorInterp.red]
        target.colorinterp = [*kinds, ColorInterp.undefined]
    other = str(tmp_path / "b.tif")
    Path(uri).rename(other)
    assert open_imagery(other).describe()["bands"] == [4, 3, 2]
    (source,) = open_imagery(other, bands=[5, 1, 1]).sources
    assert source.read(0, 0, 1, 1, 1).values.tolist() == [[[50, 10, 10]]]
    with pytest.raises(InputError, match=r"no band 6, 0; it has bands 1 to 5"):
        open_imagery(other, bands=[1, 6, 0])
    with pytest.raises(InputError, match="give one, or three"):
        open_imagery(other, bands=[1, 2])


@pytest.mark.parametrize(("bits", "bands"), [(1, 1), (1, 3), (2, 1), (4, 3)])
def test_bytes_of_fewer_bits_span_all_greys(tmp_path: Path, bits: int, bands: int) -> None:
    most = 2**bits - 1
    values = np.arange(10_000).reshape(1, 100, 100) // 50 % (most + 1)
    values = values.astype(np.uint8).repeat(bands, axis=0)
    path = write_raster(tmp_path / "a.tif", values, UTM, PLACE, nbits=bits)
    has_palette = bits == bands == 1  # GDAL gives it one
    stretch = "full" if has_palette else f"0,{most}"
    assert choose_stretch(open_imagery(path)).describe() == stretch
    pixels = np.concatenate([tile.pixels.ravel() for tile in read_all(path).values()])
    assert pixels.min() < 20
    assert pixels.max() > 235
    of_bytes = write_raster(tmp_path / "b.tif", plain(200)[:bands], UTM, PLACE)
    assert choose_stretch(open_imagery([path, of_bytes])).describe() == "full"


def test_a_palette_gives_its_colors(tmp_path: Path) -> None:
    values = np.array([[[0, 1], [1, 0]]], np.uint8).repeat(20, 1).repeat(20, 2)
    uri = write_raster(tmp_path / "a.tif", values, UTM, PLACE, photometric="palette")
    with rasterio.open(uri, "r+") as target:
        target.write_colormap(1, {0: (10, 20, 30), 1: (200, 100, 50)})
    (source,) = open_imagery(uri).sources
    assert source.read(0, 0, 40, 40, 20).values.tolist() == [
        [[10, 20, 30], [200, 100, 50]],
        [[200, 100, 50], [10, 20, 30]],
    ]


def test_a_vrt_a_pattern_and_a_folder_are_sources(tmp_path: Path) -> None:
    uri = write_raster(tmp_path / "a.tif", smooth_picture(100, 100), UTM, PLACE)
    from rasterio.shutil import copy

    copy(uri, str(tmp_path / "a.vrt"), driver="VRT")
    expected = read_all(uri)
    (tmp_path / "f/2023.05").mkdir(parents=True)
    copy(uri, str(tmp_path / "f/2023.05/a.tif"))
    for source in (str(tmp_path / "a.vrt"), str(tmp_path / "*.tif"), str(tmp_path / "f")):
        found = read_all(source)
        assert found.keys() == expected.keys()
        for number, tile in found.items():
            assert np.array_equal(tile.pixels, expected[number].pixels)


def test_a_stac_collection_gives_its_images(tmp_path: Path) -> None:
    picture = smooth_picture(100, 100)
    write_raster(tmp_path / "data/visual.tif", picture, UTM, PLACE)
    for band, color in enumerate(("red", "green", "blue")):
        write_raster(tmp_path / f"data/{color}.tif", picture[band : band + 1], UTM, PLACE)
    kind = "image/tiff; application=geotiff; profile=cloud-optimized"

    def item(assets: dict[str, str]) -> dict[str, Any]:
        return {
            "type": "Feature",
            "id": "x",
            "assets": {
                **{key: {"href": href, "type": kind} for key, href in assets.items()},
                "thumbnail": {"href": "t.png", "type": "image/png", "roles": ["thumbnail"]},
            },
        }

    visual = item({"visual": "./data/visual.tif", "nir": "data/red.tif"})
    colors = item({color: f"data/{color}.tif" for color in ("green", "blue", "red", "nir")})
    expected = read_all(str(tmp_path / "data/visual.tif"))
    path = tmp_path / "items.json"
    for value, assets in (
        ({"type": "FeatureCollection", "features": [visual]}, None),
        (colors, None),
        (colors, ["red", "green", "blue"]),
    ):
        path.write_text(json.dumps(value))
        found = read_all(str(path), assets=assets)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[i].pixels, expected[i].pixels) for i in found)
    for value, message in (
        (item({"a": "a.tif", "b": "b.tif"}), "no asset that must be the image; it has a, b"),
        (item({"a": "https://x.org/a.tif"}), "download it"),
        ({"type": "FeatureCollection", "features": [{"type": "Feature"}]}, "not a STAC"),
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(InputError, match=message):
            open_imagery(str(path))
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        open_imagery(str(path))


@pytest.mark.parametrize("kind", ["alpha", "mask"])
def test_data_is_where_all_images_of_an_item_hold_some(tmp_path: Path, kind: str) -> None:
    expected = np.ones((100, 100), bool)
    for band, color in enumerate(("red", "green", "blue")):
        shown = np.full((100, 100), 255, np.uint8)
        if color != "blue":
            shown[20 * band + 10 : 20 * band + 30, 30:60] = 0
        expected &= shown > 0
        values = np.full((2 if kind == "alpha" else 1, 100, 100), 10 * band + 10, np.uint8)
        options = {}
        if kind == "alpha":
            values[1] = shown
            options = {"alpha": "yes"}
        uri = write_raster(tmp_path / f"{color}.tif", values, UTM, PLACE, **options)
        if kind == "mask":
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(uri, "r+") as target:
                target.write_mask(shown)
    assets = {color: {"href": f"{color}.tif"} for color in ("red", "green", "blue")}
    (tmp_path / "item.json").write_text(json.dumps({"id": "x", "assets": assets}))
    (source,) = open_imagery(str(tmp_path / "item.json")).sources
    piece = source.read(0, 0, 100, 100, 1)
    assert np.array_equal(piece.valid > 0, expected)
    assert np.unique(piece.values[expected], axis=0).tolist() == [[10, 20, 30]]


@pytest.mark.s3
def test_imagery_is_read_from_an_object_store(tmp_path: Path, store: Store) -> None:
    picture = smooth_picture(100, 100)
    local = write_raster(tmp_path / "a.tif", picture, UTM, PLACE, tiled=True)
    files.write_bytes("s3://data/imagery/a.tif", Path(local).read_bytes())
    expected = read_all(local)
    item = {
        "type": "Feature",
        "id": "x",
        "assets": {"visual": {"href": "s3://data/imagery/a.tif", "type": "image/tiff"}},
    }
    files.write_json("s3://data/items.json", {"type": "FeatureCollection", "features": [item]})
    for source in ("s3://data/imagery/a.tif", "s3://data/imagery", "s3://data/items.json"):
        found = read_all(source)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[i].pixels, expected[i].pixels) for i in found)
    with pytest.raises(InputError, match=r"s3://data/absent\.tif cannot be read"):
        open_imagery("s3://data/absent.tif")


def test_bad_sources_are_refused_in_one_message(tmp_path: Path) -> None:
    picture = smooth_picture(20, 20)
    cases = {
        write_raster(tmp_path / "no_crs.tif", picture, None, PLACE): "no coordinate reference",
        write_raster(tmp_path / "no_place.tif", picture, UTM, None): "nothing places its pixels",
        write_raster(
            tmp_path / "local.tif",
            picture,
            'LOCAL_CS["site",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]',
            PLACE,
        ): "unknown coordinate reference system",
        write_raster(
            tmp_path / "geocentric.tif", picture, "EPSG:4978", PLACE
        ): "counts metres from the centre of the Earth",
        str(tmp_path / "absent.tif"): "does not exist",
        str(tmp_path / "absent/*.tif"): "does not exist",
        str(tmp_path / "empty"): "holds no imagery",
        str(tmp_path / "text.tif"): "cannot be read as a raster",
        "package://localtileserver_absent/a.tif": "no installed Python package",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tif").write_text("no raster")
    for source, message in cases.items():
        with pytest.raises(InputError, match=message) as raised:
            open_imagery(source)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="no imagery is given"):
        open_imagery([])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    uri = write_raster(
        tmp_path / "a.tif", smooth_picture(300, 300), UTM, PLACE, tiled=True, compress="deflate"
    )
    data = bytearray(Path(uri).read_bytes())
    for start in range(len(data) // 3, len(data), 50):
        data[start] ^= 255
    Path(uri).write_bytes(data)
    with pytest.raises(InputError, match=r"a\.tif cannot be read"):
        read_all(uri)
    close_files()
    Path(uri).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"a\.tif cannot be read as a raster: .*(?<!details\.)$"):
        read_all(uri)
    close_files()


@pytest.mark.parametrize(
    ("crs", "place", "inside", "outside"),
    [
        ("EPSG:3413", (-500_000, 500_000, 10_000), (89.9, 77), (80, 0)),
        ("EPSG:3031", (-500_000, 500_000, 10_000), (-89.9, -177), (-80, 0)),
        ("EPSG:3832", (3_200_000, 0, 3_000), (-1, 179.5), (-1, 0)),
        ("EPSG:32601", (300_000, 5_000_000, 10_000), (42, -179), (42, 100)),
    ],
)
def test_footprints_hold_poles_and_cross_the_antimeridian(
    tmp_path: Path,
    crs: str,
    place: tuple[float, float, float],
    inside: tuple[float, float],
    outside: tuple[float, float],
) -> None:
    west, north, step = place
    uri = write_raster(
        tmp_path / "a.tif", smooth_picture(100, 100), crs, from_origin(west, north, step, step)
    )
    imagery = open_imagery(uri)
    shape = imagery.footprint
    assert shape.is_valid
    assert shape.covers(Point(inside[1], inside[0]))
    assert not shape.covers(Point(outside[1], outside[0]))
    bounds = shape.bounds
    assert bounds[0] >= -180.0000001
    assert bounds[2] <= 180.0000001
    w, s, e, n = imagery.extent
    assert s <= inside[0] <= n
    assert (inside[1] - w) % 360 <= e - w
    cells = find_cells(imagery, WorldGrid(50_000))
    tiles = read_tiles(imagery, cells, pixels=8, stretch=Stretch())
    whole = sum(isinstance(tile, Tile) and tile.nodata_share == 0 for tile in tiles)
    area = 100 * 100 * imagery.native_resolution_m**2
    assert whole * 50_000**2 == pytest.approx(area, rel=0.35)
