"""Positions and headings of queries come from the photos' own tags where a list has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from s4g_ray.datasets import folder
from s4g_ray.datasets.lists.exif_positions import PhotoTags, read_tags
from s4g_ray.errors import InputError
from tests.support.source_trees import rows

GPS = ExifTags.GPS
BROKEN = "p/broken.jpg (not an image file of a known format)"
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF'
    ' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
    ' xmlns:GPano="http://ns.google.com/photos/1.0/panorama/"{}</rdf:RDF></x:xmpmeta>'
)


def write_photo(
    path: Path,
    position: tuple[float, float] | None,
    heading: float | None = None,
    *,
    magnetic: bool = False,
    xmp: str | None = None,
) -> None:
    """Write a photo of a position north and west, in degrees and decimal minutes."""
    tags: dict[int, Any] = {}
    if position is not None:
        for tag, value, letter in (
            (GPS.GPSLatitude, position[0], "NS"[position[0] < 0]),
            (GPS.GPSLongitude, position[1], "EW"[position[1] < 0]),
        ):
            degrees, share = divmod(abs(value), 1)
            tags[tag] = (degrees, share * 60, 0.0)
            tags[tag - 1] = letter
    if heading is not None:
        tags[GPS.GPSImgDirection] = heading
        tags[GPS.GPSImgDirectionRef] = "M" if magnetic else "T"
    exif = Image.Exif()
    exif[ExifTags.IFD.GPSInfo] = tags
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {} if xmp is None else {"xmp": xmp.encode()}
    Image.new("RGB", (16, 8)).save(path, exif=exif, **options)


def make(root: Path, lines: list[str] | None) -> str:
    """Write two tiles 1 km apart, photos beside them, and a list of the photos."""
    root.mkdir()
    (root / "tiles").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8)).save(root / "tiles" / f"{number}.png")
    tiles = ["path,lat,lon", "tiles/0.png,41.25,-112.5", "tiles/1.png,41.26,-112.5"]
    (root / "references.csv").write_text("\n".join(tiles))
    write_photo(root / "p" / "a.jpg", (41.2501, -112.5), 90.5)
    write_photo(root / "p" / "b.JPG", (41.2599, -112.5001), 10.0, magnetic=True)
    write_photo(root / "p" / "c.jpg", None, 7.0)
    write_photo(root / "p" / "q" / "d.png", (41.2502, -112.5))
    (root / "p" / "broken.jpg").write_bytes(b"no image")
    if lines is not None:
        (root / "queries.csv").write_text("\n".join(lines))
    return str(root)


def test_a_folder_of_photos_needs_no_list(tmp_path: Path) -> None:
    notes: list[str] = []
    source = make(tmp_path / "s", None)
    dataset = folder.convert(source, str(tmp_path / "d"), from_exif=True, report=notes.append)
    found = rows(dataset, "queries", "source_id", "place_id", "lat", "lon", "heading_deg")
    assert [row[:2] for row in found] == [("p/a.jpg", 0), ("p/b.JPG", 1), ("p/q/d.png", 0)]
    degrees = np.array([row[2:4] for row in found])
    wanted = [[41.2501, -112.5], [41.2599, -112.5001], [41.2502, -112.5]]
    np.testing.assert_allclose(degrees, wanted, atol=1e-7)
    assert [row[4] for row in found] == [90.5, 10.0, None]
    assert notes[:3] == [
        "from the photos' own tags: 3 positions, 3 headings (1 of them from magnetic north, taken"
        " as they are)",
        f"photos that cannot be opened: 1: {BROKEN}",
        "photos without a position in their tags: 1: p/c.jpg",
    ]
    named = folder.convert(source, str(tmp_path / "e"), from_exif=True, queries="p/q")
    assert rows(named, "queries", "source_id") == [("p/q/d.png",)]


def test_a_list_comes_before_the_tags(tmp_path: Path) -> None:
    lines = ["path,lat,lon,h", "p/a.jpg,41.26,-112.5,", "p/b.JPG,,,33", "p/c.jpg,41.25,-112.5,"]
    lines += ["p/broken.jpg,,,", "p/gone.jpg,,,"]
    notes: list[str] = []
    dataset = folder.convert(
        make(tmp_path / "s", lines),
        str(tmp_path / "d"),
        from_exif=True,
        heading_column="h",
        report=notes.append,
    )
    found = rows(dataset, "queries", "id", "place_id", "heading_deg")
    assert found == [(0, 1, 90.5), (1, 1, 33.0), (2, 0, 7.0)]
    assert notes[0] == "missing images: 1, left out with their rows: p/gone.jpg"
    assert "from the photos' own tags: 1 position, 2 headings" in notes  # one is of the list
    assert f"photos that cannot be opened: 1: {BROKEN}" in notes
    assert not any("without a position" in note for note in notes)


def test_lists_without_columns_of_coordinates_take_those_of_the_tags(tmp_path: Path) -> None:
    source = make(tmp_path / "s", ["path", "p/a.jpg", "p/b.JPG"])
    dataset = folder.convert(source, str(tmp_path / "d"), from_exif=True)
    assert rows(dataset, "queries", "id", "place_id") == [(0, 0), (1, 1)]
    with pytest.raises(InputError, match="no column 'lat'"):
        folder.convert(source, str(tmp_path / "e"))
    (tmp_path / "s" / "queries.csv").write_text("path\np/c.jpg\n")
    with pytest.raises(InputError, match="no photo has a position in its tags; give a list"):
        folder.convert(source, str(tmp_path / "e"), from_exif=True)


@pytest.mark.parametrize("has_region", [False, True])
def test_names_are_matched_before_the_tags_are_read(tmp_path: Path, has_region: bool) -> None:
    listed = ["path", "p/A.jpg", "p/b.jpg", "p\\q\\d.png", "p/gone.jpg", "p/c.JPG"]
    source = make(tmp_path / "s", listed)
    options: dict[str, Any] = {"from_exif": True}
    if has_region:
        tags = folder.convert(source, str(tmp_path / "region"), queries="p", from_exif=True)
        options["references"] = tags.uri
    lines: list[str] = []
    with pytest.raises(InputError, match="no photo has a position"):
        folder.convert(source, str(tmp_path / "d"), report=lines.append, **options)
    text = f"{source}/queries.csv: missing images with a likely match: 4 (by letter case 3,"
    assert len(lines) == 1
    assert lines[0].startswith(text)
    assert lines[0].endswith("take them with --match-names")
    (tmp_path / "s/queries.csv").write_text("\n".join([*listed, "p/a.jpg"]).replace("/A", "/B"))
    lines.clear()
    offered = folder.convert(source, str(tmp_path / "d"), report=lines.append, **options)
    assert rows(offered, "queries", "source_id") == [("p/a.jpg",)]
    assert sum("likely match" in line for line in lines) == 1
    (tmp_path / "s/queries.csv").write_text("\n".join(listed))
    lines.clear()
    taken = folder.convert(
        source, str(tmp_path / "e"), match_names=True, report=lines.append, **options
    )
    found = rows(taken, "queries", "id", "place_id", "source_id")
    assert found == [(0, 0, "p/a.jpg"), (1, 1, "p/b.JPG"), (2, 0, "p/q/d.png")]
    assert lines[0] == "missing images: 1, left out with their rows: p/gone.jpg"
    assert "photos without a position in their tags: 1: p/c.jpg" in lines
    assert sum(line.startswith(text) and line.endswith(": taken") for line in lines) == 1


@pytest.mark.parametrize("options", [{"split_column": "set"}, {"pair": "key"}, {"id_column": "n"}])
def test_options_that_need_a_list_are_refused_for_a_folder(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source = make(tmp_path / "s", None)
    tiles = "path,lat,lon,set,key,n\ntiles/0.png,41.25,-112.5,train,k,1\n"
    (tmp_path / "s" / "references.csv").write_text(tiles)
    with pytest.raises(InputError, match="needs a list of the queries"):
        folder.convert(source, str(tmp_path / "d"), from_exif=True, **options)


@pytest.mark.parametrize("form", [' GPano:PoseHeadingDegrees="271.5"/>', "attribute"])
def test_the_heading_of_a_panorama_is_that_of_its_centre(tmp_path: Path, form: str) -> None:
    if form == "attribute":
        form = "><GPano:PoseHeadingDegrees>271.5</GPano:PoseHeadingDegrees></rdf:Description>"
    path = tmp_path / "pano.jpg"
    write_photo(path, (-1.5, 179.5), 3.0, magnetic=True, xmp=XMP.format(form))
    assert read_tags(str(path)) == PhotoTags(-1.5, 179.5, 271.5, False)


def test_heic_photos_are_read_as_others(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    path = tmp_path / "phone.heic"
    write_photo(path, (41.5, -112.25), 12.5)
    assert read_tags(str(path)) == PhotoTags(41.5, -112.25, 12.5, False)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "an empty file"),
        (b"<html>gone</html>", "an HTML page, not an image"),
        (b"\xff\xd8\xff\xe1\x00", "not an image file of a known format"),
    ],
)
def test_a_photo_that_cannot_be_opened_says_why(tmp_path: Path, data: bytes, fault: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    tags = read_tags(str(tmp_path / "a.jpg"))
    assert tags.lat is None
    assert tags.fault is not None
    assert tags.fault.startswith(fault)
