from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import resize as torchvision_resize

from s4g_ray.config.data_schema import DataConfig, format_fov
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import View
from s4g_ray.data.images import (
    READ_AT_ONCE,
    crop_field_of_view,
    decode,
    decode_pixels,
    fit_query,
    load_pixels,
    load_raw,
    load_raws,
    load_view,
    load_views,
    resize,
)
from s4g_ray.errors import BadImageError
from tests.conftest import SIZE
from tests.support.sample_images import encode_image, make_image, with_uris


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_decoding_gives_the_pixels(kind: str) -> None:
    with Image.open(io.BytesIO(encode_image(kind))) as image:
        wanted = np.asarray(image.convert("RGB")).astype(int)
    assert (
        np.abs(decode(encode_image(kind)).permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 4
    )


@pytest.mark.parametrize(
    "data", [b"", b"no image", encode_image("PNG")[:200], encode_image("JPEG")[:300]]
)
def test_corrupt_images_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    wanted = np.round(grey / 257).astype(int)
    assert (decode(buffer.getvalue())[0].numpy() == wanted).all()


def test_heic_photos_are_decoded_and_their_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    picture = Image.fromarray(make_image().numpy().transpose(1, 2, 0)).rotate(90, expand=True)
    buffer = io.BytesIO()
    picture.save(buffer, "HEIF", quality=95)
    found = decode_pixels(buffer.getvalue()).transpose(1, 2, 0)
    assert found.shape == np.asarray(picture).shape
    assert np.abs(np.subtract(found, np.asarray(picture), dtype=float)).mean() < 6
    with pytest.raises(ValueError, match="Error: "):
        decode_pixels(buffer.getvalue()[:-100])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"^a HEIC photo needs .* 's4g-ray\[heic\]'"):
        decode_pixels(buffer.getvalue())


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(make_image().permute(1, 2, 0).numpy()[:, :20])
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).shape == (3, 20, 32)


def test_a_jpeg_is_decoded_into_memory_of_its_size_and_other_images_are_not() -> None:
    for kind in ("JPEG", "PNG"):
        data = encode_image(kind)
        wanted = decode_pixels(data)
        _, height, width = wanted.shape
        fitting = np.zeros((height, width, 3), dtype=np.uint8)
        for target in (fitting, np.zeros((height, width + 1, 3), dtype=np.uint8)):
            found = decode_pixels(data, target)
            assert (found == wanted).all()
            is_there = kind == "JPEG" and target is fitting
            assert np.shares_memory(found, target) == is_there
            assert (target == np.moveaxis(found, 0, -1)).all() if is_there else not target.any()


def decode_with_pillow(data: bytes) -> Tensor | None:
    """Decode a file with Pillow alone; None where Pillow refuses it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(
                np.array(ImageOps.exif_transpose(image).convert("RGB"))
            ).permute(2, 0, 1)
    except Exception:
        return None


def test_files_with_changed_bytes_are_decoded_or_refused_as_by_pillow() -> None:
    good = bytearray(encode_image("JPEG"))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bad = good.copy()
        for at in rng.integers(0, len(bad), 4):
            bad[at] = rng.integers(256)
        wanted = decode_with_pillow(bytes(bad))
        if wanted is None:
            refused += 1
            with pytest.raises(ValueError):
                decode(bytes(bad))
        else:
            assert torch.equal(decode(bytes(bad)), wanted)
    assert 0 < refused < 300


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
def test_a_truncated_jpeg_is_refused(cut: float) -> None:
    data = encode_image("JPEG", quality=95)
    with pytest.raises(ValueError, match=r"(?i)truncated"):
        decode(data[: int(cut * len(data))])


JPEGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fine": {"quality": 95, "subsampling": 0},
    "wide": {"subsampling": 1},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "rgb": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 1},
    "commented": {"comment": b"Exif"},
    "dense": {"dpi": (300, 300)},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_every_kind_of_jpeg_is_decoded_as_by_pillow(kind: str) -> None:
    data = encode_image("JPEG", **JPEGS[kind])
    wanted = decode_with_pillow(data)
    assert wanted is not None
    assert torch.equal(decode(data), wanted)


def test_a_plain_jpeg_is_not_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_image("JPEG")

    def slow(self: Image.Image) -> None:
        raise AssertionError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", slow)
    assert decode(data).shape == (3, SIZE, SIZE)


def test_grey_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        buffer = io.BytesIO()
        Image.new(mode, (9, 7)).save(buffer, "PNG")
        assert decode(buffer.getvalue()).shape == (3, 7, 9)


@pytest.mark.parametrize("size", [(20, 11), (64, 64), (7, 33)])
def test_resizing_is_exact_in_size_and_keeps_the_mean(size: tuple[int, int]) -> None:
    image = make_image()
    small = resize(image, size)
    assert tuple(small.shape) == (3, *size)
    assert abs(small.float().mean() - image.float().mean()) < 3


@pytest.mark.parametrize(
    ("width", "fov", "wanted"), [(64, 360, 64), (64, 90, 16), (77, 180, 38), (101, 70, 20)]
)
def test_a_field_of_view_is_the_middle_part(width: int, fov: float, wanted: int) -> None:
    data = DataConfig(uri="x", query_size=(8, width), query_fov_deg=fov)
    panorama = torch.arange(width, dtype=torch.uint8).expand(3, 8, width)
    seen = crop_field_of_view(panorama, data, np.random.default_rng(0))
    assert tuple(seen.shape[-2:]) == data.visible_query_size == (8, wanted)
    columns = seen[0, 0].tolist()
    assert columns == list(range(columns[0], columns[0] + wanted))
    assert abs((columns[0] + columns[-1]) - (width - 1)) <= 1


def test_views_of_a_range_keep_their_size_scale_and_middle_and_are_black_outside() -> None:
    """As cropping by a plain loop: each view is the crop of one number, with black beside it."""
    panorama = torch.arange(1, 129, dtype=torch.uint8).expand(3, 8, 128)
    data = DataConfig(uri="x", query_size=(8, 128), query_fov_deg=(70, 360))
    assert data.visible_query_size == (8, 128)
    widths = []
    for number in range(400):
        seen = crop_field_of_view(panorama, data, np.random.default_rng(number))
        assert tuple(seen.shape) == (3, 8, 128)
        visible = seen[0, 0].nonzero()[:, 0].tolist()
        widths.append(len(visible))
        one = data.model_copy(update={"query_fov_deg": len(visible) * 360 / 128})
        crop = crop_field_of_view(panorama, one, np.random.default_rng(0))
        assert torch.equal(seen[..., visible[0] : visible[-1] + 1], crop)
        assert seen.sum() == crop.sum(dtype=torch.int64)
    # uniform from 70 degrees, 25 columns, to 360
    assert (min(widths), max(widths)) == (25, 128)
    counts = np.histogram(widths, 4, (24.5, 128.5))[0]
    assert np.abs(counts - 100).max() < 40
    both = data.model_copy(update={"query_heading": "random"})
    centres = set()
    for number in range(400):
        seen = crop_field_of_view(panorama, both, np.random.default_rng(number))[0, 0]
        centres.add(int(seen[64]))
    assert len(centres) > 110


def test_one_field_of_view_is_shown_as_those_of_training() -> None:
    cropped = DataConfig(uri="x", query_size=(8, 128), query_fov_deg=180)
    padded = DataConfig(uri="x", query_size=(8, 128), query_fov_deg=(70, 360))
    panorama = torch.full((3, 8, 128), 9, dtype=torch.uint8)
    for data, width in ((cropped, 32), (padded, 128)):
        one = data.model_copy(update={"query_fov_deg": data.with_fov(90.0)})
        assert one.visible_query_size == (8, width)
        seen = crop_field_of_view(panorama, one, np.random.default_rng(0))
        assert tuple(seen.shape) == (3, 8, width)
        assert seen.count_nonzero() == 3 * 8 * 32
    assert [format_fov(fov) for fov in (90, (90.0, 90.0), (70.0, 360.0))] == ["90", "90", "70-360"]


def test_random_headings_are_seeded_by_query_and_cover_the_circle(synthetic: GeoDataset) -> None:
    table = synthetic.table("queries", ["train"])
    data = DataConfig(uri="x", query_size=(SIZE, SIZE), query_heading="random", query_fov_deg=180)
    views = [load_view(table, row, "queries", data, seed=1) for row in (0, 0, 1)]
    assert torch.equal(views[0], views[1])
    assert tuple(views[0].shape) == (3, SIZE, SIZE // 2)
    other_seed = load_view(table, 0, "queries", data, seed=2)
    assert not torch.equal(views[0], other_seed)
    panorama = torch.arange(64, dtype=torch.uint8).expand(3, 8, 64)
    rng = np.random.default_rng(0)
    wide = data.model_copy(update={"query_size": (8, 64)})
    starts = {int(crop_field_of_view(panorama, wide, rng)[0, 0, 0]) for _ in range(600)}
    assert len(starts) == 64


def test_headings_are_used_only_when_configured_and_are_then_required(
    synthetic: GeoDataset,
) -> None:
    table = synthetic.table("queries", ["train"])
    table = replace(table, headings=np.array([90.0] * 95 + [np.nan], dtype=np.float32))
    sizes = {"uri": "x", "query_size": (SIZE, SIZE)}
    as_is = load_view(table, 0, "queries", DataConfig.model_validate(sizes), seed=0)
    known = DataConfig.model_validate({**sizes, "query_heading": "known"})
    assert torch.equal(
        load_view(table, 0, "queries", known, seed=0), torch.roll(as_is, SIZE // 4, -1)
    )
    with pytest.raises(ValueError, match="no heading_deg"):
        load_view(table, 95, "queries", known, seed=0)


@pytest.mark.parametrize("height", [16, 17])
def test_a_cut_takes_rows_from_the_top_and_the_bottom(
    height: int, tmp_path: Path, synthetic: GeoDataset
) -> None:
    grey = np.repeat(np.arange(height, dtype=np.uint8)[:, None] * 10, 12, axis=1)
    Image.fromarray(grey).save(tmp_path / "rows.png")
    table = with_uris(synthetic.table("queries", ["train"]), {0: tmp_path / "rows.png"})
    data = DataConfig(uri="x", query_size=(height - 8, 12), query_cut=0.25)
    rows = fit_query(load_raw(table, 0), data, 0.0)[0, :, 0]
    assert rows.tolist() == [10 * i for i in range(4, height - 4)]


def test_resizing_without_antialiasing_interpolates_between_the_nearest_pixels() -> None:
    """As the published code resizes: bilinear, pixel centres aligned, nothing averaged."""
    image = torch.randint(
        0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    out = resize(image, (16, 25), antialias=False).numpy().astype(float)
    source = image.numpy().astype(float)
    for row, column in ((0, 0), (7, 12), (15, 24), (3, 20)):
        y = (row + 0.5) * 40 / 16 - 0.5
        x = (column + 0.5) * 60 / 25 - 0.5
        top = int(y)
        left = int(x)
        patch = source[:, top : top + 2, left : left + 2]
        upper = patch[:, 0, 0] * (1 - (x - left)) + patch[:, 0, 1] * (x - left)
        lower = patch[:, 1, 0] * (1 - (x - left)) + patch[:, 1, 1] * (x - left)
        wanted = upper * (1 - (y - top)) + lower * (y - top)
        assert np.abs(out[:, row, column] - wanted).max() <= 1
    smooth = resize(image, (16, 25)).numpy().astype(float)
    assert smooth.std() < out.std() * 0.9


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(140, 60), (21, 33), (64, 64)])
def test_resizing_decoded_pixels_equals_torchvisions_resizing_of_planes(
    size: tuple[int, int], antialias: bool
) -> None:
    """torch resizes interleaved pixels by other code than planes."""
    image = torch.randint(
        0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    wanted = torchvision_resize(image, list(size), antialias=antialias)
    assert (resize(interleaved, size, antialias=antialias).int() - wanted.int()).abs().max() <= 1


def test_images_of_many_rows_equal_those_read_one_row_at_a_time(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    table = synthetic.table("queries", ["train"])
    packed = [Path(uri).read_bytes() for uri in table.uris[:3]]
    (tmp_path / "packed").write_bytes(b"".join(packed))
    offsets = np.full(len(table), -1)
    offsets[:3] = np.cumsum([0, *map(len, packed[:2])])
    lengths = np.full(len(table), -1)
    lengths[:3] = [*map(len, packed[:2]), 10**9]
    changed = dict.fromkeys(range(3), tmp_path / "packed") | {5: tmp_path / "none.png"}
    table = replace(with_uris(table, changed), offsets=offsets, lengths=lengths)
    rows = [*range(len(table)), 1, 0]
    assert len(rows) > READ_AT_ONCE
    data = DataConfig(uri="x", query_size=(16, 24), query_heading="random")
    for row, raw, view in zip(
        rows, load_raws(table, rows), load_views(table, rows, "queries", data, seed=1), strict=True
    ):
        if row in (2, 5):
            with pytest.raises(BadImageError) as caught:
                load_raw(table, row)
            assert str(raw) == str(view) == str(caught.value)
            assert ("FileNotFoundError" if row == 5 else "1000000000 bytes wanted") in str(raw)
        else:
            assert isinstance(raw, Tensor)
            assert isinstance(view, Tensor)
            assert torch.equal(raw, load_raw(table, row))
            assert torch.equal(view, load_view(table, row, "queries", data, seed=1))


STORED: dict[str, Any] = {"query_size": (SIZE, SIZE), "reference_size": (SIZE, SIZE)}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"query_size": (SIZE, 16), "reference_size": (24, SIZE)},
        {"query_cut": 0.1},
        {"query_heading": "random"},
        {"query_fov_deg": 180},
        {"query_fov_deg": [90, 360]},
        {"query_fov_deg": [360, 360]},
    ],
)
def test_pixels_equal_the_views(
    synthetic: GeoDataset, tmp_path: Path, keys: dict[str, Any]
) -> None:
    data = DataConfig.model_validate({"uri": "x", **STORED, **keys})
    views: tuple[View, ...] = ("references", "queries")
    for view in views:
        table = with_uris(synthetic.table(view, ["test"]), {3: tmp_path / "none.png"})
        rows = range(len(table))
        wanted = load_views(table, rows, view, data, seed=5)
        found = list(load_pixels(table, rows, view, data, seed=5))
        assert [str(image) for image in found if isinstance(image, BadImageError)] == [
            str(wanted[3])
        ]
        for image, seen in zip(found, wanted, strict=True):
            if not isinstance(image, BadImageError):
                assert isinstance(seen, Tensor)
                assert np.array_equal(image, seen.numpy())
