"""Which files are read for what a user names; decoding ahead keeps their order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s4g_ray.errors import InputError
from s4g_ray.gallery.photos.decode_ahead import BATCH_BYTES, batches_of, read_ahead
from s4g_ray.gallery.photos.photo import Photo
from s4g_ray.gallery.photos.photo_files import list_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "c/d.webp", "c/e.mp4", "note.txt", ".hidden.jpg", ".git/f.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_folders_patterns_and_files_are_listed_in_order(folder: Path) -> None:
    def names(*sources: str) -> list[str]:
        found = list_photos([str(folder / source) for source in sources])
        return [str(Path(uri).relative_to(folder)) for uri in found]

    assert names("") == ["a.PNG", "b.jpg", "c/d.webp", "c/e.mp4"]
    assert names("note.txt", "b.jpg", "c") == ["note.txt", "b.jpg", "c/d.webp", "c/e.mp4"]
    assert names("*.jpg") == ["b.jpg"]
    assert names("**/*.webp") == ["c/d.webp"]
    (folder / "odd[1].jpg").touch()
    assert names("odd[1].jpg") == ["odd[1].jpg"]


def test_sources_without_photos_are_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    for source, message in (
        ("empty", "holds no image"),
        ("*.tif", "no file matches"),
        ("x.jpg", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            list_photos([str(folder / source)])


def test_photos_come_in_order_with_errors_in_their_place(tmp_path: Path) -> None:
    paths = []
    for i in range(40):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (8, 8), (i, i, i)).save(path)
        paths.append(str(path))
    (tmp_path / "7.png").write_bytes(b"torn")
    photos = list(read_ahead(paths, every_s=1, least=None, num_threads=3, num_ahead=5))
    assert [photo.name for photo in photos] == paths
    assert [i for i, photo in enumerate(photos) if photo.error] == [7]
    assert all(p.pixels is None or p.pixels[0, 0, 0] == i for i, p in enumerate(photos))


def test_reading_stops_when_nobody_asks_for_more(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    photos = read_ahead([str(path)] * 1000, every_s=1, least=None, num_threads=2, num_ahead=4)
    next(photos)
    photos.close()


def test_batches_are_bounded_in_photos_and_bytes() -> None:
    small = [Photo(str(i), np.zeros((2, 2, 3), np.uint8)) for i in range(7)]
    assert [len(batch) for batch in batches_of(iter(small), 3)] == [3, 3, 1]
    half = np.zeros((1, BATCH_BYTES // 6 + 1, 3), np.uint8)  # half a batch
    large = [Photo(str(i), half) for i in range(5)]
    assert [len(batch) for batch in batches_of(iter(large), 64)] == [2, 2, 1]
