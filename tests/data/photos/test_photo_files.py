"""Which files are read for what a user names; decoding ahead keeps their order."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s4g_ray.data.photos.photo_files import list_photos
from s4g_ray.errors import InputError
from s4g_ray.gallery.photos.decode_ahead import BATCH_BYTES, batches_of, read_ahead
from s4g_ray.gallery.photos.photo import Photo
from s4g_ray.storage import files
from tests.support.faulty_s3 import Store


def unchanged(photo: Photo) -> Photo:
    return photo


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
        (f"{'x' * 300}.jpg", "cannot be read: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            list_photos([str(folder / source)])


def test_sources_that_cannot_be_listed_are_refused() -> None:
    for source in ("foo://photos", "ftp://127.0.0.1:9/photos"):
        with pytest.raises(InputError, match=f"{source} cannot be listed"):
            list_photos([source])


def test_photos_come_in_order_with_errors_in_their_place(tmp_path: Path) -> None:
    paths = []
    for i in range(40):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (8, 8), (i, i, i)).save(path)
        paths.append(str(path))
    (tmp_path / "7.png").write_bytes(b"torn")
    photos = list(
        read_ahead(paths, every_s=1, least=None, prepare=unchanged, num_threads=3, num_ahead=5)
    )
    assert [photo.name for photo in photos] == paths
    assert [i for i, photo in enumerate(photos) if photo.error] == [7]
    assert all(p.pixels is None or p.pixels[0, 0, 0] == i for i, p in enumerate(photos))


def test_reading_stops_when_nobody_asks_for_more(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    photos = read_ahead(
        [str(path)] * 1000, every_s=1, least=None, prepare=unchanged, num_threads=2, num_ahead=4
    )
    next(photos)
    photos.close()


def test_batches_are_bounded_in_photos_and_bytes() -> None:
    small = [Photo(str(i), np.zeros((2, 2, 3), np.uint8)) for i in range(7)]
    assert [len(batch) for batch in batches_of(iter(small), 3)] == [3, 3, 1]
    half = np.zeros((1, BATCH_BYTES // 6 + 1, 3), np.uint8)  # half a batch
    large = [Photo(str(i), half) for i in range(5)]
    assert [len(batch) for batch in batches_of(iter(large), 64)] == [2, 2, 1]


@pytest.mark.s3
def test_photos_in_an_object_store_are_listed_and_read(store: Store) -> None:
    folder = "s3://data/photos"
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(data, "PNG")
    for name in ("b.png", "a.PNG", "note.txt", "c/d/e.png", ".hidden/f.png", "c/.g.png"):
        files.write_bytes(f"{folder}/{name}", data.getvalue())
    files.write_bytes(f"{folder}2/other.png", data.getvalue())
    uris = list_photos([folder, f"{folder}/missing.jpg"])
    assert uris == [f"{folder}/{name}" for name in ("a.PNG", "b.png", "c/d/e.png", "missing.jpg")]
    first, second, third, missing = read_ahead(
        uris, every_s=1, least=None, prepare=unchanged, num_threads=2, num_ahead=4
    )
    assert (first.name, first.error, second.error, third.error) == (uris[0], None, None, None)
    assert missing.error is not None
    with pytest.raises(InputError, match="holds no image"):
        list_photos(["s3://data/nothing"])
