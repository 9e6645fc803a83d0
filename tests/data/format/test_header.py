from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from s4g_ray.data.dataset import open_dataset, write_dataset
from s4g_ray.data.format.header import DatasetHeader
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from tests.conftest import tables

PART = "queries/part-00001.parquet"


def cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-10])


def empty(part: Path) -> None:
    part.write_bytes(b"")


def add(part: Path) -> None:
    shutil.copy(part, part.with_name("part-00009.parquet"))


def rename(part: Path) -> None:
    part.rename(part.with_name("part-00001 (copy).parquet"))


def shorten_rows(part: Path) -> None:
    """Another file of as many bytes with fewer rows: padded in front of the footer's length."""
    table = pq.read_table(part)
    size = part.stat().st_size
    pq.write_table(table.slice(0, 1), part, compression="none")
    data = part.read_bytes()
    assert len(data) < size
    start = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - start], data[-8 - start :]
    part.write_bytes(body + b"\0" * (size - len(data)) + footer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, rf"{PART}, a part of 2 rows, is missing; copy .*again"),
        (cut, rf"{PART} has [\d,]+ bytes, but dataset\.json says .*cut off or altered; copy"),
        (empty, rf"{PART} has 0 bytes"),
        (add, r"queries/part-00009\.parquet was added: .*remove it"),
        (rename, rf"{PART}, a part of 2 rows, is missing"),
        (shorten_rows, rf"{PART} holds 1 rows, but dataset\.json says 2: it was altered; copy"),
    ],
)
def test_a_data_set_whose_parts_are_not_those_of_its_header_is_refused(
    change: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("s4g_ray.data.schema.ROWS_PER_PART", 2)
    write_dataset(str(tmp_path), *tables(5), name="n")
    change(tmp_path / PART)
    with pytest.raises(InputError, match=message):
        open_dataset(str(tmp_path))


def test_the_header_lists_each_part_with_rows_bytes_and_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.schema.ROWS_PER_PART", 2)
    write_dataset(str(tmp_path), *tables(3), name="n")
    value = files.read_json(str(tmp_path / "dataset.json"))
    assert (value["version"], "images_root" in value) == (2, False)
    for part in value["parts"]:
        path = tmp_path / part["name"]
        assert part["rows"] == pq.read_metadata(path).num_rows
        assert part["bytes"] == path.stat().st_size
        assert part["sha256"] == files.fingerprint(path.read_bytes())
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet"))
    assert sorted(part["name"] for part in value["parts"]) == names
    assert len(names) == 4
    header = DatasetHeader.read(str(tmp_path))
    header.write(str(tmp_path))
    assert files.read_json(str(tmp_path / "dataset.json")) == value
