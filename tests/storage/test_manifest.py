from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s4g_ray.errors import InputError, RunError, WriteError
from s4g_ray.pipeline.run_folder import read_records
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import NEAR, NEAR_REMOTE, Range, read_ranges
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
    part = write_part(str(folder), "sub/part-0.bin", b"hello", 5)
    publish(str(folder), "thing", [part], STAMP, {"k": 2})
    return str(folder)


def test_a_published_folder_reads_back(tmp_path: Path) -> None:
    uri = publish_thing(tmp_path / "v=0001")
    manifest = open_published(uri, "thing")
    assert (manifest.stamp, manifest.info, manifest.parts[0].rows) == (STAMP, {"k": 2}, 5)
    assert read_part(uri, manifest.parts[0]) == b"hello"


def test_a_folder_without_a_manifest_is_not_there_for_readers(tmp_path: Path) -> None:
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
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunError, match=r"part-0\.bin"):
        read_part(uri, open_published(uri, "thing").parts[0])


def test_stamps_that_differ_name_both_values() -> None:
    other = Stamp(
        step=1, weights_sha256="b", preprocessing="p", dataset="d", dim=4, dtype="float32"
    )
    with pytest.raises(RunError, match="weights_sha256 'b', but 'a' is wanted"):
        STAMP.require(other, "x")
    STAMP.require(STAMP, "x")


def test_byte_ranges(tmp_path: Path) -> None:
    path = str(tmp_path / "shard")
    files.write_bytes(path, b"0123456789")
    assert files.read_bytes(path, 3, 4) == b"3456"
    assert files.read_bytes(path) == b"0123456789"
    with pytest.raises(EOFError, match="4 bytes wanted from offset 8"):
        files.read_bytes(path, 8, 4)


def test_a_failed_write_leaves_the_old_object_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    files.write_json(str(path), {"a": 1})

    def full(self: Path, data: bytes) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        files.write_json(str(path), {"a": 2})
    assert files.read_json(str(path)) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_memory_file_system_works_like_a_local_one() -> None:
    uri = "memory://bucket/run"
    part = write_part(uri, "part", b"0123", 4)
    publish(uri, "thing", [part])
    assert read_part(uri, open_published(uri, "thing").parts[0]) == b"0123"
    assert files.read_bytes(f"{uri}/part", 1, 2) == b"12"
    assert files.list_names(uri) == ["_MANIFEST.json", "part"]
    files.remove(uri)
    assert not files.exists(uri)


@pytest.mark.parametrize(("offset", "length"), [(0, 10**12), (3, 10**12), (9, 1), (10**12, 5)])
def test_a_range_past_the_end_is_refused_without_asking_for_its_memory(
    tmp_path: Path, offset: int, length: int
) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(EOFError, match=rf"{length} bytes wanted from offset {offset}"):
        files.read_bytes(str(tmp_path / "a"), offset, length)


CONTENT = {"a": bytes(range(256)) * 600, "b": b"0123456789", "empty": b""}
OFFSETS = st.none() | st.integers(0, 160_000) | st.sampled_from([0, 10, 10**12])
LENGTHS = st.none() | st.integers(0, 70_000) | st.sampled_from([1, 10**12])


def one_by_one(ranges: list[Range]) -> list[bytes | Exception]:
    found: list[bytes | Exception] = []
    for wanted in ranges:
        try:
            found.append(files.read_bytes(*wanted))
        except (OSError, EOFError) as error:
            found.append(error)
    return found


@pytest.mark.parametrize("scheme", ["local", "memory"])
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)
@given(
    wanted=st.lists(st.tuples(st.sampled_from([*CONTENT, "none"]), OFFSETS, LENGTHS), max_size=12)
)
def test_ranges_read_together_are_those_read_one_by_one(
    tmp_path: Path, scheme: str, wanted: list[tuple[str, int | None, int | None]]
) -> None:
    folder = str(tmp_path) if scheme == "local" else "memory://ranges"
    for name, data in CONTENT.items():
        if not files.exists(f"{folder}/{name}"):
            files.write_bytes(f"{folder}/{name}", data)
    ranges: list[Range] = [(f"{folder}/{name}", offset, length) for name, offset, length in wanted]
    for found, alone in zip(read_ranges(ranges), one_by_one(ranges), strict=True):
        assert type(found) is type(alone)
        assert str(found) == str(alone)


def test_near_ranges_of_a_file_are_one_read_and_far_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of a packed file: 64 images of 1 kB one after the other, two that are far from them, and two files."""
    reads: list[tuple[str, int | None, int | None]] = []
    content = bytes(700_000)

    def cat_file(
        self: Any, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        reads.append((path, start, end))
        return content[start:end]

    def read(uri: str, start: int, length: int | None) -> bytes:
        reads.append(
            (uri.removeprefix(str(tmp_path)), start, None if length is None else start + length)
        )
        return content[start : None if length is None else start + length]

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", cat_file)
    monkeypatch.setattr(files, "read_available", read)
    for folder, edge in (("memory://", 64_000 + NEAR_REMOTE), (str(tmp_path), 64_000 + NEAR)):
        near = [(f"{folder}/packed", 1000 * i, 1000) for i in reversed(range(64))]
        far = [(f"{folder}/packed", edge + 1, 10), (f"{folder}/packed", 650_000, 10)]
        reads.clear()
        read_ranges([*near, *far, (f"{folder}/other", None, None), (f"{folder}/third", None, None)])
        assert sorted(reads, key=str) == sorted(
            [
                ("/packed", 0, 64_000),
                ("/packed", edge + 1, edge + 11),
                ("/packed", 650_000, 650_010),
                ("/other", 0, None),
                ("/third", 0, None),
            ],
            key=str,
        )


def test_what_a_remote_read_raises_besides_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def cat_file(*_: Any, **__: Any) -> bytes:
        raise TypeError("a mistake")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", cat_file)
    with pytest.raises(TypeError, match="a mistake"):
        read_ranges([("memory://x", 0, 1)])


def test_an_empty_object_named_as_a_folder_is_not_in_the_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Consoles of object stores make such markers, and listings give them back."""

    class Marked:
        def invalidate_cache(self) -> None: ...

        def ls(self, path: str, detail: bool) -> list[str]:
            return ["bucket/train/drone/", "bucket/train/drone/0007/", "bucket/train/drone/a.jpg"]

    monkeypatch.setattr("fsspec.url_to_fs", lambda uri: (Marked(), "bucket/train/drone"))
    assert files.list_names("gs://bucket/train/drone") == ["0007", "a.jpg"]


def test_package_files_resolve_and_missing_ones_are_named() -> None:
    assert files.resolve_package("package://s4g_ray.datasets/earth.py").endswith(
        "s4g_ray/datasets/earth.py"
    )
    for uri in (
        "package://s4g_ray/none.bin",
        "package://no_such_package/x",
        "package://no.such.package/x",
    ):
        with pytest.raises(InputError, match="no installed Python package"):
            files.resolve_package(uri)


def test_a_store_that_refuses_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for write in (files.write_bytes, files.append_bytes):
        with pytest.raises(
            WriteError, match=r"cannot write .*file/a \(3 bytes\): (Not a directory|File exists)"
        ):
            write(str(tmp_path / "file" / "a"), b"abc")


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    files.append_bytes(f"{tmp_path}/metrics.jsonl", b'{"kind": "step", "step": 1}\n{"kind": "st')
    assert read_records(str(tmp_path)) == [{"kind": "step", "step": 1}]


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///", "file://"])
def test_a_path_that_an_unset_variable_leaves_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="is a variable unset"):
        files.absolute(uri)
