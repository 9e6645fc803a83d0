from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import NEAR, NEAR_REMOTE, Range, read_ranges

CONTENT = {"a": bytes(range(256)) * 600, "b": b"0123456789", "empty": b""}
OFFSETS = st.none() | st.integers(0, 160_000) | st.sampled_from([0, 10, 10**12])
LENGTHS = st.none() | st.integers(0, 70_000) | st.sampled_from([1, 10**12])


def read_one_by_one(ranges: list[Range]) -> list[bytes | Exception]:
    results: list[bytes | Exception] = []
    for wanted in ranges:
        try:
            results.append(files.read_bytes(*wanted))
        except (OSError, EOFError) as error:
            results.append(error)
    return results


@pytest.mark.parametrize("scheme", ["local", "memory"])
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=150,
)
@given(
    wanted=st.lists(st.tuples(st.sampled_from([*CONTENT, "none"]), OFFSETS, LENGTHS), max_size=12)
)
def test_ranges_read_together_equal_those_read_one_by_one(
    tmp_path: Path, scheme: str, wanted: list[tuple[str, int | None, int | None]]
) -> None:
    folder = str(tmp_path) if scheme == "local" else "memory://ranges"
    for name, data in CONTENT.items():
        if not files.exists(f"{folder}/{name}"):
            files.write_bytes(f"{folder}/{name}", data)
    ranges: list[Range] = [(f"{folder}/{name}", offset, length) for name, offset, length in wanted]
    for found, alone in zip(read_ranges(ranges), read_one_by_one(ranges), strict=True):
        assert type(found) is type(alone)
        assert str(found) == str(alone)


def test_near_ranges_of_a_file_are_one_read_and_far_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read a batch: 64 packed images of 1 kB in a row, two far from them, and two other files."""
    reads: list[tuple[str, int | None, int | None]] = []  # path, start, end
    content = bytes(700_000)

    def cat_file(path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        reads.append((path, start, end))
        return content[start:end]

    def read(uri: str, start: int, length: int | None) -> bytes:
        end = None if length is None else start + length
        reads.append((uri.removeprefix(str(tmp_path)), start, end))
        return content[start:end]

    monkeypatch.setattr(fsspec.filesystem("memory"), "cat_file", cat_file)
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


def test_an_unexpected_error_of_a_remote_read_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def cat_file(*_: Any, **__: Any) -> bytes:
        raise TypeError("a mistake")

    monkeypatch.setattr(fsspec.filesystem("memory"), "cat_file", cat_file)
    with pytest.raises(TypeError, match="a mistake"):
        read_ranges([("memory://x", 0, 1)])
