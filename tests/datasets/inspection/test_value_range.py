from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from s4g_ray.cli.convert import convert_app
from s4g_ray.config.data_schema import DataConfig, ImageOptions
from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.data.format.header import DatasetHeader
from s4g_ray.data.images import load_raws, load_views, try_image
from s4g_ray.data.pixels.image_values import ImageValues
from s4g_ray.data.pixels.stretch import Stretch
from s4g_ray.data.tables.node_cache import open_image_tables
from s4g_ray.datasets.inspection.dataset_checks import inspect_dataset
from s4g_ray.datasets.inspection.value_range import write_stretch
from s4g_ray.datasets.packing.layout import PackOptions
from s4g_ray.datasets.packing.pack import pack
from s4g_ray.errors import BadImageError, InputError
from tests.conftest import tables
from tests.data.pixels.test_image_values import encode_tiff, restate
from tests.support.inspected_datasets import only_finding

COUNT = 4


def make_tile(number: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    rows, columns, bands = np.indices((16, 16, 4))
    slope = (3 + number) * rows + (2 + bands) * columns + 9 * bands
    return np.asarray(100 + 14 * slope, np.uint16)


@pytest.fixture
def dataset(tmp_path: Path) -> GeoDataset:
    """Four places whose images have four bands of 16 bits, of values up to 3000."""
    (tmp_path / "d").mkdir()
    for number in range(COUNT):
        (tmp_path / f"d/{number}.tif").write_bytes(encode_tiff(make_tile(number)))
    made = []
    for table in tables(COUNT):
        names = [[f"{number}.tif" for number in range(COUNT)]]
        made.append(table.set_column(table.column_names.index("uri"), "uri", names))
    return write_dataset(str(tmp_path / "d"), *made, name="bands")


def convert_stretch(*arguments: str) -> Any:
    done = CliRunner().invoke(convert_app, ["stretch", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def read_images(made: GeoDataset) -> list[Any]:
    """All references, by the table in memory and by that of workers."""
    of_workers = open_image_tables(made.uri, {"references": ["train"]})["references"]
    found, again = (
        [try_image(image).numpy() for image in load_raws(table, range(COUNT))]
        for table in (made.table("references", ["train"]), of_workers)
    )
    np.testing.assert_array_equal(found, again)
    return found


def test_percentiles_of_a_sample_are_kept_and_used_wherever_images_are_read(
    dataset: GeoDataset, tmp_path: Path
) -> None:
    table = dataset.table("references", ["train"])
    assert all(isinstance(image, BadImageError) for image in load_raws(table, range(COUNT)))
    fault = only_finding(inspect_dataset(dataset.uri), "images", "fault")
    assert "has 4 bands: name those to show" in fault.examples[0]
    made = convert_stretch(dataset.uri, "percentile:0,100", "--bands", "4,3,2")
    every = np.stack([make_tile(number) for number in range(COUNT)])[..., [3, 2, 1]]
    low, high = every.min(axis=(0, 1, 2)), every.max(axis=(0, 1, 2))
    limits = ";".join(f"{a:g},{b:g}" for a, b in zip(low, high, strict=True))
    assert (made["stretch"], made["bands"]) == (limits, [4, 3, 2])
    opened = open_dataset(dataset.uri)
    assert opened.fingerprint == made["fingerprint"] != dataset.fingerprint
    wanted = [restate((tile - low) / (high - low) * 1000, 0, 1000) for tile in every]
    np.testing.assert_allclose(read_images(opened), wanted, atol=1)
    assert not only_faults(opened)
    config = DataConfig(uri=dataset.uri, reference_size=(8, 8))
    (view,) = load_views(opened.table("references", ["train"]), [1], "references", config, seed=0)
    assert np.ptp(try_image(view).numpy()) > 100


def test_another_stretch_keeps_the_bands_unless_others_are_named(dataset: GeoDataset) -> None:
    convert_stretch(dataset.uri, "0,3000", "--bands", "4,3,2")
    assert convert_stretch(dataset.uri, "0,2000")["bands"] == [4, 3, 2]
    assert open_dataset(dataset.uri).values == ImageValues("0,2000", (4, 3, 2))
    assert convert_stretch(dataset.uri, "0,2000", "--bands", "1")["bands"] == [1]


def test_percentiles_are_those_of_each_band_where_bands_lie_one_after_the_other(
    dataset: GeoDataset,
) -> None:
    wanted = convert_stretch(dataset.uri, "percentile:0,100", "--bands", "4,3,2")["stretch"]
    for number in range(COUNT):
        data = encode_tiff(make_tile(number), interleave="band", compress="lzw")
        Path(dataset.uri, f"{number}.tif").write_bytes(data)
    found = convert_stretch(dataset.uri, "percentile:0,100", "--bands", "4,3,2")["stretch"]
    assert found == wanted


@pytest.mark.parametrize("bands", [1, 3])
def test_values_for_missing_data_count_for_no_percentile(dataset: GeoDataset, bands: int) -> None:
    for number in range(COUNT):
        values = make_tile(number)[:, :, :bands].astype(np.int16)
        values[:3] = -9999
        Path(dataset.uri, f"{number}.tif").write_bytes(encode_tiff(values, nodata=-9999))
    every = np.stack([make_tile(number)[3:, :, :bands] for number in range(COUNT)])
    low, high = every.min(axis=(0, 1, 2)), every.max(axis=(0, 1, 2))
    limits = ";".join(f"{a:g},{b:g}" for a, b in zip(low, high, strict=True))
    assert convert_stretch(dataset.uri, "percentile:0,100")["stretch"] == limits


def test_one_tile_of_water_and_one_of_snow_are_shown_after_percentiles(
    dataset: GeoDataset,
) -> None:
    ramp = np.indices((16, 16)).sum(0)[:, :, None]
    for number, start in enumerate((500, 500, 300, 1700)):
        values = np.asarray(start + ramp * (32 if start == 500 else 1), np.uint16)
        Path(dataset.uri, f"{number}.tif").write_bytes(encode_tiff(values))
    convert_stretch(dataset.uri, "percentile:30,70")
    opened = open_dataset(dataset.uri)
    assert [int(np.median(image)) for image in read_images(opened)[2:]] == [0, 255]
    assert not only_faults(opened)


def test_a_range_that_makes_the_whole_sample_black_is_refused_and_a_fault(
    dataset: GeoDataset,
) -> None:
    message = "the sampled images taken together: .* are black by stretch 0,300000"
    with pytest.raises(InputError, match=message):
        write_stretch(dataset.uri, Stretch.parse("0,300000"), (1, 2, 3))
    header = replace(DatasetHeader.read(dataset.uri), values=ImageValues("0,300000", (1, 2, 3)))
    header.write(dataset.uri)
    (fault,) = only_faults(open_dataset(dataset.uri))
    assert re.match(message, fault)
    replace(header, values=ImageValues("0,300000")).write(dataset.uri)
    assert only_faults(open_dataset(dataset.uri)) == ["4 of 4 sampled images cannot be decoded"]


def test_a_plain_band_has_limits_of_its_own(dataset: GeoDataset) -> None:
    for number in range(COUNT):
        data = encode_tiff(np.full((16, 16, 1), 700, np.uint16))
        Path(dataset.uri, f"{number}.tif").write_bytes(data)
    assert convert_stretch(dataset.uri, "percentile:2,98")["stretch"] == "700,701"


def only_faults(made: GeoDataset) -> list[str]:
    return [one.text for one in inspect_dataset(made.uri).findings if one.level == "fault"]


def test_packing_copies_with_the_range_or_stores_what_is_shown(
    dataset: GeoDataset, tmp_path: Path
) -> None:
    shown = write_stretch(dataset.uri, Stretch.parse("0,3000"), (1, 2, 3))
    wanted = read_images(shown)
    copied = pack(shown.uri, str(tmp_path / "copied")).dataset
    np.testing.assert_array_equal(read_images(copied), wanted)
    assert copied.values == shown.values
    options = PackOptions(query_size=(16, 16), reference_size=(16, 16), quality=100)
    resized = pack(shown.uri, str(tmp_path / "resized"), options).dataset
    assert np.abs(np.subtract(read_images(resized), wanted, dtype=float)).mean() < 4
    assert only_faults(copied) == only_faults(resized) == []


def test_a_configuration_may_name_another_range_and_the_fingerprint_tells(
    dataset: GeoDataset,
) -> None:
    config = DataConfig(uri=dataset.uri, stretch="0,3000", bands=(1, 2, 3))
    opened = open_dataset(dataset.uri, config.image_options)
    table = opened.table("references", ["train"])
    assert not any(isinstance(image, BadImageError) for image in load_raws(table, range(COUNT)))
    options = [
        ImageOptions(),
        ImageOptions(stretch="0,3000"),
        ImageOptions(stretch="0,3000", bands=(1, 2, 3)),
        ImageOptions(stretch="0,2000", bands=(1, 2, 3)),
    ]
    assert len({open_dataset(dataset.uri, one).fingerprint for one in options}) == len(options)
    with pytest.raises(InputError, match="find their limits once, by `s4g convert stretch"):
        open_dataset(dataset.uri, ImageOptions(stretch="percentile:2,98"))


@pytest.mark.parametrize(
    ("stretch", "bands", "message"),
    [
        ("0,1", (1, 2, 3), "reference id 0 .*are white by stretch 0,1"),
        ("full", (1, 2, 3), None),
        ("0,3000", None, "name those to show"),
        ("percentile:2,98", None, "name those to show"),
        ("percentile:2,98", (1, 2, 9), r"bands \[1, 2, 9\] are asked for"),
        ("0,3000", (1, 2, 9), r"bands \[1, 2, 9\] are asked for"),
    ],
)
def test_a_range_that_does_not_fit_is_refused_before_it_is_written(
    dataset: GeoDataset, stretch: str, bands: tuple[int, ...] | None, message: str | None
) -> None:
    before = Path(dataset.uri, "dataset.json").read_bytes()
    if message is None:
        write_stretch(dataset.uri, Stretch.parse(stretch), bands)
        assert open_dataset(dataset.uri).values.stretch == "full"
        return
    with pytest.raises(InputError, match=message):
        write_stretch(dataset.uri, Stretch.parse(stretch), bands)
    assert Path(dataset.uri, "dataset.json").read_bytes() == before


@pytest.mark.parametrize("stretch", ["0,3000", "full"])
def test_a_stretch_of_bytes_says_that_it_changes_nothing(tmp_path: Path, stretch: str) -> None:
    for number in range(COUNT):
        Image.fromarray(make_tile(number)[..., 0].astype(np.uint8)).save(tmp_path / f"{number}.png")
    made = []
    for table in tables(COUNT):
        names = [[f"{number}.png" for number in range(COUNT)]]
        made.append(table.set_column(table.column_names.index("uri"), "uri", names))
    of_bytes = write_dataset(str(tmp_path), *made, name="bytes")
    done = CliRunner().invoke(convert_app, ["stretch", of_bytes.uri, stretch])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert any("hold bytes alone, which stay as they are: the stretch changes" in x for x in lines)
    assert lines[-1] == f"bytes: values other than bytes are shown by stretch {stretch}"
