"""Locating photos: turns, areas, candidates on the ground, answers of bad photos."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from s4g_ray.data.area import Area
from s4g_ray.data.sphere import metres_between
from s4g_ray.errors import InputError, RunError
from s4g_ray.gallery.calibration import Calibration, NoneModel
from s4g_ray.gallery.locate import DEPTH, locate, locate_files, needed_size
from s4g_ray.gallery.photos.photo import Photo
from s4g_ray.gallery.search.appearance import Appearance, describe_look
from s4g_ray.gallery.search.options import LocateOptions
from tests.support.tiny_gallery import COLUMNS, PIXELS, SIZE_M, TinyGallery, position_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> TinyGallery:
    return TinyGallery(tmp_path_factory.mktemp("gallery"))


def ask(gallery: TinyGallery, images: list[Any], **options: Any) -> list[Any]:
    return locate(gallery, images, **options)  # type: ignore[arg-type]


def png(pixels: NDArray[np.uint8], exif: Image.Exif | None = None) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", **({"exif": exif} if exif else {}))
    return data.getvalue()


def gps(lat: float, lon: float) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.IFD.GPSInfo] = {
        ExifTags.GPS.GPSLatitudeRef: "N",
        ExifTags.GPS.GPSLatitude: (lat, 0.0, 0.0),
        ExifTags.GPS.GPSLongitudeRef: "E",
        ExifTags.GPS.GPSLongitude: (lon, 0.0, 0.0),
    }
    return exif


def test_a_tile_finds_itself_and_says_that_nothing_is_calibrated(gallery: TinyGallery) -> None:
    (answer,) = ask(gallery, [gallery.images[19]], top=3)
    best = answer.candidates[0]
    assert best.id == 119
    assert best.score == pytest.approx(1, abs=1e-5)
    assert (best.probability, answer.radius_50_m, answer.radius_90_m) == (None, None, None)
    assert "not calibrated" in answer.note
    assert answer.is_located
    assert len(answer.candidates) == 3
    away = metres_between(answer.lat, answer.lon, best.lat, best.lon)
    assert away < SIZE_M / 2


def test_candidates_are_whole_groups_of_overlapping_cells(gallery: TinyGallery) -> None:
    """Compared with a nested loop over pairs of the tiles that are searched."""
    (answer,) = ask(gallery, [gallery.images[19]], top=5)
    ids, _ = gallery.search(gallery.encode([gallery.images[19]]), 5 * DEPTH)
    free = ids[0].tolist()
    lat = dict(zip(gallery.tiles.ids, gallery.tiles.lat, strict=True))
    lon = dict(zip(gallery.tiles.ids, gallery.tiles.lon, strict=True))
    expected: list[tuple[int, ...]] = []
    while len(expected) < 5:
        best = free[0]
        joined = [
            other
            for other in free
            if metres_between(lat[best], lon[best], lat[other], lon[other]) < 0.55 * SIZE_M
        ]
        expected.append(tuple(joined))
        free = [other for other in free if other not in joined]
    assert [candidate.cells for candidate in answer.candidates] == expected
    assert {*expected[0]} == {119, 118, 120, 119 - COLUMNS, 119 + COLUMNS}


def test_each_tile_belongs_to_one_candidate_and_all_tiles_are_found(gallery: TinyGallery) -> None:
    (answer,) = ask(gallery, [gallery.images[0]], top=1000)
    cells = [cell for candidate in answer.candidates for cell in candidate.cells]
    assert sorted(cells) == gallery.tiles.ids.tolist()


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_turns_find_a_rotated_tile_and_its_heading(gallery: TinyGallery, quarter: int) -> None:
    # a camera whose upper edge points to the east shows the north at its left
    photo = np.rot90(gallery.images[21], quarter)
    (answer,) = ask(gallery, [photo], turns=4, top=2)
    assert answer.candidates[0].id == 121
    assert answer.candidates[0].score == pytest.approx(1, abs=1e-5)
    assert answer.heading_deg == answer.candidates[0].turn_deg == 90.0 * quarter


def test_turns_between_quarters_score_better_than_none(gallery: TinyGallery) -> None:
    big = gallery.ground[10:90, 10:90]
    turned = Image.fromarray(big).rotate(45, Image.Resampling.BICUBIC)  # counter-clockwise
    centre = np.asarray(turned)[24:56, 24:56]
    straight, answer = (ask(gallery, [centre], turns=n, top=1)[0] for n in (1, 8))
    assert straight.candidates[0].turn_deg is None
    assert answer.candidates[0].turn_deg == 45
    assert answer.candidates[0].score > straight.candidates[0].score


def test_panoramas_are_shifted(tmp_path: Path) -> None:
    gallery = TinyGallery(tmp_path, query_size=(32, 64))
    wide = np.array(Image.fromarray(gallery.images[9]).resize((64, 32)))
    # its centre column shows what lies 90 degrees clockwise of the north
    east = np.roll(wide, -16, axis=1)
    (answer,) = ask(gallery, [east], turns=4, top=1)
    assert answer.candidates[0].id == 109
    assert answer.candidates[0].score > 0.99
    assert answer.heading_deg == 90
    (overhead,) = ask(gallery, [wide], turns=4, top=1, view="overhead")
    assert overhead.candidates[0].id == 109
    assert overhead.heading_deg == 0


def test_an_area_restricts_the_search(gallery: TinyGallery) -> None:
    near = (float(gallery.tiles.lat[40]), float(gallery.tiles.lon[40]))
    (answer,) = ask(gallery, [gallery.images[3]], near=near, within_m=40)
    assert {cell for c in answer.candidates for cell in c.cells} == {140, 141, 132}
    (same,) = ask(gallery, [gallery.images[3]], area=Area.circle(*near, 40))
    assert same.candidates == answer.candidates


def test_exif_is_a_prior_only_when_asked(gallery: TinyGallery) -> None:
    lat, lon = float(gallery.tiles.lat[40]), float(gallery.tiles.lon[40])
    photos = [png(gallery.images[3], gps(lat, lon)), png(gallery.images[4])]
    free, _ = ask(gallery, photos)
    assert free.candidates[0].id == 103
    assert free.exif is not None
    assert (free.exif.lat, free.exif.lon) == pytest.approx((lat, lon))
    asked, without = ask(gallery, photos, near="exif", within_m=40)
    assert {cell for c in asked.candidates for cell in c.cells} == {140, 141, 132}
    assert not without.is_located
    assert "no EXIF position" in without.reason


def test_bad_photos_give_their_reason_and_others_go_on(gallery: TinyGallery) -> None:
    photos = [b"<svg/>", png(gallery.images[7]), Photo("torn.jpg", None, error="torn")]
    svg, good, torn = ask(gallery, photos)
    assert "not an image file" in svg.error
    assert svg.reason.startswith("the photo cannot be read: ")
    assert good.candidates[0].id == 107
    assert (torn.photo, torn.error, torn.is_located) == ("torn.jpg", "torn", False)
    assert ask(gallery, [b""])[0].error == "the file is empty"
    assert ask(gallery, []) == []


def test_answers_of_many_photos_are_those_of_each(gallery: TinyGallery) -> None:
    photos = [*gallery.images, *gallery.images]
    gallery.batch_sizes.clear()
    together = ask(gallery, photos, top=2, turns=4)
    assert max(gallery.batch_sizes) <= 64
    assert [answer.candidates[0].id for answer in together] == 2 * gallery.tiles.ids.tolist()
    alone = [ask(gallery, [photo], top=2, turns=4)[0] for photo in photos[:3]]
    for one, other in zip(alone, together[:3], strict=True):
        assert [c.cells for c in one.candidates] == [c.cells for c in other.candidates]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "--top 0"),
        ({"turns": 0}, "--turns 0"),
        ({"near": (47.0, 8.0)}, "needs a distance"),
        ({"within_m": 5.0}, "needs a distance"),
        ({"near": (47.0, 8.0), "within_m": -1.0}, "-1 m"),
        ({"near": (0.0, 0.0), "within_m": 10.0}, "the gallery covers"),
        ({"near": (97.0, 0.0), "within_m": 10.0}, "--near 97,0: .* -90..90: .* look swapped$"),
        ({"near": (45.0, math.nan), "within_m": 10.0}, "--near 45,nan: .* finite degrees$"),
        ({"near": (math.inf, 0.0), "within_m": 10.0}, "--near inf,0: .* finite degrees$"),
        ({"near": (97.0, 99.0), "within_m": 10.0}, "latitude 97 is not within -90..90$"),
        (
            {"near": (8.0, 47.0), "within_m": 9000.0},
            "holds 48 tiles: latitude and longitude look swapped$",
        ),
        ({"near": "there", "within_m": 10.0}, "no pair"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    gallery: TinyGallery, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ask(gallery, [gallery.images[0]], **options)


def test_arrays_of_other_shapes_are_refused(gallery: TinyGallery) -> None:
    with pytest.raises(InputError, match=r"float64\[4, 4, 3\]"):
        ask(gallery, [np.zeros((4, 4, 3))])


def calibration(threshold: float, **changes: Any) -> Calibration:
    return Calibration(
        temperature=0.01,
        rest_logit=-5.0,
        none=NoneModel((0.0,) * 5, (0.0,) * 5, (1.0,) * 5, -3.0, threshold),
        offsets=(0.1, 0.3, 0.5),
        levels=(0.5, 0.9),
        num_candidates=12,
        default_size_m=SIZE_M,
        **changes,
    )


def calibrated(tmp_path: Path, found: Calibration) -> TinyGallery:
    gallery = TinyGallery(tmp_path)
    found.save(gallery.uri)
    gallery.has_calibration = True
    return gallery


def test_a_calibration_gives_probabilities_and_radii(tmp_path: Path) -> None:
    gallery = calibrated(tmp_path, calibration(threshold=0.0))
    (answer,) = ask(gallery, [gallery.images[19]], top=3)
    probabilities = [candidate.probability for candidate in answer.candidates]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0.5 < probabilities[0] < 1
    assert 0 < answer.radius_50_m <= answer.radius_90_m
    assert answer.note is None
    ids, scores = gallery.search(gallery.encode([gallery.images[19]]), 24)
    shares, _ = calibration(threshold=0.0).shares(scores)
    cells = np.isin(ids[0], answer.candidates[0].cells)
    inside = 1 - answer.none_probability
    assert probabilities[0] == pytest.approx(shares[0, cells].sum() * inside, rel=1e-4)


@pytest.mark.parametrize("asks_exif", [False, True])
def test_radii_of_a_search_near_a_point_stay_near_it(tmp_path: Path, asks_exif: bool) -> None:
    far = tuple((float(lat), 9.0) for lat in range(10))
    found = dataclasses.replace(
        calibration(threshold=0.0, region=far), rest_logit=5.0, temperature=10.0, num_candidates=2
    )
    gallery = calibrated(tmp_path, found)
    lat, lon = float(gallery.tiles.lat[40]), float(gallery.tiles.lon[40])
    near: Any = "exif" if asks_exif else (lat, lon)
    photo = png(gallery.images[40], gps(lat, lon))
    (free,) = ask(gallery, [photo])
    assert free.radius_90_m > 10_000
    (answer,) = ask(gallery, [photo], near=near, within_m=100)
    assert answer.radius_90_m < 200


def test_none_keeps_the_candidates_and_says_why(tmp_path: Path) -> None:
    gallery = calibrated(tmp_path, calibration(threshold=-100.0))
    (answer,) = ask(gallery, [gallery.images[19]], top=3)
    assert not answer.is_located
    assert (answer.lat, answer.lon, answer.radius_90_m) == (None, None, None)
    assert "outside" in answer.reason
    assert len(answer.candidates) == 3


@pytest.mark.parametrize(
    ("changes", "options", "note"),
    [
        ({}, {"turns": 4}, "calibrated with turns=1"),
        ({"weights_sha256": "b" * 64}, {}, "calibrated for weights bbbbbbbbbbbb"),
    ],
)
def test_a_calibration_that_does_not_fit_is_not_used(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], note: str
) -> None:
    gallery = calibrated(tmp_path, calibration(threshold=0.0, **changes))
    (answer,) = ask(gallery, [gallery.images[19]], **options)
    assert note in answer.note
    assert answer.candidates[0].probability is None


def test_a_calibration_of_an_earlier_version_is_used_and_named(tmp_path: Path) -> None:
    gallery = calibrated(tmp_path, calibration(threshold=0.0, gallery_version=1))
    gallery.version = 2
    (answer,) = ask(gallery, [gallery.images[19]])
    assert "version 1" in answer.note
    assert answer.candidates[0].probability > 0


@pytest.fixture(scope="module")
def detailed(tmp_path_factory: pytest.TempPathFactory) -> TinyGallery:
    """A gallery whose tiles have features; nothing in it chose how many of them must match."""
    gallery = TinyGallery(tmp_path_factory.mktemp("detailed"), pixels=128, is_detailed=True)
    gallery.has_calibration = True
    return gallery


@pytest.mark.parametrize("quarter", [0, 3])
def test_refining_finds_the_exact_position(detailed: TinyGallery, quarter: int) -> None:
    pytest.importorskip("cv2")
    calibration(threshold=0.0, min_inliers=15, turns=4).save(detailed.uri)
    detailed.version += 1  # a calibration is read again for another version
    north, west = 64 * 2 + 6, 64 * 3 - 4  # of the photo, near the tile of row 2, column 3
    photo = np.rot90(detailed.ground[north : north + 128, west : west + 128], quarter)
    plain, answer = (ask(detailed, [photo], turns=4, refine=refine)[0] for refine in (False, True))
    assert plain.refined is None
    refined = answer.refined
    assert refined.tile_id in [c.id for c in answer.candidates[:3]]
    true_lat, true_lon = position_of(west + 64, north + 64, 128)
    assert metres_between(refined.lat, refined.lon, true_lat, true_lon) < 0.5  # a pixel
    turned = (answer.heading_deg - 90 * quarter + 180) % 360 - 180
    assert abs(turned) < 1
    assert (answer.lat, answer.lon) == (plain.lat, plain.lon)


def test_an_unclear_refinement_changes_nothing(detailed: TinyGallery) -> None:
    pytest.importorskip("cv2")
    calibration(threshold=0.0, min_inliers=100_000).save(detailed.uri)
    detailed.version += 1
    plain, answer = (ask(detailed, [detailed.images[9]], refine=r)[0] for r in (False, True))
    assert answer == plain


def test_a_photo_unlike_those_of_the_calibration_is_not_refined(detailed: TinyGallery) -> None:
    pytest.importorskip("cv2")
    looks = np.stack([describe_look(image) for image in detailed.images[:40]])
    usual = calibration(threshold=0.0, min_inliers=15, appearance=Appearance.fit(looks))
    usual.save(detailed.uri)
    detailed.version += 1
    photo = detailed.images[44]
    other = np.repeat(photo.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    (refined,) = ask(detailed, [photo], refine=True)
    assert refined.refined is not None
    plain, answer = (ask(detailed, [other], refine=refine)[0] for refine in (False, True))
    assert "looks unlike those of the calibration" in answer.note
    assert dataclasses.replace(answer, note=plain.note) == plain


def test_a_refused_kind_of_photo_says_why(detailed: TinyGallery) -> None:
    pytest.importorskip("cv2")
    report = {"refinement": {"min_inliers": None, "reason": "features place 9 of 99"}}
    calibration(threshold=0.0, report=report).save(detailed.uri)
    detailed.version += 1
    (answer,) = ask(detailed, [detailed.images[9]], refine=True)
    assert answer.refined is None
    assert "not refined: features place 9 of 99" in answer.note


@pytest.mark.parametrize("fault", [KeyError(7), RunError("the image of tile 7 cannot be read")])
def test_refining_leaves_out_a_tile_that_is_gone(
    detailed: TinyGallery, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    pytest.importorskip("cv2")
    calibration(threshold=0.0, min_inliers=15).save(detailed.uri)
    detailed.version += 1
    (whole,) = ask(detailed, [detailed.images[9]], refine=True)
    assert whole.refined.tile_id == 109
    gone = whole.candidates[1].id
    read_tile = detailed.read_tile

    def read(tile_id: int) -> NDArray[np.uint8]:
        if tile_id == gone:
            raise fault
        return read_tile(tile_id)

    monkeypatch.setattr(detailed, "read_tile", read)
    (answer,) = ask(detailed, [detailed.images[9]], refine=True)
    assert answer.refined == whole.refined
    assert answer.note.count("not compared") == 1


def test_refining_needs_tiles_of_known_size(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    gallery = calibrated(tmp_path, calibration(threshold=0.0, min_inliers=5))
    gallery.tiles.size_m[:] = np.nan
    (answer,) = ask(gallery, [gallery.images[9]], refine=True)
    assert answer.refined is None
    assert "ground size" in answer.note


def test_refining_needs_a_calibration(detailed: TinyGallery) -> None:
    pytest.importorskip("cv2")
    calibration(threshold=0.0).save(detailed.uri)
    detailed.version += 1
    (answer,) = ask(detailed, [detailed.images[9]], refine=True)
    assert answer.refined is None
    assert "not refined" in answer.note


def test_large_photos_are_made_smaller_and_found(gallery: TinyGallery) -> None:
    assert needed_size(gallery) == (2 * PIXELS, 2 * PIXELS)  # type: ignore[arg-type]
    large = Image.fromarray(gallery.images[19]).resize((640, 640), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    large.save(data, "JPEG", quality=95)
    from_jpeg, from_pixels = ask(gallery, [data.getvalue(), np.asarray(large)], top=1)
    assert from_jpeg.candidates[0].id == from_pixels.candidates[0].id == 119
    assert from_jpeg.candidates[0].score > 0.99


def test_exact_positions_without_opencv_name_the_command(
    gallery: TinyGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=re.escape("pip install 's4g-ray[locate]'")):
        ask(gallery, [gallery.images[9]], refine=True)


@pytest.mark.parametrize("turns", [1, 4])
def test_files_are_answered_in_order_as_each_photo_alone(
    gallery: TinyGallery, tmp_path: Path, turns: int
) -> None:
    paths = []
    for number, image in enumerate(gallery.images):
        path = tmp_path / f"{number}.png"
        path.write_bytes(b"torn" if number == 7 else png(image))
        paths.append(str(path))
    options = LocateOptions(turns=turns, top=3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = list(locate_files(gallery, paths, options))  # type: ignore[arg-type]
        many = ask(gallery, paths, turns=turns, top=3)
        num_threads = torch.get_num_threads()
        in_new_thread = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
    finally:
        torch.set_num_threads(before)
    assert (num_threads, in_new_thread) == (3, 3)  # as they were set
    assert [answer.photo for answer in found] == [answer.photo for answer in many] == paths
    for number in (0, 7, 19, 47):
        (alone,) = ask(gallery, [paths[number]], turns=turns, top=3)
        for answer in (found[number], many[number]):
            assert answer.error == alone.error
            assert [c.cells for c in answer.candidates] == [c.cells for c in alone.candidates]
            scores = [c.score for c in answer.candidates]
            assert scores == pytest.approx([c.score for c in alone.candidates], abs=1e-5)


def test_answers_come_before_all_photos_are_read(
    gallery: TinyGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def read_tile(uri: str, **_: Any) -> Photo:
        read.append(uri)
        return Photo(uri, gallery.images[len(read) % 48])

    monkeypatch.setattr("s4g_ray.gallery.photos.decode_ahead.read_photo", read_tile)
    uris = [f"{number}.jpg" for number in range(100_000)]
    found = locate_files(gallery, uris, LocateOptions())  # type: ignore[arg-type]
    assert next(found).photo == "0.jpg"
    found.close()
    assert len(read) < 1000
