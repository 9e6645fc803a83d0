from __future__ import annotations

from pathlib import Path

import pytest

from s4g_ray import storage
from s4g_ray.errors import InputError, RunError

STAMP = storage.Stamp(step=1, weights_sha256="a", preprocessing="p", dataset="d", dim=4, dtype="float32")


def publish(folder: Path) -> str:
    part = storage.write_part(str(folder), "sub/part-0.bin", b"hello", 5)
    storage.publish(str(folder), "thing", [part], STAMP, {"k": 2})
    return str(folder)


def test_a_published_folder_reads_back(tmp_path: Path) -> None:
    uri = publish(tmp_path / "v=0001")
    manifest = storage.open_published(uri, "thing")
    assert (manifest.stamp, manifest.info, manifest.parts[0].rows) == (STAMP, {"k": 2}, 5)
    assert storage.read_part(uri, manifest.parts[0]) == b"hello"


def test_a_folder_without_a_manifest_is_not_there_for_readers(tmp_path: Path) -> None:
    publish(tmp_path / "v=0001")
    storage.write_part(str(tmp_path / "v=0002"), "part", b"half", 1)
    assert storage.latest_version(str(tmp_path), "v") == 1
    assert storage.published_versions(str(tmp_path), "v") == [1]
    assert storage.list_versions(str(tmp_path), "v") == [1, 2]
    assert storage.latest_version(str(tmp_path / "none"), "v") is None
    with pytest.raises(RunError, match="no published thing"):
        storage.open_published(str(tmp_path / "v=0002"), "thing")


@pytest.mark.parametrize("content", [b"hell", b"jello", None])
def test_a_part_that_was_cut_altered_or_removed_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    uri = publish(tmp_path / "v=0001")
    path = tmp_path / "v=0001/sub/part-0.bin"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunError, match=r"part-0\.bin"):
        storage.read_part(uri, storage.open_published(uri, "thing").parts[0])


def test_stamps_that_differ_name_both_values() -> None:
    other = storage.Stamp(step=1, weights_sha256="b", preprocessing="p", dataset="d", dim=4, dtype="float32")
    with pytest.raises(RunError, match="weights_sha256 'b', but 'a' is wanted"):
        STAMP.require(other, "x")
    STAMP.require(STAMP, "x")


def test_byte_ranges(tmp_path: Path) -> None:
    path = str(tmp_path / "shard")
    storage.write_bytes(path, b"0123456789")
    assert storage.read_bytes(path, 3, 4) == b"3456"
    assert storage.read_bytes(path) == b"0123456789"
    with pytest.raises(EOFError, match="4 bytes wanted from offset 8"):
        storage.read_bytes(path, 8, 4)


def test_a_failed_write_leaves_the_old_object_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    storage.write_json(str(path), {"a": 1})

    def full(self: Path, data: bytes) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        storage.write_json(str(path), {"a": 2})
    assert storage.read_json(str(path)) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_memory_file_system_works_like_a_local_one() -> None:
    uri = "memory://bucket/run"
    part = storage.write_part(uri, "part", b"0123", 4)
    storage.publish(uri, "thing", [part])
    assert storage.read_part(uri, storage.open_published(uri, "thing").parts[0]) == b"0123"
    assert storage.read_bytes(f"{uri}/part", 1, 2) == b"12"
    assert storage.list_names(uri) == ["_MANIFEST.json", "part"]
    storage.remove(uri)
    assert not storage.exists(uri)


@pytest.mark.parametrize(("offset", "length"), [(0, 10**12), (3, 10**12), (9, 1), (10**12, 5)])
def test_a_range_past_the_end_is_refused_without_asking_for_its_memory(
    tmp_path: Path, offset: int, length: int
) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(EOFError, match=rf"{length} bytes wanted from offset {offset}"):
        storage.read_bytes(str(tmp_path / "a"), offset, length)


def test_an_empty_object_named_as_a_folder_is_not_in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles of object stores make such markers, and listings give them back."""

    class Marked:
        def invalidate_cache(self) -> None: ...

        def ls(self, path: str, detail: bool) -> list[str]:
            return ["bucket/train/drone/", "bucket/train/drone/0007/", "bucket/train/drone/a.jpg"]

    monkeypatch.setattr("fsspec.url_to_fs", lambda uri: (Marked(), "bucket/train/drone"))
    assert storage.list_names("s3://bucket/train/drone") == ["0007", "a.jpg"]


def test_package_files_resolve_and_missing_ones_are_named() -> None:
    assert storage.resolve_package("package://s4g_ray.datasets/earth.py").endswith("s4g_ray/datasets/earth.py")
    for uri in ("package://s4g_ray/none.bin", "package://no_such_package/x", "package://no.such.package/x"):
        with pytest.raises(InputError, match="no installed Python package"):
            storage.resolve_package(uri)
