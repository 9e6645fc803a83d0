from __future__ import annotations

from pathlib import Path

import pytest

from s4g_ray.errors import RunError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import (
    Stamp,
    latest_version,
    list_versions,
    open_published,
    publish,
    published_versions,
    read_part,
    write_part,
)

STAMP = Stamp(step=1, weights_sha256="a", preprocessing="p", dataset="d", dim=4, dtype="float32")


def publish_thing(folder: Path) -> str:
    """Publish a folder with one part, and return its URI."""
    part = write_part(str(folder), "sub/part-0.bin", b"hello", 5)
    publish(str(folder), "thing", [part], STAMP, {"k": 2})
    return str(folder)


def test_a_published_folder_reads_back(tmp_path: Path) -> None:
    uri = publish_thing(tmp_path / "v=0001")
    manifest = open_published(uri, "thing")
    assert (manifest.stamp, manifest.info, manifest.parts[0].rows) == (STAMP, {"k": 2}, 5)
    assert read_part(uri, manifest.parts[0]) == b"hello"


def test_readers_ignore_a_folder_without_a_manifest(tmp_path: Path) -> None:
    publish_thing(tmp_path / "v=0001")
    write_part(str(tmp_path / "v=0002"), "part", b"half", 1)
    assert latest_version(str(tmp_path), "v") == 1
    assert published_versions(str(tmp_path), "v") == [1]
    assert list_versions(str(tmp_path), "v") == [1, 2]
    assert latest_version(str(tmp_path / "none"), "v") is None
    with pytest.raises(RunError, match="no published thing"):
        open_published(str(tmp_path / "v=0002"), "thing")


@pytest.mark.parametrize("content", [b"hell", b"jello", None])
def test_a_part_that_was_cut_altered_or_removed_is_refused_by_name(
    tmp_path: Path, content: bytes | None
) -> None:
    uri = publish_thing(tmp_path / "v=0001")
    path = tmp_path / "v=0001/sub/part-0.bin"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(RunError, match=r"part-0\.bin"):
        read_part(uri, open_published(uri, "thing").parts[0])


def test_stamps_that_differ_name_both_values() -> None:
    other = Stamp(
        step=1, weights_sha256="b", preprocessing="p", dataset="d", dim=4, dtype="float32"
    )
    with pytest.raises(RunError, match="weights_sha256 'b', but 'a' is wanted"):
        STAMP.require(other, "x")
    STAMP.require(STAMP, "x")


def test_the_memory_file_system_works_like_a_local_one() -> None:
    uri = "memory://bucket/run"
    part = write_part(uri, "part", b"0123", 4)
    publish(uri, "thing", [part])
    assert read_part(uri, open_published(uri, "thing").parts[0]) == b"0123"
    assert files.read_bytes(f"{uri}/part", 1, 2) == b"12"
    assert files.list_names(uri) == ["_MANIFEST.json", "part"]
    files.remove(uri)
    assert not files.exists(uri)
