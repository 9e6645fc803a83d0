"""Headers of tar members are those of Python's tarfile."""

from __future__ import annotations

import io
import tarfile

import pytest

from s4g_ray.storage.tar_writer import TarWriter, make_header

NAMES = [
    "a",
    "references/000000001.jpg",
    "x" * 99,
    "x" * 100,
    "é/ö.png",
    f"d/{'y' * 98}/{'z' * 40}",
]
SIZES = [0, 1, 511, 512, 8**10, 8**11 - 1]


@pytest.mark.parametrize("name", NAMES)
def test_a_header_has_the_bytes_of_tarfile(name: str) -> None:
    for size in SIZES:
        expected = tarfile.TarInfo(name)
        expected.size = size
        assert make_header(name, size) == expected.tobuf(tarfile.USTAR_FORMAT)


def test_what_a_header_cannot_hold_is_refused() -> None:
    for name, size in (("a", 8**11), ("x" * 101, 1)):
        with pytest.raises(ValueError, match=r"overflow|too long"):
            make_header(name, size)


def test_members_are_read_back_where_they_are_said_to_lie() -> None:
    file = io.BytesIO()
    tar = TarWriter(file)
    contents = {name: bytes([number]) * (500 * number) for number, name in enumerate(NAMES)}
    members = [tar.add(name, data) for name, data in contents.items()]
    tar.close()
    data = file.getvalue()
    assert len(data) == tar.num_bytes
    for member in members:
        assert data[member.offset : member.offset + member.length] == contents[member.name]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {info.name: archive.extractfile(info) for info in archive}
        assert {name: file.read() for name, file in found.items() if file} == contents
