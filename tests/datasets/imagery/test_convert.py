from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.shutil import copy
from rasterio.transform import Affine

from s4g_ray.data.area import Area
from s4g_ray.datasets.imagery.convert import convert
from s4g_ray.datasets.imagery.cutting.summary import read_summary
from s4g_ray.datasets.imagery.rasters.raster import close_files
from s4g_ray.errors import InputError
from s4g_ray.storage import files

WEST, NORTH, STEP, SIDE = 24.9, 60.2, 2e-5, 600  # degrees; 2.2 m to the north, 1.1 m to the east


def write_raster(path: Path, first_row: int = 0, num_bands: int = 3) -> str:
    """Write a raster whose red is the column and whose green is the row, from first_row on."""
    rows = SIDE - first_row
    values = np.zeros((num_bands, rows, SIDE), np.uint8)
    values[0] = np.linspace(1, 255, SIDE)[None]
    values[1] = np.linspace(1, 255, SIDE)[first_row:, None]
    profile = {
        "driver": "GTiff",
        "width": SIDE,
        "height": rows,
        "count": num_bands,
        "dtype": "uint8",
        "crs": "EPSG:4326",
        "nodata": 0,
        "transform": Affine(STEP, 0, WEST, 0, -STEP, NORTH - first_row * STEP),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **profile) as file:
        file.write(values)
    return str(path)


def read_tiles(uri: str) -> dict[int, tuple[float, float, Any]]:
    """Read lat, lon and the pixels of every tile, by id."""
    from s4g_ray.data.dataset import open_dataset

    found = {}
    for row in open_dataset(uri).references.to_table().to_pylist():
        data = files.read_bytes(files.join(uri, row["uri"]), row["offset"], row["length"])
        pixels = np.asarray(Image.open(io.BytesIO(data))).astype(float)
        found[row["id"]] = (row["lat"], row["lon"], pixels)
    return found


def test_a_tile_shows_the_ground_at_its_coordinates(tmp_path: Path) -> None:
    source = write_raster(tmp_path / "s/a.tif")
    dataset = convert(source, str(tmp_path / "r"), size_m=120, pixels=64, max_nodata=0.0)
    tiles = read_tiles(dataset.uri)
    assert dataset.name == "a"
    assert len(tiles) > 30
    for lat, lon, pixels in tiles.values():
        column = (lon - WEST) / STEP
        row = (NORTH - lat) / STEP
        middle = pixels[28:36, 28:36].mean(axis=(0, 1))
        # a grey level is 2.4 pixels of the raster; JPEG adds a level
        assert middle[0] == pytest.approx(1 + 254 * (column - 0.5) / (SIDE - 1), abs=1.5)
        assert middle[1] == pytest.approx(1 + 254 * (row - 0.5) / (SIDE - 1), abs=1.5)
        # 120 m are 2.15e-3 degrees to the east: 45.6 levels
        levels = pixels[:, -4:, 0].mean() - pixels[:, :4, 0].mean()
        assert levels == pytest.approx(45.6 * 60 / 64, rel=0.06)


def test_the_same_ground_has_the_same_id_in_every_source_and_area(tmp_path: Path) -> None:
    source = write_raster(tmp_path / "s/a.tif")
    whole = read_tiles(convert(source, str(tmp_path / "w"), size_m=120, pixels=32).uri)
    part_source = write_raster(tmp_path / "s/b.tif", first_row=250)
    part = read_tiles(convert(part_source, str(tmp_path / "p"), size_m=120, pixels=32).uri)
    bounds = (WEST + 0.002, NORTH - 0.008, WEST + 0.009, NORTH - 0.004)
    in_bounds = convert(source, str(tmp_path / "b"), size_m=120, pixels=32, bounds=bounds)
    area = Area.bounds(*bounds)
    in_area = convert(source, str(tmp_path / "c"), size_m=120, pixels=32, area=area)
    assert in_area.fingerprint == in_bounds.fingerprint
    inside = read_tiles(in_bounds.uri)
    for tiles in (part, inside):
        assert 0 < len(tiles) < len(whole)
        for id_, (lat, lon, pixels) in tiles.items():
            assert whole[id_][:2] == (lat, lon)
            if (pixels[..., 1] > 120).all():  # away from the border of the second raster
                assert np.abs(whole[id_][2] - pixels).max() <= 2
    assert all(bounds[0] <= lon <= bounds[2] for _, lon, _ in inside.values())


@pytest.mark.parametrize(("num_bands", "hint"), [(3, ""), (5, " (--bands names others)")])
def test_bands_that_are_shown_are_named_and_others_where_there_are_some(
    tmp_path: Path, num_bands: int, hint: str
) -> None:
    notes: list[str] = []
    source = write_raster(tmp_path / "a.tif", num_bands=num_bands)
    convert(source, str(tmp_path / "r"), size_m=240, pixels=64, report=notes.append)
    assert notes[0] == f"bands shown: 1,2,3{hint}"


def test_several_sizes_and_sources_make_one_region(tmp_path: Path) -> None:
    sources = [write_raster(tmp_path / "s/b.tif", 300), write_raster(tmp_path / "s/a.tif")]
    notes: list[str] = []
    dataset = convert(
        sources, str(tmp_path / "r"), size_m=[60, 240], overlap=0.5, pixels=128, report=notes.append
    )
    summary = read_summary(dataset.uri)
    assert set(summary.tiles_by_size) == {"60", "240"}
    assert set(summary.dropped) <= {"more than 0.05 without data", "no imagery"}
    raster_km2 = 0.012 * 111.4 * 0.012 * 55.6
    assert summary.ground_km2 == pytest.approx(raster_km2, rel=0.1)
    assert len(notes) == 2
    assert notes[0] == "bands shown: 1,2,3"
    assert notes[1].startswith("tiles of 60 m at 128 pixels show 0.469 m a pixel, the imagery")
    sizes = dataset.references.to_table(columns=["size_m"])["size_m"].to_pylist()
    assert sizes.count(240.0) == summary.tiles_by_size["240"]
    # fewer than a raster pixel: 1 m of ground
    small = (WEST + 0.001, NORTH - 0.00105, WEST + 0.0011, NORTH - 0.001)
    convert(sources, str(tmp_path / "s1"), size_m=1, pixels=8, bounds=small, report=notes.append)
    assert "tiles of 1 m are smaller than a pixel of the imagery" in notes[-1]
    lines = read_summary(str(tmp_path / "s1")).describe()
    assert any("tiles of 1 m are smaller than a pixel of the imagery" in line for line in lines)
    assert not any("smaller than" in line for line in summary.describe())


def test_what_cannot_be_cut_is_refused_and_leaves_no_target(tmp_path: Path) -> None:
    source = write_raster(tmp_path / "s/a.tif")
    target = tmp_path / "r"
    for options, message in (
        ({"size_m": 60, "bounds": (0.0, 0.0, 1.0, 1.0)}, r"24\.9.*0, 0, 1, 1"),
        ({"size_m": 60, "bands": [7]}, "7"),
        ({"size_m": [60, 60]}, "--size-m .*: give one or several different sizes"),
        ({"size_m": []}, "--size-m .*: give one or several different sizes"),
        ({"size_m": -60}, "--size-m -60"),
        ({"size_m": 0.09}, r"109,\d+,\d+ cells of 0\.09 m.* more than 100,000,000; give a larger"),
        ({"size_m": 60, "overlap": 1.0}, "--overlap 1"),
        ({"size_m": 60, "pixels": 0}, "--pixels 0"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source, str(target), **options)
        assert not target.exists()
    with pytest.raises(InputError):
        convert(str(tmp_path / "nothing.tif"), str(target), size_m=60)
    assert not target.exists()


class StopError(Exception):
    pass


def stop(done: int, total: int) -> None:
    raise StopError


def check_resuming(source: str, target: str, rewrite: Callable[[], object]) -> None:
    """Check that an interrupted call goes on with the same imagery alone."""
    options: dict[str, Any] = {"size_m": 120, "pixels": 16, "num_tasks": 0}
    for _ in range(2):
        with pytest.raises(StopError):
            convert(source, target, on_progress=stop, **options)
    rewrite()
    close_files()
    with pytest.raises(
        InputError, match=r"was begun with other imagery \(SOURCE or .*choose another"
    ):
        convert(source, target, **options)


@pytest.mark.parametrize("kind", ["tif", "nested.vrt", "xyz"])
def test_rewritten_imagery_is_not_resumed_with(tmp_path: Path, kind: str) -> None:
    source = write_raster(tmp_path / "s/a.tif")
    rewritten = Path(source)
    if kind == "nested.vrt":
        inner = str(tmp_path / "inner.vrt")
        copy(source, inner, driver="VRT")
        source = str(tmp_path / "nested.vrt")
        copy(inner, source, driver="VRT")
    if kind == "xyz":
        rewritten = tmp_path / "xyz/12/656/1582.png"
        rewritten.parent.mkdir(parents=True)
        Image.new("RGB", (256, 256), (9, 9, 9)).save(rewritten)
        source = str(tmp_path / "xyz")
    data = rewritten.read_bytes()
    check_resuming(source, str(tmp_path / "r"), lambda: rewritten.write_bytes(data))


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_imagery_that_changes_while_it_is_cut_is_refused(tmp_path: Path, change: str) -> None:
    source = Path(write_raster(tmp_path / "s/a.tif"))

    def rewrite(done: int, total: int) -> None:
        source.unlink(missing_ok=True)
        if change == "replaced":
            write_raster(source, first_row=100)

    options: dict[str, Any] = {"size_m": 120, "pixels": 16, "num_tasks": 0}
    target = tmp_path / "r"
    with pytest.raises(InputError, match=r"changed or removed while .* was cut from them"):
        convert(str(source), str(target), on_progress=rewrite, **options)
    assert not (target / "dataset.json").exists()
    close_files()


@pytest.mark.s3
def test_a_rewritten_object_is_not_resumed_with(tmp_path: Path, store: Any) -> None:
    source = "s3://data/a.tif"
    data = Path(write_raster(tmp_path / "a.tif")).read_bytes()
    files.write_bytes(source, data)
    other = data[:-1] + bytes([data[-1] ^ 1])
    check_resuming(source, str(tmp_path / "r"), lambda: files.write_bytes(source, other))


def test_a_region_is_cut_into_an_object_store(tmp_path: Path, store: Any) -> None:
    source = write_raster(tmp_path / "s/a.tif")
    options: dict[str, Any] = {"size_m": 120, "pixels": 16}
    here = convert(source, str(tmp_path / "r"), **options)
    there = convert(source, "s3://data/regions/r", **options)
    assert there.fingerprint == here.fingerprint
    for name in ("coverage.geojson", "coverage.png"):
        assert (
            files.read_bytes(f"s3://data/regions/r/{name}") == (tmp_path / "r" / name).read_bytes()
        )
    assert json.loads(files.read_bytes("s3://data/regions/r/coverage.geojson"))["features"]
    assert read_summary(there.uri).tiles == len(read_tiles(there.uri))
    assert "_work" not in files.list_names("s3://data/regions/r")
