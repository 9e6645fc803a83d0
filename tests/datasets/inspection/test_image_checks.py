from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from s4g_ray.datasets.inspection.dataset_checks import inspect_dataset
from s4g_ray.storage import files
from tests.support.inspected_datasets import (
    clean_tables,
    draw_image,
    levels_of,
    only_finding,
    write_small,
    write_tables,
)


def test_each_folder_is_listed_once_and_without_decode_a_sample_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.datasets.inspection.image_checks.NUM_SAMPLED", 3)
    uri = write_small(tmp_path / "d", clean_tables())
    listed: list[str] = []
    opened: list[str] = []
    list_names = files.list_names
    read_bytes = files.read_bytes

    def record_listing(folder: str) -> list[str]:
        listed.append(folder)
        return list_names(folder)

    def record_reading(path: str, *part: int) -> bytes:
        opened.append(path)
        return read_bytes(path, *part)

    monkeypatch.setattr(files, "list_names", record_listing)
    monkeypatch.setattr(files, "read_bytes", record_reading)
    found = inspect_dataset(uri)
    assert found.ok
    assert sorted(listed) == [f"{uri}/queries", f"{uri}/references"]
    images = sorted(path.removeprefix(f"{uri}/") for path in opened if path.endswith(".png"))
    assert images == [f"{view}/{i}.png" for view in ("queries", "references") for i in (0, 4, 9)]
    assert "6 sampled images decoded, none undecodable" in [one.text for one in found.findings]


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/1.png")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(bytes(999)), "nothing but zeros"),
        (
            lambda path: path.write_bytes(b"<!DOCTYPE html>\n<html>403"),
            "an HTML page, not an image",
        ),
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x"),
            "a Git LFS pointer, not an image; run `git lfs pull`",
        ),
        (link_to_nothing, "a link to /nowhere/1.png, which does not exist"),
        (cut_off, ""),
    ],
)
def test_files_that_hold_no_image_are_faults_with_what_they_hold(
    damage: Callable[[Path], object], reason: str, decode: bool, tmp_path: Path
) -> None:
    uri = write_small(tmp_path / "d", clean_tables())
    damage(tmp_path / "d/queries/4.png")
    fault = only_finding(inspect_dataset(uri, decode=decode), "images", "fault")
    assert fault.values["undecodable"] == 1
    assert fault.examples[0].startswith(f"query id 4 (place 104) queries/4.png: {reason}")


@pytest.mark.parametrize("decode", [False, True])
def test_images_of_one_colour_are_noted(decode: bool, tmp_path: Path) -> None:
    uri = write_small(tmp_path / "d", clean_tables())
    for i in (0, 4):
        Image.new("L", (12, 8), 7 * i).save(tmp_path / f"d/references/{i}.png")
    found = inspect_dataset(uri, decode=decode)
    (note,) = [one for one in found.findings if "one colour alone" in one.text]
    assert (note.level, note.values) == ("note", {"images": 20, "plain": 2})
    assert [line.split()[2] for line in note.examples] == ["0", "4"]


def test_missing_files_are_faults_and_are_not_decoded(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["queries"]["uri"][3] = "nowhere/3.png"
    uri = write_small(tmp_path / "d", tables)
    (tmp_path / "d/nowhere/3.png").unlink()
    (tmp_path / "d/nowhere").rmdir()
    (tmp_path / "d/references/7.png").unlink()
    found = inspect_dataset(uri, decode=True)
    fault = only_finding(found, "images", "fault")
    assert not found.ok
    assert fault.values == {"files": 20, "missing": 2, "rows": 2}
    assert fault.text == "2 of 20 image files missing, of 2 rows"
    assert fault.examples == (
        "reference id 7 (place 107) references/7.png: missing",
        "query id 3 (place 103) nowhere/3.png: missing",
    )
    assert [f.values["images"] for f in found.findings if "undecodable" in f.values] == [18]


def test_only_the_first_ten_examples_are_kept(tmp_path: Path) -> None:
    uri = write_small(tmp_path / "d", clean_tables(), images=False)
    fault = only_finding(inspect_dataset(uri), "images", "fault")
    assert (fault.values["missing"], len(fault.examples)) == (20, 10)


def test_a_folder_that_cannot_be_listed_gives_its_reason(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["queries"]["uri"][0] = "nosuch://bucket/0.png"
    fault = only_finding(inspect_dataset(write_small(tmp_path / "d", tables)), "images", "fault")
    assert fault.values["missing"] == 1
    assert "Protocol not known: nosuch; use a local path, s3://" in fault.examples[0]


def test_undecodable_images_are_faults_with_reasons_and_sizes_are_listed(tmp_path: Path) -> None:
    uri = write_small(tmp_path / "d", clean_tables())
    (tmp_path / "d/queries/2.png").write_bytes(b"")
    (tmp_path / "d/queries/5.png").write_bytes(b"text")
    for i in range(7):
        draw_image(tmp_path / f"d/references/{i}.png", (20 + i, 10))
    found = inspect_dataset(uri, decode=True, num_threads=3)
    fault = only_finding(found, "images", "fault")
    assert fault.text == "2 of 20 images cannot be decoded"
    assert fault.examples == (
        "query id 2 (place 102) queries/2.png: the file is empty",
        "query id 5 (place 105) queries/5.png: not an image file of a known format",
    )
    (sizes,) = [f for f in found.findings if "height x width" in f.text]
    assert sizes.values["queries"] == {"8x12": 8}
    assert sizes.values["references"] == {"8x12": 3, "10x20": 1, "10x21": 1, "10x22": 1, "10x23": 1}
    assert "and 3 more" in sizes.text


def test_byte_ranges_are_read_as_ranges_and_their_file_must_exist(tmp_path: Path) -> None:
    tables = clean_tables()
    folder = tmp_path / "d"
    parts = []
    for uri in tables["queries"]["uri"]:
        draw_image(folder / uri)
        parts.append((folder / uri).read_bytes())
    starts = np.cumsum([0, *map(len, parts)])
    (folder / "shard.tar").write_bytes(b"".join(parts))
    tables["queries"] |= {
        "uri": ["shard.tar"] * 10,
        "offset": starts[:-1].tolist(),
        "length": [len(part) for part in parts],
    }
    uri = write_small(folder, tables)
    found = inspect_dataset(uri, decode=True)
    assert levels_of(found) == {"ok"}
    assert only_finding(found, "schema", "ok").values["filled"]["byte ranges"] == 10
    (folder / "shard.tar").write_bytes(b"".join(parts)[:-5])
    fault = only_finding(inspect_dataset(uri, decode=True), "images", "fault")
    assert f"shard.tar at byte {starts[9]}" in fault.examples[0]
    assert "bytes wanted" in fault.examples[0]
    (folder / "shard.tar").unlink()
    assert only_finding(inspect_dataset(uri), "images", "fault").values == {
        "files": 11,
        "missing": 1,
        "rows": 10,
    }


def test_equal_content_at_different_uris_is_noted_with_places_and_splits(tmp_path: Path) -> None:
    uri = write_small(tmp_path / "d", clean_tables())
    for copied, of in ((1, 0), (7, 3)):  # within train; between train and test
        (tmp_path / f"d/queries/{copied}.png").write_bytes(
            (tmp_path / f"d/queries/{of}.png").read_bytes()
        )
    note = only_finding(inspect_dataset(uri, decode=True), "duplicates", "note")
    assert note.values == {
        "images": 4,
        "contents": 2,
        "of_several_places": 2,
        "in_train_and_held_out": 1,
    }
    assert (
        note.examples[1]
        == "query id 3 (place 103) queries/3.png = query id 7 (place 107) queries/7.png"
    )


@pytest.mark.parametrize(
    ("places", "level", "text"),
    [
        ([100, 101], "fault", "1 image in several rows of different places"),
        ([100, 100], "note", "1 image in several rows of one place"),
    ],
)
def test_an_image_in_two_rows_is_a_fault_when_the_places_differ(
    tmp_path: Path, places: list[int], level: str, text: str
) -> None:
    tables = clean_tables()
    # the same file, by its absolute path
    tables["queries"]["uri"][1] = f"{tmp_path}/d/queries/0.png"
    tables["queries"]["place_id"][:2] = places
    found = inspect_dataset(write_small(tmp_path / "d", tables))
    finding = only_finding(found, "duplicates", level)
    assert finding.text.startswith(text)
    assert finding.values == {"images": 1, "rows": 2}
    assert len(finding.examples) == 1
    assert found.ok == (level == "note")


def test_an_image_in_several_splits_is_a_note(tmp_path: Path) -> None:
    tables = clean_tables()
    tables["references"]["uri"][8] = "references/1.png"
    note = only_finding(inspect_dataset(write_small(tmp_path / "d", tables)), "duplicates", "note")
    assert (
        note.text
        == "1 image of references in several splits: a tile may serve training and the test gallery"
    )
    assert note.values == {"view": "references", "images": 1}


def test_references_of_different_places_at_one_position_are_noted_within_a_split(
    tmp_path: Path,
) -> None:
    tables = clean_tables()
    for moved, onto in ((1, 0), (2, 0), (9, 5)):  # 9 is test, 5 is train
        for view in tables.values():
            view["lon"][moved] = view["lon"][onto]
    note = only_finding(inspect_dataset(write_small(tmp_path / "d", tables)), "duplicates", "note")
    assert note.values == {"references": 3, "positions": 1}
    assert note.examples == ("reference id 0 (place 100) = reference id 1 (place 101) and 1 more",)


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def test_images_of_an_object_store_are_listed_and_decoded(memory: Any, tmp_path: Path) -> None:
    tables = clean_tables()
    uri = "memory://inspected"
    write_tables(uri, tables, "remote")
    for i, path in enumerate(path for table in tables.values() for path in table["uri"]):
        draw_image(tmp_path / f"{i}.png")
        if path != "queries/4.png":
            memory.pipe_file(f"/inspected/{path}", (tmp_path / f"{i}.png").read_bytes())
    found = inspect_dataset(uri, decode=True)
    fault = only_finding(found, "images", "fault")
    assert fault.examples == ("query id 4 (place 104) queries/4.png: missing",)
    assert [f.values["undecodable"] for f in found.findings if "undecodable" in f.values] == [0]
