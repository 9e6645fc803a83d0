"""Images of every type of values, decoded as loading does it, against a plain restatement."""

from __future__ import annotations

import io
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from PIL import Image

from s4g_ray.data.images import decode_pixels
from s4g_ray.data.pixels.image_values import AS_STORED, ImageValues, UnfitValuesError
from s4g_ray.data.pixels.raw_values import read_bands, read_single_band
from s4g_ray.errors import InputError

KINDS: dict[str, tuple[str, float, float]] = {  # type, and the range that its values use
    "8 of 16 bits": ("uint16", 0, 255),
    "reflectance": ("uint16", 0, 3000),
    "12 bits": ("uint16", 0, 4095),
    "signed bytes": ("int8", -10, 20),
    "signed": ("int16", -1000, 3000),
    "elevation": ("int16", 200, 800),
    "32 bits": ("int32", 0, 10_000),
    "unsigned 32 bits": ("uint32", 2**31 - 9, 2**31 + 999),
    "float, 0 to 1": ("float32", 0.0, 1.0),
    "float, physical": ("float32", 270.0, 310.0),
    "double": ("float64", -1.0, 1.0),
}


def make_values(dtype: str, low: float, high: float, bands: int) -> NDArray[Any]:
    """Values [8, 12, bands] that use a whole range."""
    rng = np.random.default_rng(3)
    values = rng.uniform(low, high, (8, 12, bands))
    values[0, 0], values[0, 1] = low, high
    return values.astype(dtype)


def encode_tiff(values: NDArray[Any], **profile: Any) -> bytes:
    height, width, count = values.shape
    with warnings.catch_warnings(), rasterio.MemoryFile() as memory:
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with memory.open(
            driver="GTiff", height=height, width=width, count=count, dtype=values.dtype, **profile
        ) as raster:
            raster.write(np.moveaxis(values, 2, 0))
        return bytes(memory.read())


def restate(values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """Return bytes [3, H, W] of values [H, W, 1 or 3]."""
    scaled = np.clip((values.astype(np.float64) - low) / (high - low) * 255, 0, 255)
    shown = np.broadcast_to(np.floor(scaled + 0.5), (*values.shape[:2], 3))
    return shown.transpose(2, 0, 1).copy()


def test_threads_read_beside_each_other_without_a_warning() -> None:
    values = make_values("uint16", 0, 3000, 4)
    data = encode_tiff(values)
    with ThreadPoolExecutor(8) as pool:
        for read in pool.map(lambda _: read_bands(data, 10_000).values, range(1000)):
            np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("bands", range(1, 8))
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_shown_by_the_range_of_the_data_set_and_refused_without_one(
    kind: str, bands: int
) -> None:
    dtype, low, high = KINDS[kind]
    values = make_values(dtype, low, high, bands)
    data = encode_tiff(values)
    chosen = {1: (1,), 2: (2,), 3: (1, 2, 3)}.get(bands, (4, 3, 1))
    named = ImageValues(f"{low:.12g},{high:.12g}", chosen if bands not in (1, 3) else None)
    wanted = restate(values[:, :, [band - 1 for band in chosen]], low, high)
    np.testing.assert_allclose(decode_pixels(data, values=named), wanted, atol=1)
    assert np.ptp(decode_pixels(data, values=named)) == 255
    with pytest.raises(UnfitValuesError, match=r"data\.(stretch|bands)="):
        decode_pixels(data)
    if bands not in (1, 3):
        with pytest.raises(UnfitValuesError, match=rf"has {bands} bands: name those to show"):
            decode_pixels(data, values=ImageValues(named.stretch))
        with pytest.raises(UnfitValuesError, match=rf"has {bands} bands, and bands \[9\]"):
            decode_pixels(data, values=ImageValues(named.stretch, (9,)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("compress", ["none", "lzw", "deflate"])
@pytest.mark.parametrize("interleave", ["band", "pixel"])
def test_bands_are_chosen_however_a_tiff_lays_them_out(
    interleave: str, compress: str, dtype: str
) -> None:
    layout = {"interleave": interleave, "compress": compress}
    for count in (2, 3, 4, 7):
        values = make_values(dtype, 0, 255, count)
        bands = {2: (2,), 3: (1, 2, 3)}.get(count, (4, 2, 3))
        wanted = restate(values[:, :, [band - 1 for band in bands]], 0, 255)
        for photometric in ("MINISBLACK", "RGB") if count > 2 else ("MINISBLACK",):
            data = encode_tiff(values, photometric=photometric, **layout)
            found = decode_pixels(data, values=ImageValues("0,255", bands))
            np.testing.assert_allclose(found, wanted, atol=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_values_are_read_in_the_order_of_their_bytes(order: str, kind: str) -> None:
    dtype, low, high = KINDS[kind]
    values = make_values(dtype, low, high, 1)
    wanted = restate(values, low, high)
    for compress in ("none", "lzw", "deflate"):
        data = encode_tiff(values, compress=compress, ENDIANNESS=order)
        found = decode_pixels(data, values=ImageValues(f"{low:.12g},{high:.12g}"))
        np.testing.assert_allclose(found, wanted, atol=1)


def test_values_of_a_type_that_is_not_known_are_refused() -> None:
    with pytest.raises(UnfitValuesError, match="of a type that is not read; save them as a TIFF"):
        read_single_band(Image.new("I", (4, 4)))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32"])
def test_the_full_range_of_a_type_needs_no_name(dtype: str) -> None:
    limits = np.iinfo(dtype)
    values = make_values("float64", float(limits.min), float(limits.max), 1).astype(dtype)
    wanted = restate(values, limits.min, limits.max)
    for named in (AS_STORED, ImageValues("full")):
        np.testing.assert_allclose(decode_pixels(encode_tiff(values), values=named), wanted, atol=1)


@pytest.mark.parametrize(
    ("kind", "stretch", "reason"),
    [
        ("float, 0 to 1", "2.1,3.1", "are black by stretch 2.1,3.1"),
        ("float, 0 to 1", "full", "have no full range"),
        ("8 of 16 bits", "full", "are black by stretch full"),
        ("reflectance", "0,1", "lie above those of stretch 0,1"),
        ("float, physical", "0,100", "are white by stretch 0,100"),
        ("signed", "2500,3000", r"lie below those of stretch 2500,3000 \(7\d% of them\)"),
        ("reflectance", None, "uint16, 0 to 3000.* nearly one shade"),
    ],
)
def test_an_image_of_another_range_is_refused_with_its_own(
    kind: str, stretch: str | None, reason: str
) -> None:
    dtype, low, high = KINDS[kind]
    values = make_values(dtype, low, high, 1)
    with pytest.raises(
        UnfitValuesError, match=rf"{reason}.*data\.stretch={low:g},{high:g}"
    ) as caught:
        decode_pixels(encode_tiff(values), values=ImageValues(stretch))
    # values of floating point have no full range
    assert ("data.stretch=full" in str(caught.value)) == (dtype != "float32")


@pytest.mark.parametrize(
    ("kind", "stretch", "reason"),
    [
        ("float, 0 to 1", "0,3000", "are black by stretch 0,3000"),
        ("float, physical", "200,269", "are white by stretch 200,269"),
        ("signed", "2000,3000", r"lie below those of stretch 2000,3000 \(7\d% of them\)"),
        ("elevation", "200,400", r"lie above those of stretch 200,400 \(6\d% of them\)"),
    ],
)
def test_water_and_snow_are_clipped_but_a_sample_is_not(
    kind: str, stretch: str, reason: str
) -> None:
    dtype, low, high = KINDS[kind]
    values = make_values(dtype, low, high, 1)
    named = ImageValues(stretch)
    wanted = restate(values, *map(float, stretch.split(",")))
    np.testing.assert_allclose(decode_pixels(encode_tiff(values), values=named), wanted, atol=1)
    with pytest.raises(UnfitValuesError, match=reason):
        named.check_sample(values.ravel().astype(np.float64), values.dtype)


def test_a_range_for_each_band_and_a_constant_image_are_taken() -> None:
    values = make_values("uint16", 0, 3000, 3)
    values[:, :, 1] *= 2
    found = decode_pixels(encode_tiff(values), values=ImageValues("0,3000;0,6000;0,3000"))
    wanted = restate(values // np.array([1, 2, 1], np.uint16), 0, 3000)
    np.testing.assert_allclose(found, wanted, atol=1)
    for value in (0, 700, 65535):
        plain = np.full((8, 8, 1), value, np.uint16)
        for named in (AS_STORED, ImageValues("0,3000")):
            assert np.ptp(decode_pixels(encode_tiff(plain), values=named)) == 0


def test_what_has_no_data_is_black_and_does_not_count() -> None:
    values = make_values("float32", 0.25, 1.0, 3)
    wanted = restate(values, 0.25, 1.0)
    wanted[:, 4:] = 0
    for missing, profile in ((np.nan, {}), (-9999.0, {"nodata": -9999.0})):
        holed = values.copy()
        holed[4:] = missing
        found = decode_pixels(encode_tiff(holed, **profile), values=ImageValues("0.25,1"))
        np.testing.assert_allclose(found, wanted, atol=1)


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
def test_a_value_for_missing_data_is_black_and_does_not_count(dtype: str, bands: int) -> None:
    missing = {"int16": -9999.0, "int32": -(2.0**31), "float32": -3.4028234663852886e38}[dtype]
    values = make_values(dtype, 1000, 3000, bands)
    wanted = restate(values, 1000, 3000)
    wanted[:, 2:] = 0
    values[2:] = missing
    data = encode_tiff(values, nodata=missing)
    found = decode_pixels(data, values=ImageValues("1000,3000"))
    np.testing.assert_allclose(found, wanted, atol=1)
    with pytest.raises(UnfitValuesError, match=r"\(\w+, 1000 to 3000\)"):
        decode_pixels(data, values=ImageValues("0,1"))


def test_pngs_of_16_bits_keep_their_shades_and_bytes_stay_as_they_are() -> None:
    values = make_values("uint16", 0, 3000, 3)
    data = cv2.imencode(".png", values)[1].tobytes()  # blue first
    with pytest.raises(UnfitValuesError, match="nearly one shade"):
        decode_pixels(data)
    found = decode_pixels(data, values=ImageValues("0,3000"))
    np.testing.assert_allclose(found, restate(values[:, :, ::-1], 0, 3000), atol=1)
    buffer = io.BytesIO()
    dark = make_values("uint8", 0, 30, 3)
    Image.fromarray(dark).save(buffer, "PNG")
    for named in (AS_STORED, ImageValues("0,3000", (1, 2, 3))):
        found = decode_pixels(buffer.getvalue(), values=named)
        np.testing.assert_array_equal(found, dark.transpose(2, 0, 1))


def test_four_bands_of_bytes_are_colours_and_opacity_unless_bands_are_named() -> None:
    values = make_values("uint8", 0, 255, 4)
    data = encode_tiff(values, photometric="RGB")
    np.testing.assert_array_equal(decode_pixels(data), values[:, :, :3].transpose(2, 0, 1))
    found = decode_pixels(data, values=ImageValues(None, (4, 1, 2)))
    np.testing.assert_array_equal(found, values[:, :, [3, 0, 1]].transpose(2, 0, 1))


def test_without_rasterio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_tiff(make_values("uint16", 0, 65535, 3))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UnfitValuesError, match=r"pip install 's4g-ray\[imagery\]'"):
        decode_pixels(data)


def test_files_of_more_values_than_memory_and_damaged_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode_tiff(make_values("uint16", 0, 65535, 5))
    named = ImageValues("full", (1, 2, 3))
    assert decode_pixels(data, values=named).shape == (3, 8, 12)
    with pytest.raises(ValueError, match="damaged, or no image file"):
        decode_pixels(data[:-300], values=named)
    monkeypatch.setattr("s4g_ray.data.images.MAX_PIXELS", 8 * 12 * 5 // 3 - 1)
    with pytest.raises(ValueError, match="12 x 8 pixels in 5 bands are too many"):
        decode_pixels(data, values=named)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (ImageValues("0-3000"), "is none of: full"),
        (ImageValues("percentile:2,98"), "find their limits once, by `s4g convert stretch DATASET"),
        (ImageValues("3000,0"), "is empty"),
        (ImageValues(None, (1, 2)), "are not one or three"),
        (ImageValues(None, (0, 1, 2)), "are not one or three numbers of bands, from 1"),
    ],
)
def test_impossible_values_are_refused(named: ImageValues, message: str) -> None:
    with pytest.raises(InputError, match=message):
        named.check()
