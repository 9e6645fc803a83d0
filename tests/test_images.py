from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from s4g_ray.config import AugmentConfig, DataConfig
from s4g_ray.dataset import GeoDataset
from s4g_ray.errors import BadImageError
from s4g_ray.images import (
    PairLoader,
    augment_pair,
    coarse_dropout,
    decode,
    fit_query,
    fit_reference,
    grid_dropout,
    load_raw,
    load_view,
    look,
    recompress,
    resize,
    rotate_pair,
    turn_panorama,
)
from tests.conftest import SIZE, tile

OFF = {
    "jpeg_probability": 0.0, "color_probability": 0.0, "blur_probability": 0.0, "dropout_probability": 0.0,
    "flip_probability": 0.0, "rotate_probability": 0.0,
}  # fmt: skip


def picture(seed: int = 0) -> Tensor:
    return torch.from_numpy(tile(np.random.default_rng(seed)).copy()).permute(2, 0, 1)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(buffer, kind)
    return buffer.getvalue()


def config(**values: object) -> AugmentConfig:
    return AugmentConfig.model_validate({**OFF, **values})


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_decoding_gives_the_pixels(kind: str) -> None:
    with Image.open(io.BytesIO(encoded(kind))) as image:
        wanted = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(decode(encoded(kind)).permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 4


@pytest.mark.parametrize("data", [b"", b"no image", encoded("PNG")[:200], encoded("JPEG")[:300]])
def test_corrupt_images_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    assert np.abs(decode(buffer.getvalue())[0].numpy().astype(int) - grey // 257).max() == 0


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(picture().permute(1, 2, 0).numpy()[:, :20])
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).shape == (3, 20, 32)


def test_bytes_flipped_at_random_are_decoded_or_refused() -> None:
    good = bytearray(encoded("JPEG"))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bad = good.copy()
        for at in rng.integers(0, len(bad), 4):
            bad[at] = rng.integers(256)
        try:
            assert decode(bytes(bad)).shape[0] == 3
        except ValueError:
            refused += 1
    assert 0 < refused < 300


def test_grey_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        buffer = io.BytesIO()
        Image.new(mode, (9, 7)).save(buffer, "PNG")
        assert decode(buffer.getvalue()).shape == (3, 7, 9)


@pytest.mark.parametrize("size", [(20, 11), (64, 64), (7, 33)])
def test_resizing_is_exact_in_size_and_keeps_the_mean(size: tuple[int, int]) -> None:
    image = picture()
    small = resize(image, size)
    assert tuple(small.shape) == (3, *size)
    assert abs(small.float().mean() - image.float().mean()) < 3


@pytest.mark.parametrize("setting", ["jpeg", "color", "blur", "dropout"])
def test_each_probability_switches_its_own_operation(setting: str) -> None:
    """An argument that a library ignores would leave the image as it is, or change it although switched off."""
    query, reference = picture(1), picture(2)
    quality = {"jpeg_quality": (30, 40)} if setting == "jpeg" else {}
    on, off = config(**{f"{setting}_probability": 1.0}, **quality), config()
    rng = np.random.default_rng(4)
    changed = augment_pair(query, reference, on, rng)
    assert not torch.equal(changed[0], query)
    assert not torch.equal(changed[1], reference)
    same = augment_pair(query, reference, off, np.random.default_rng(4))
    assert torch.equal(same[0], query)
    assert torch.equal(same[1], reference)


def test_color_strength_bounds_the_change_and_jpeg_quality_orders_it() -> None:
    image = picture(3)

    def change(**values: object) -> float:
        rng = np.random.default_rng(9)
        out = [augment_pair(image, image, config(**values), rng)[0].float() - image for _ in range(20)]
        return float(torch.stack(out).abs().mean())

    weak, strong = (change(color_probability=1.0, color_strength=s) for s in (0.02, 0.3))
    assert weak < strong / 4
    fine, coarse = (change(jpeg_probability=1.0, jpeg_quality=q) for q in ((100, 100), (10, 10)))
    assert fine < coarse / 2


def test_dropout_blacks_out_what_it_says() -> None:
    white = torch.full((3, 100, 100), 255, dtype=torch.uint8)
    for seed in range(20):
        coarse = (coarse_dropout(white, np.random.default_rng(seed)) == 0).float().mean().item()
        assert 0.05 < coarse < 0.65
        grid = (grid_dropout(white, np.random.default_rng(seed)) == 0).float().mean().item()
        assert grid == pytest.approx(0.4**2, abs=0.08)
    assert (white == 255).all()


def panorama_of(reference: Tensor, width: int) -> Tensor:
    """What a camera in the middle of a north-up tile would see: column x shows azimuth (x / width - 1/2) * 360."""
    side = reference.shape[-1]
    azimuth = (np.arange(width) / width - 0.5) * 2 * np.pi
    radius = np.linspace(0.2, 0.45, 8)[:, None] * side
    rows = np.round((side - 1) / 2 - radius * np.cos(azimuth)).astype(int)
    columns = np.round((side - 1) / 2 + radius * np.sin(azimuth)).astype(int)
    return reference[:, torch.from_numpy(rows), torch.from_numpy(columns)]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_rolled_panorama_is_the_panorama_of_the_turned_tile(turns: int) -> None:
    reference = picture(5).repeat_interleave(4, 1).repeat_interleave(4, 2)
    query, turned = rotate_pair(panorama_of(reference, 360), reference, turns, "panorama")
    right = (query.float() - panorama_of(turned, 360).float()).abs().mean()
    wrong = (query.float() - panorama_of(torch.rot90(reference, -turns, (1, 2)), 360).float()).abs().mean()
    assert right < 3
    assert turns == 2 or wrong > 10 * right


def test_odd_panorama_widths_roll_to_the_nearest_column() -> None:
    panorama = torch.arange(103, dtype=torch.uint8).expand(3, 5, 103)
    query, _ = rotate_pair(panorama, picture(), 1, "panorama")
    assert query[0, 0, 0] == 26


def test_flip_and_planar_rotation_are_the_same_for_both_views() -> None:
    image = picture(6)
    for values in ({"flip_probability": 1.0}, {"rotate": "planar", "rotate_probability": 1.0}):
        query, reference = augment_pair(image, image, config(**values), np.random.default_rng(3))
        assert torch.equal(query, reference)
        assert not torch.equal(query, image)
    query, reference = augment_pair(
        image, image, config(rotate="reference", rotate_probability=1.0), np.random.default_rng(3)
    )
    assert torch.equal(query, image)
    assert not torch.equal(reference, image)
    with pytest.raises(ValueError, match="square"):
        rotate_pair(image, image[:, :, :20], 1, "reference")


def loader(dataset: GeoDataset, threads: int, **data: object) -> PairLoader:
    cfg = DataConfig.model_validate(
        {"uri": dataset.uri, "query_size": (SIZE, SIZE), "reference_size": (SIZE, SIZE), **data}
    )
    tables = dataset.table("queries", ["train"]), dataset.table("references", ["train"])
    return PairLoader(*tables, cfg, AugmentConfig(), seed=1, num_threads=threads)


def test_a_pair_looks_the_same_whatever_loads_it(synthetic: GeoDataset) -> None:
    ids = np.arange(12).reshape(3, 4)
    one = list(loader(synthetic, 1).load(ids, ids, epoch=2))
    three = list(loader(synthetic, 3).load(ids, ids, epoch=2))
    halves = list(loader(synthetic, 2).load(ids[:, 2:], ids[:, 2:], epoch=2))
    other = list(loader(synthetic, 1).load(ids, ids, epoch=3))
    for a, b, half, c in zip(one, three, halves, other, strict=True):
        assert torch.equal(a.queries, b.queries)
        assert torch.equal(a.references, b.references)
        assert torch.equal(a.references[2:], half.references)
        assert not torch.equal(a.queries, c.queries)
    assert [batch.number for batch in three] == [0, 1, 2]


def test_a_corrupt_image_fails_by_name_or_masks_its_pair(synthetic: GeoDataset, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n")
    ids = np.arange(4).reshape(1, 4)

    def load(mode: str) -> PairLoader:
        made = loader(synthetic, 1, on_bad_image=mode)
        made.queries.uris[2] = str(broken)
        return made

    with pytest.raises(BadImageError, match=r"id 2, .*broken\.png"):
        list(load("fail").load(ids, ids, epoch=1))
    (batch,) = load("skip").load(ids, ids, epoch=1)
    assert batch.valid.tolist() == [True, True, False, True]
    assert "broken.png" in batch.bad_images[0]
    missing = loader(synthetic, 1)
    missing.references.uris[0] = str(tmp_path / "none.png")
    with pytest.raises(BadImageError, match="FileNotFoundError"):
        list(missing.load(ids, ids, epoch=1))


def marked_tile(side: int, azimuth_deg: float) -> Tensor:
    """A dark north-up tile with a bright spot at an azimuth from its centre."""
    tile = torch.zeros(3, side, side, dtype=torch.uint8)
    row = (side - 1) / 2 - 0.35 * side * np.cos(np.radians(azimuth_deg))
    column = (side - 1) / 2 + 0.35 * side * np.sin(np.radians(azimuth_deg))
    tile[:, round(row) - 1 : round(row) + 2, round(column) - 1 : round(column) + 2] = 255
    return tile


def marked_panorama(width: int, azimuth_deg: float) -> Tensor:
    """A dark panorama whose centre column looks north, with a bright column at an azimuth."""
    panorama = torch.zeros(3, 6, width, dtype=torch.uint8)
    panorama[:, :, round((azimuth_deg / 360 + 0.5) * width) % width] = 255
    return panorama


def azimuth_in_tile(tile: Tensor) -> float:
    row, column = (x.float().mean().item() - (tile.shape[-1] - 1) / 2 for x in torch.nonzero(tile[0], as_tuple=True))
    return float(np.degrees(np.arctan2(column, -row)))


def azimuth_in_panorama(panorama: Tensor) -> float:
    return ((torch.nonzero(panorama[0, 0]).float().mean().item()) / panorama.shape[-1] - 0.5) * 360


@pytest.mark.parametrize("width", [360, 361, 767, 102])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("azimuth", [-120.0, 10.0, 75.0])
def test_a_bearing_marked_in_both_views_stays_matched_when_both_turn(width: int, turns: int, azimuth: float) -> None:
    panorama, tile = rotate_pair(marked_panorama(width, azimuth), marked_tile(121, azimuth), turns, "panorama")
    column = 360 / width
    difference = (azimuth_in_panorama(panorama) - azimuth_in_tile(tile) + 180) % 360 - 180
    assert abs(difference) <= column + 1.0  # a column, and the spot's own pixels
    turned = (azimuth_in_tile(tile) - azimuth + 180) % 360 - 180
    assert abs((turned + 90 * turns + 180) % 360 - 180) < 1.0  # counter-clockwise


@pytest.mark.parametrize("azimuth", [-120.0, 10.0, 75.0])
def test_a_bearing_stays_matched_when_both_views_are_flipped(azimuth: float) -> None:
    panorama, tile = augment_pair(
        marked_panorama(361, azimuth), marked_tile(121, azimuth), config(flip_probability=1.0), np.random.default_rng(0)
    )
    assert abs(azimuth_in_tile(tile) + azimuth) < 1.0
    assert abs(azimuth_in_panorama(panorama) - azimuth_in_tile(tile)) <= 2 * 360 / 361 + 1.0


@pytest.mark.parametrize("width", [64, 77])
@pytest.mark.parametrize("heading", [0.0, 90.0, 200.0, -45.0])
def test_a_known_heading_turns_the_panorama_to_the_north(width: int, heading: float) -> None:
    """The panorama's centre looks at `heading`; a mark in the north must come to its centre."""
    found = azimuth_in_panorama(turn_panorama(marked_panorama(width, -heading), heading))
    assert abs((found + 180) % 360 - 180) <= 1.5 * 360 / width


@pytest.mark.parametrize(("width", "fov", "wanted"), [(64, 360, 64), (64, 90, 16), (77, 180, 38), (101, 70, 20)])
def test_a_field_of_view_is_the_middle_part(width: int, fov: float, wanted: int) -> None:
    data = DataConfig(uri="x", query_size=(8, width), query_fov_deg=fov)
    panorama = torch.arange(width, dtype=torch.uint8).expand(3, 8, width)
    seen = look(panorama, data, np.random.default_rng(0))
    assert tuple(seen.shape[-2:]) == data.visible_query_size == (8, wanted)
    columns = seen[0, 0].tolist()
    assert columns == list(range(columns[0], columns[0] + wanted))
    assert abs((columns[0] + columns[-1]) - (width - 1)) <= 1


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
    starts = {int(look(panorama, wide, rng)[0, 0, 0]) for _ in range(600)}
    assert len(starts) == 64


def test_headings_are_used_only_when_asked_for_and_must_be_there(synthetic: GeoDataset) -> None:
    table = synthetic.table("queries", ["train"])
    table.headings[:] = [90.0] * 95 + [np.nan]
    sizes = {"uri": "x", "query_size": (SIZE, SIZE)}
    as_is = load_view(table, 0, "queries", DataConfig.model_validate(sizes), seed=0)
    known = DataConfig.model_validate({**sizes, "query_heading": "known"})
    assert torch.equal(load_view(table, 0, "queries", known, seed=0), torch.roll(as_is, SIZE // 4, -1))
    with pytest.raises(ValueError, match="no heading_deg"):
        load_view(table, 95, "queries", known, seed=0)


@pytest.mark.parametrize("height", [16, 17])
def test_a_cut_takes_rows_from_the_top_and_the_bottom(height: int, tmp_path: Path, synthetic: GeoDataset) -> None:
    grey = np.repeat(np.arange(height, dtype=np.uint8)[:, None] * 10, 12, axis=1)
    Image.fromarray(grey).save(tmp_path / "rows.png")
    table = synthetic.table("queries", ["train"])
    table.uris[0] = str(tmp_path / "rows.png")
    data = DataConfig(uri="x", query_size=(height - 8, 12), query_cut=0.25)
    rows = fit_query(load_raw(table, 0), data, 0.0)[0, :, 0]
    assert rows.tolist() == [10 * i for i in range(4, height - 4)]


def test_a_training_panorama_is_cropped_after_it_rolled_with_its_tile(synthetic: GeoDataset) -> None:
    cfg = DataConfig(uri="x", query_size=(SIZE, SIZE), reference_size=(SIZE, SIZE), query_fov_deg=90)
    tables = synthetic.table("queries", ["train"]), synthetic.table("references", ["train"])
    turn = config(rotate="panorama", rotate_probability=1.0)
    made = PairLoader(*tables, cfg, turn, seed=1, num_threads=1)
    ids = np.arange(4).reshape(1, 4)
    (batch,) = made.load(ids, ids, epoch=1)
    assert tuple(batch.queries.shape) == (4, 3, SIZE, SIZE // 4)
    for row in range(4):
        whole, tile = load_raw(tables[0], row), fit_reference(load_raw(tables[1], row), cfg)
        turns = [k for k in (1, 2, 3) if torch.equal(torch.rot90(tile, k, (-2, -1)), batch.references[row])]
        assert len(turns) == 1
        rolled = torch.roll(whole, -turns[0] * SIZE // 4, -1)
        assert torch.equal(batch.queries[row], rolled[..., SIZE * 3 // 8 : SIZE * 5 // 8])


def test_resizing_without_antialiasing_interpolates_between_the_nearest_pixels() -> None:
    """What the published code's resizing does: bilinear, pixel centres aligned, nothing averaged."""
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = resize(image, (16, 25), antialias=False).numpy().astype(float)
    source = image.numpy().astype(float)
    for row, column in ((0, 0), (7, 12), (15, 24), (3, 20)):
        y, x = (row + 0.5) * 40 / 16 - 0.5, (column + 0.5) * 60 / 25 - 0.5
        top, left = int(y), int(x)
        patch = source[:, top : top + 2, left : left + 2]
        upper = patch[:, 0, 0] * (1 - (x - left)) + patch[:, 0, 1] * (x - left)
        lower = patch[:, 1, 0] * (1 - (x - left)) + patch[:, 1, 1] * (x - left)
        assert np.abs(out[:, row, column] - (upper * (1 - (y - top)) + lower * (y - top))).max() <= 1
    smooth = resize(image, (16, 25)).numpy().astype(float)
    assert smooth.std() < out.std() * 0.9


def test_jpeg_compression_comes_before_the_image_is_sized(synthetic: GeoDataset) -> None:
    cfg = config(jpeg_probability=1.0, jpeg_quality=(20, 20))
    big = picture(1).repeat_interleave(4, 1).repeat_interleave(4, 2)

    def small(image: Tensor) -> Tensor:
        return resize(image, (24, 24))

    query, _ = augment_pair(big, big, cfg, np.random.default_rng(0), (small, small))
    assert torch.equal(query, small(recompress(big, 20)))
    assert not torch.equal(query, recompress(small(big), 20))


def test_the_query_alone_turns_where_it_is_the_one_without_a_known_orientation() -> None:
    query, reference = rotate_pair(picture(1), picture(2), 3, "query")
    assert torch.equal(query, torch.rot90(picture(1), 3, (-2, -1)))
    assert torch.equal(reference, picture(2))
    with pytest.raises(ValueError, match="square"):
        rotate_pair(picture(1)[:, :, :20], picture(2), 1, "query")
