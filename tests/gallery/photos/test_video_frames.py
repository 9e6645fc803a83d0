"""Frames of a video are those at even times."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.gallery.photos.decode_ahead import read_ahead
from s4g_ray.gallery.photos.photo import Photo
from s4g_ray.gallery.photos.video_frames import read_frames

cv2 = pytest.importorskip("cv2")
RATE = 10
NUM_FRAMES = 45


def unchanged(photo: Photo) -> Photo:
    return photo


@pytest.fixture(scope="module", params=["mp4", "avi"])
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Frame i is of grey 5 * i."""
    path = str(tmp_path_factory.mktemp("video") / f"v.{request.param}")
    code = "mp4v" if request.param == "mp4" else "MJPG"
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*code), RATE, (64, 48))
    for i in range(NUM_FRAMES):
        writer.write(np.full((48, 64, 3), 5 * i, np.uint8))
    writer.release()
    return path


def numbers(photos: list[Photo]) -> list[int]:
    found = []
    for photo in photos:
        assert photo.pixels is not None
        assert photo.pixels.shape == (48, 64, 3)
        found.append(int(photo.pixels.mean() / 5 + 0.8))  # compressed to i - 0.7 .. i
    return found


@pytest.mark.parametrize(
    ("every_s", "expected"),
    [
        (1.0, [0, 10, 20, 30, 40]),
        (0.25, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38, 40, 43]),
        (0.01, list(range(NUM_FRAMES))),
        (60.0, [0]),
    ],
)
def test_the_first_frame_at_or_after_each_time_is_read(
    video: str, every_s: float, expected: list[int]
) -> None:
    photos = list(read_frames(video, every_s))
    assert numbers(photos) == expected
    assert photos[0].name == f"{video}@0.00s"


def test_frames_read_ahead_come_in_order_between_photos(video: str) -> None:
    uris = [video, "missing.jpg", video]
    photos = list(
        read_ahead(uris, every_s=0.2, least=None, prepare=unchanged, num_threads=3, num_ahead=4)
    )
    middle = [i for i, photo in enumerate(photos) if photo.name == "missing.jpg"]
    assert middle == [23]
    assert numbers(photos[:23]) == numbers(photos[24:]) == list(range(0, NUM_FRAMES, 2))


def test_no_video_gives_a_photo_with_its_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"text")
    (photo,) = read_frames(str(path), 1)
    assert photo.error is not None
    assert photo.pixels is None


def test_a_video_is_an_error_among_photos_where_opencv_is_missing(
    video: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    uris = ["missing.jpg", video, "gone.jpg"]
    photos = list(
        read_ahead(uris, every_s=1, least=None, prepare=unchanged, num_threads=2, num_ahead=4)
    )
    assert [photo.name for photo in photos] == uris
    assert "pip install 's4g-ray[locate]'" in str(photos[1].error)


def test_a_video_in_a_store_is_an_error() -> None:
    (photo,) = read_frames("s3://data/a.mp4", 1)
    assert (photo.name, photo.pixels) == ("s3://data/a.mp4", None)
    assert "copy it here" in str(photo.error)
