from __future__ import annotations

import errno
from pathlib import Path

import pytest

from s4g_ray.errors import InputError, WriteError
from s4g_ray.pipeline.records import read_records
from s4g_ray.storage import files
from tests.support.branched_runs import read_tree


def test_a_range_is_read_and_one_past_the_end_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "shard")
    files.write_bytes(path, b"0123456789")
    assert files.read_bytes(path, 3, 4) == b"3456"
    assert files.read_bytes(path) == b"0123456789"
    with pytest.raises(EOFError, match="4 bytes wanted from offset 8"):
        files.read_bytes(path, 8, 4)


@pytest.mark.parametrize(("offset", "length"), [(0, 10**12), (3, 10**12), (9, 1), (10**12, 5)])
def test_a_range_past_the_end_is_refused_without_allocating_its_memory(
    tmp_path: Path, offset: int, length: int
) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(EOFError, match=rf"{length} bytes wanted from offset {offset}"):
        files.read_bytes(str(tmp_path / "a"), offset, length)


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


def test_a_failed_write_names_path_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for write in (files.write_bytes, files.append_bytes):
        with pytest.raises(
            WriteError, match=r"cannot write .*file/a \(3 bytes\): (Not a directory|File exists)"
        ):
            write(str(tmp_path / "file" / "a"), b"abc")


def test_a_line_that_was_cut_short_while_appending_is_left_out(tmp_path: Path) -> None:
    files.append_bytes(f"{tmp_path}/metrics.jsonl", b'{"kind": "step", "step": 1}\n{"kind": "st')
    assert read_records(str(tmp_path)) == [{"kind": "step", "step": 1}]


def test_an_empty_object_with_the_folders_own_name_is_not_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Consoles of object stores make such markers, and listings return them."""

    class Marked:
        def invalidate_cache(self) -> None: ...

        def ls(self, path: str, detail: bool) -> list[str]:
            return ["bucket/train/drone/", "bucket/train/drone/0007/", "bucket/train/drone/a.jpg"]

    monkeypatch.setattr("fsspec.url_to_fs", lambda uri: (Marked(), "bucket/train/drone"))
    assert files.list_names("other://bucket/train/drone") == ["0007", "a.jpg"]


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


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///", "file://"])
def test_the_uri_that_results_from_an_unset_variable_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="is a variable unset"):
        files.absolute(uri)


def write_folder(root: str) -> dict[str, bytes]:
    """Publish a folder below `root` and write a file; return their content by path below it."""
    names = ("a/x", "a/b/y", f"a/{files.MANIFEST}", "file")
    for name in names:
        files.write_bytes(f"{root}/{name}", name.encode())
    return {name: name.encode() for name in names}


def test_a_file_and_a_folder_move_and_what_is_missing_does_not(tmp_path: Path) -> None:
    content = write_folder(f"{tmp_path}/old")
    for name in ("a", "file", "none"):
        files.move(f"{tmp_path}/old/{name}", f"{tmp_path}/new/deep/{name}")
    assert read_tree(tmp_path / "new/deep") == content
    assert list((tmp_path / "old").iterdir()) == []
    files.write_bytes(f"{tmp_path}/b/x", b"")
    with pytest.raises(WriteError, match=r"cannot move .*/b to .*/file/b: .*repeat the command"):
        files.move(f"{tmp_path}/b", f"{tmp_path}/new/deep/file/b")


def test_a_folder_on_another_disk_is_copied_with_its_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    content = write_folder(f"{tmp_path}/old")
    written: list[str] = []
    replace = Path.replace

    def watch(self: Path, target: Path) -> Path:
        written.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(Path, "replace", watch)
    for name in ("a", "file"):
        files.move(f"{tmp_path}/old/{name}", f"{tmp_path}/new/{name}")
    assert read_tree(tmp_path / "new") == content
    assert list((tmp_path / "old").iterdir()) == []
    assert sorted(written[:2]) == ["x", "y"]
    assert written[2:] == [files.MANIFEST, "file"]
