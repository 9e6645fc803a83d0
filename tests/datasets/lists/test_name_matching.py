"""Paths of a list that name files in another way are offered as likely matches, and taken."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest

from s4g_ray.data.dataset import open_dataset
from s4g_ray.datasets import folder
from s4g_ray.datasets.lists.name_matching import NameMatches, find_matches
from s4g_ray.datasets.source import SourceFolder
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from tests.support.faulty_s3 import Store
from tests.support.source_trees import rows

NFC = unicodedata.normalize("NFC", "Zürich.jpg")
NFD = unicodedata.normalize("NFD", "Zürich.jpg")
# the path of the list, the file, and what differs
LIKE = [
    (NFC, NFD, "Unicode form"),
    (f"p/{NFD}", f"p/{NFC}", "Unicode form"),
    ("img_1.jpg", "IMG_1.JPG", "letter case"),
    ("Photos/a.jpg", "photos/a.jpg", "letter case"),
    (f"PHOTOS/{NFD.upper()}", f"photos/{NFC}", "letter case"),
    ("p\\q\\a.jpg", "p/q/a.jpg", "\\ for /"),
    ("a.jpg", "a.jpeg", "extension"),
    ("a.JPEG", "a.jpg", "extension"),
    ("a.tif", "a.TIFF", "extension"),
]


def make(root: Path, listed: list[str], names: list[str]) -> str:
    """Write a folder whose queries are `listed`, and whose files are `names`."""
    for name in [*names, "t.png"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "references.csv").write_text("path,lat,lon\nt.png,1,2\n")
    lines = [f'"{path}",1,2' for path in listed]
    (root / "queries.csv").write_text("\n".join(["path,lat,lon", *lines]))
    return str(root)


def find(source: str, missing: list[str], listed: list[str]) -> NameMatches:
    return find_matches(SourceFolder(source), missing, pa.chunked_array([listed], pa.string()))


@pytest.mark.parametrize(("listed", "name", "difference"), LIKE)
def test_a_file_with_another_spelling_is_a_likely_match(
    tmp_path: Path, listed: str, name: str, difference: str
) -> None:
    source = make(tmp_path / "s", [listed], [name, "there.jpg"])
    assert find(source, [listed], [listed, "there.jpg"]).paths == {listed: name}
    absolute = f"{source}/{listed}"
    if "/" in listed or "\\" in listed:
        return  # of an absolute path only the name itself is matched
    found = find(source, [absolute], [absolute])
    assert found.paths == {absolute: f"{source}/{name}"}
    assert found.differences == {difference: 1}


def test_likely_matches_are_offered_with_their_count_and_taken_by_an_option(tmp_path: Path) -> None:
    listed = ["p\\A.jpg", "B.JPG", "C.JPG", "there.jpg", "gone.jpg"]
    source = make(tmp_path / "s", listed, ["p/a.jpg", "b.jpg", "c.jpg", "there.jpg"])
    lines: list[str] = []
    dataset = folder.convert(source, str(tmp_path / "offered"), report=lines.append)
    assert rows(dataset, "queries", "source_id") == [("there.jpg",)]
    text = (
        f"{source}/queries.csv: missing images with a likely match: 3 (by letter case 3,"
        f" \\ for / 1), the first {'p/a.jpg'!r} for {listed[0]!r}"
    )
    assert lines[0] == f"{text}; take them with --match-names"
    lines.clear()
    target = str(tmp_path / "taken")
    dataset = folder.convert(source, target, match_names=True, report=lines.append)
    found = rows(dataset, "queries", "id", "source_id")
    assert found == [(0, "p/a.jpg"), (1, "b.jpg"), (2, "c.jpg"), (3, "there.jpg")]
    assert lines[0] == "missing images: 1, left out with their rows: gone.jpg"
    assert f"{text}: taken" in lines


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        (["a.jpg"], ["A.jpg", "a.JPG"]),  # two files could be meant
        (["A.JPG", "a.jpg"], ["a.jpg"]),  # the file is another row's
        (["A.jpg", "a.JPG"], ["a.jpg"]),  # of two rows, which one?
        (["a.jpg"], ["a.png"]),
        (["p/a.jpg"], ["q/a.jpg"]),
    ],
)
def test_names_that_may_mean_another_file_are_no_match(
    tmp_path: Path, listed: list[str], names: list[str]
) -> None:
    source = make(tmp_path / "s", listed, names)
    missing = [name for name in listed if name not in names]
    assert find(source, missing, listed).paths == {}


def test_names_that_are_not_utf8_are_left_out_by_their_escaped_name(tmp_path: Path) -> None:
    source = make(tmp_path / "s", ["p/a.jpg", "p/caf\u00e9.jpg"], ["p/a.jpg"])
    Path(os.fsdecode(os.fsencode(source) + b"/p/caf\xe9.jpg")).touch()
    lines: list[str] = []
    dataset = folder.convert(source, str(tmp_path / "d"), report=lines.append)
    assert rows(dataset, "queries", "source_id") == [("p/a.jpg",)]
    assert (
        rf"{source}/p: names that are not UTF-8, left out: 1, the first 'caf\xe9.jpg'; rename them,"
        " as by `convmv -f latin1 -t utf8`" in lines
    )
    assert "missing images: 1, left out with their rows: p/caf\u00e9.jpg" in lines
    Path(source, "queries.csv").write_bytes(b"path,lat,lon\np/caf\xe9.jpg,1,2\n")
    with pytest.raises(InputError, match=r"queries\.csv is not UTF-8 text: line 2: .*b'\\xe9'"):
        folder.convert(source, str(tmp_path / "e"))


def read_queries(uri: str) -> list[str]:
    """Return the contents of the queries' files."""
    uris = open_dataset(uri).table("queries", ["train"]).uris
    return [files.read_bytes(uris[row]).decode() for row in range(len(uris))]


ODD = ["a b.jpg", "a#1.jpg", "50%25.jpg", "what?.jpg", "two\nlines.jpg", "[a]*.jpg", "ä,+&.jpg"]


def test_odd_characters_in_names_stay_local(tmp_path: Path) -> None:
    source = make(tmp_path / "s #1?", ODD, ODD)
    for name in ODD:
        Path(source, name).write_text(name)
    dataset = folder.convert(source, str(tmp_path / "d"), strict=True)
    assert read_queries(dataset.uri) == ODD


@pytest.mark.s3
def test_odd_characters_in_names_stay_in_a_store(store: Store) -> None:
    root = "s3://data/odd names"
    names = [name for name in ODD if "\n" not in name]  # no object can have it
    for name in [*names, "t.png"]:
        files.write_bytes(files.join(root, name), name.encode())
    files.write_bytes(files.join(root, "references.csv"), b"path,lat,lon\nt.png,1,2\n")
    lines = [f'"{name}",1,2' for name in names]
    files.write_bytes(files.join(root, "queries.csv"), "\n".join(["path,lat,lon", *lines]).encode())
    dataset = folder.convert(root, "s3://data/odd", strict=True)
    assert read_queries(dataset.uri) == names
