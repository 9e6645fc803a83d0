"""Photos are read upright, with what their EXIF tags say; bad ones with their reason."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import IFDRational

from s4g_ray.data.images import decode_pixels
from s4g_ray.data.photos.exif import ExifPosition
from s4g_ray.data.pixels.image_values import ImageValues
from s4g_ray.errors import BadImageError, StoreError
from s4g_ray.gallery.photos.photo import decode_photo, read_photo, shrink
from s4g_ray.gallery.photos.turned_views import turn_photo
from tests.support.tiny_gallery import make_ground

GPS = ExifTags.GPS


def encode(form: str = "JPEG", *, size: tuple[int, int] = (96, 64), **options: Any) -> bytes:
    picture = Image.fromarray(make_ground()).resize(size, Image.Resampling.BICUBIC)
    data = io.BytesIO()
    picture.save(data, form, **options)
    return data.getvalue()


def exif_of(orientation: int = 1, gps: dict[int, Any] | None = None) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    if gps is not None:
        exif[ExifTags.IFD.GPSInfo] = gps
    return exif


ZURICH: dict[int, Any] = {
    GPS.GPSLatitudeRef: "N",
    GPS.GPSLatitude: (47.0, 22.0, 30.0),
    GPS.GPSLongitudeRef: "W",
    GPS.GPSLongitude: (8.0, 30.0, 0.0),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_are_upright_as_pillow_turns_them(form: str, orientation: int) -> None:
    data = encode(form, exif=exif_of(orientation))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    photo = decode_photo(data)
    assert photo.pixels is not None
    assert photo.pixels.shape == expected.shape
    assert np.abs(photo.pixels.astype(int) - expected).max() <= 2  # of two JPEG decoders


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_large_photos_are_reduced_but_not_below_what_suffices(form: str, orientation: int) -> None:
    data = encode(form, size=(960, 320), exif=exif_of(orientation))
    whole = decode_photo(data).pixels
    assert whole is not None
    least = (70, 100) if orientation == 1 else (100, 70)
    reduced = decode_photo(data, least=least).pixels
    assert reduced is not None
    assert reduced.shape == (whole.shape[0] // 4, whole.shape[1] // 4, 3)
    means = whole.reshape(reduced.shape[0], 4, reduced.shape[1], 4, 3).mean(axis=(1, 3))
    assert np.abs(reduced - means).mean() < 1
    assert decode_photo(data, least=(500, 500)).pixels is not None
    assert decode_photo(data, least=(500, 500)).pixels.shape == whole.shape  # type: ignore[union-attr]


def test_other_modes_are_as_images_of_data_sets() -> None:
    grey = io.BytesIO()
    Image.fromarray(make_ground()).convert("L").save(grey, "JPEG")
    for data in (grey.getvalue(), encode("GIF"), encode("BMP")):
        pixels = decode_photo(data).pixels
        assert pixels is not None
        np.testing.assert_array_equal(pixels, decode_pixels(data).transpose(1, 2, 0))


def test_the_position_and_the_heading_are_read() -> None:
    gps = {**ZURICH, GPS.GPSImgDirection: 271.5, GPS.GPSImgDirectionRef: "M"}
    for form in ("JPEG", "PNG", "WEBP"):
        photo = decode_photo(encode(form, exif=exif_of(1, gps)))
        assert photo.exif == ExifPosition(47.375, -8.5, 271.5, is_magnetic=True)


@pytest.mark.parametrize(
    "gps",
    [
        None,
        {},
        {GPS.GPSLatitude: (47.0, 0.0, 0.0)},
        {**ZURICH, GPS.GPSLatitude: (95.0, 0.0, 0.0)},
        {**ZURICH, GPS.GPSLatitude: (IFDRational(1, 0), 0.0, 0.0)},
        {**ZURICH, GPS.GPSLatitude: (0.0, 0.0, 0.0), GPS.GPSLongitude: (0.0, 0.0, 0.0)},
    ],
)
def test_a_missing_or_damaged_position_is_none(gps: dict[int, Any] | None) -> None:
    assert decode_photo(encode(exif=exif_of(1, gps))).exif is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_picture() -> None:
    data = encode(exif=exif_of(1, ZURICH))
    start = data.index(b"Exif")
    torn = data[: start + 14] + b"\xff" * 30 + data[start + 44 :]
    photo = decode_photo(torn)
    assert photo.exif is None
    assert photo.pixels is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image file"),
        (encode()[:700], r": the file is damaged or cut short \(image file is truncated"),
        (encode("PNG")[:20], r": the file is damaged or cut short \("),
        (b"\x00\x00\x00\x18ftypheic" + b"\x00" * 40, "."),
    ],
)
def test_bad_files_are_refused_with_their_name(data: bytes, message: str) -> None:
    with pytest.raises(BadImageError, match=message) as error:
        decode_photo(data, "in/a.jpg")
    assert str(error.value).startswith("in/a.jpg: ")


def encode_bands(values: NDArray[Any]) -> bytes:
    """A TIFF of values[H, W, C] (TIFF 6.0), uncompressed, dark values being 0."""
    height, width, bands = values.shape
    kinds = {"u": 1, "i": 2, "f": 3}
    entries = [
        (256, width),
        (257, height),
        (258, 8 * values.dtype.itemsize),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, bands),
        (278, height),
        (279, values.nbytes),
        (339, kinds[values.dtype.kind]),
    ]
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries]
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)


def test_sixteen_bits_of_grey_are_read_and_other_values_refused_with_a_remedy(
    capfd: pytest.CaptureFixture[str],
) -> None:
    ramp = np.arange(24 * 32).reshape(24, 32, 1) * 80
    photo = decode_photo(encode_bands(ramp.astype(np.uint16)))
    assert photo.pixels is not None
    np.testing.assert_array_equal(photo.pixels, np.repeat(np.round(ramp / 257), 3, axis=2))
    for values in (
        ramp.astype(np.float32),
        np.repeat(ramp, 3, axis=2).astype(np.float32),
        np.repeat(ramp // 20, 3, axis=2).astype(np.int16),
        np.repeat(ramp, 7, axis=2).astype(np.uint16),
    ):
        with pytest.raises(BadImageError, match=r"^a: .*data\.(stretch|bands)=.*gdal_translate"):
            decode_photo(encode_bands(values), "a")
    named = ImageValues(f"0,{ramp.max()}", (3, 2, 1))
    for values in (ramp.astype(np.float32), np.repeat(ramp, 7, axis=2).astype(np.uint16)):
        photo = decode_photo(encode_bands(values), "a", values=named)
        assert photo.pixels is not None
        wanted = np.repeat(np.round(ramp / ramp.max() * 255), 3, axis=2)
        np.testing.assert_allclose(photo.pixels, wanted, atol=1)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_tiff_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    data = io.BytesIO()
    Image.fromarray(make_ground()).convert("1").save(data, "TIFF", compression="group4")
    damaged = bytearray(data.getvalue())
    damaged[100:400] = bytes(range(256))[:300] + bytes(44)
    decode_photo(bytes(damaged))  # libtiff leaves bad rows as they are
    assert capfd.readouterr() == ("", "")


def test_more_pixels_than_memory_are_refused_by_the_header() -> None:
    bomb = bytearray(encode("BMP"))
    bomb[18:26] = (30_000).to_bytes(4, "little") + (30_000).to_bytes(4, "little")
    with pytest.raises(BadImageError, match="pixels"):
        decode_photo(bytes(bomb))


def test_reading_keeps_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"text")
    bad = read_photo(str(tmp_path / "a.jpg"))
    assert (bad.name, bad.error) == (
        str(tmp_path / "a.jpg"),
        "not an image file of a known format",
    )
    missing = read_photo(str(tmp_path / "b.jpg"))
    assert missing.error is not None
    assert missing.error == "the file cannot be opened: No such file or directory"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.jpg/b.jpg", "Not a directory"),
        (f"{'x' * 300}.jpg", "File name too long"),
        ("foo://a.jpg", "foo://a.jpg: Protocol not known"),
        ("ftp://127.0.0.1:9/a.jpg", "Connection refused"),
        ("a\0.jpg", "embedded null byte"),
    ],
)
def test_a_photo_that_cannot_be_opened_holds_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"text")
    monkeypatch.chdir(tmp_path)
    photo = read_photo(name)
    assert (photo.name, photo.pixels) == (name, None)
    assert str(photo.error).startswith(f"the file cannot be opened: {reason}")


def test_an_outage_of_a_store_is_no_error_of_a_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> bytes:
        raise StoreError(f"{uri}: no answer")

    monkeypatch.setattr("s4g_ray.storage.files.read_bytes", fail)
    with pytest.raises(StoreError):
        read_photo("s3://data/a.jpg")


def test_heic_photos_are_read(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    picture = Image.fromarray(make_ground()).resize((96, 64))
    # the orientation in its EXIF tags means nothing: HEIF has one of its own
    picture.save(tmp_path / "a.heic", exif=exif_of(6, ZURICH), quality=95)
    photo = read_photo(str(tmp_path / "a.heic"))
    assert photo.error is None
    assert photo.pixels is not None
    assert photo.pixels.shape == (64, 96, 3)
    assert np.abs(photo.pixels.astype(int) - np.asarray(picture)).mean() < 15
    assert photo.exif is not None
    assert photo.exif.lat == pytest.approx(47.375)


def test_heic_without_its_library_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + b"\x00" * 40)
    error = read_photo(str(tmp_path / "a.heic")).error
    assert error is not None
    assert "pip install 's4g-ray[heic]'" in error


def test_shrinking_leaves_small_pictures() -> None:
    ground = make_ground()
    assert shrink(ground, None) is ground
    assert shrink(ground, (ground.shape[0], 1)) is ground


def test_long_pictures_take_no_more_memory_than_others() -> None:
    long = np.zeros((2, 60_000, 3), np.uint8)
    assert shrink(long, (64, 64)).shape == (2, 65, 3)
    assert shrink(np.ascontiguousarray(long.transpose(1, 0, 2)), (64, 64)).shape == (65, 2, 3)
    assert turn_photo(shrink(long, (64, 64)), 45, "overhead").shape == (2, 65, 3)
    assert turn_photo(long[:1, :1], 45, "overhead").shape == (1, 1, 3)
