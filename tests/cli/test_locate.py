"""`s4g locate`: tables, JSON, GeoJSON and CSV, and its exit codes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from s4g_ray.cli.app import app
from s4g_ray.cli.galleries import locate_output
from s4g_ray.data.photos.exif import ExifPosition
from s4g_ray.errors import InputError, StoreError
from s4g_ray.gallery.answer import Answer, Candidate
from s4g_ray.gallery.refinement import Refined
from tests.gallery.test_locate import gps, png
from tests.support.tiny_gallery import TinyGallery

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> TinyGallery:
    return TinyGallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture
def photos(gallery: TinyGallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four photos, tiles of the gallery, in which commands are run."""
    monkeypatch.setattr("s4g_ray.gallery.gallery.open_gallery", lambda uri: gallery)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # readline sets it for the workers of pytest
    folder = tmp_path / "in"
    folder.mkdir()
    for i in (3, 19, 30, 44):
        exif = gps(47.0, 8.001) if i == 19 else None
        (folder / f"{i}.png").write_bytes(png(gallery.images[i], exif))
    return folder


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["locate", "g", *arguments])


def test_json_is_a_list_with_an_answer_a_photo(photos: Path) -> None:
    result = invoke("in", "--json", "--top", "2")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert [answer["photo"] for answer in answers] == [f"in/{i}.png" for i in (19, 3, 30, 44)]
    assert [answer["candidates"][0]["id"] for answer in answers] == [119, 103, 130, 144]
    assert answers[0]["exif"]["lat"] == 47
    assert all(len(answer["candidates"]) == 2 for answer in answers)


def test_geojson_holds_the_features_of_all_photos(photos: Path) -> None:
    value = json.loads(invoke("in/*.png", "--geojson", "--top", "1").stdout)
    assert value["type"] == "FeatureCollection"
    roles = [feature["properties"]["role"] for feature in value["features"]]
    assert roles.count("candidate") == roles.count("answer") == 4
    assert roles.count("exif") == 1


def test_csv_has_a_row_for_each_candidate_and_each_photo_without(photos: Path) -> None:
    (photos / "torn.jpg").write_bytes(b"text")
    result = invoke("in", "--csv", "--top", "3")
    assert result.exit_code == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert tuple(rows[0]) == locate_output.COLUMNS
    assert [row["rank"] for row in rows] == [*("1", "2", "3") * 4, ""]
    assert rows[-1]["error"] == "not an image file of a known format"
    assert float(rows[0]["lat"]) == pytest.approx(46.999137, abs=1e-6)


def test_a_photo_that_cannot_be_read_ends_with_2_alone_and_1_among_others(photos: Path) -> None:
    (photos / "[b]torn.jpg").write_bytes(b"text")
    alone = invoke("in/[b]torn.jpg")
    assert isinstance(alone.exception, InputError)  # main() makes it exit code 2
    assert "in/[b]torn.jpg: not an image file" in str(alone.exception)
    among = invoke("in")
    assert among.exit_code == 1
    assert "4 of 5 photos located" in among.stdout
    assert "no answer for in/[b]torn.jpg: the photo cannot be read" in among.stdout
    assert max(map(len, among.stdout.splitlines())) > 80  # a pipe has no columns to break lines at


def test_a_video_that_cannot_be_read_ends_as_a_photo(photos: Path) -> None:
    (photos / "v.mp4").write_bytes(b"text")
    alone = invoke("in/v.mp4")
    assert isinstance(alone.exception, InputError)
    among = invoke("in")
    assert among.exit_code == 1
    assert "4 of 5 photos located" in among.stdout
    assert "in/v.mp4" in among.stdout


def test_few_photos_are_shown_in_detail(photos: Path) -> None:
    result = invoke("in/19.png", "in/3.png", "--turns", "4", "--top", "2")
    assert result.exit_code == 0
    for text in (
        "in/19.png",
        "heading 0°",
        "EXIF says 47.000000, 8.001000",
        "119",
        "not calibrated",
    ):
        assert text in result.stdout


def test_the_search_is_restricted(photos: Path, gallery: TinyGallery) -> None:
    lat, lon = float(gallery.tiles.lat[40]), float(gallery.tiles.lon[40])
    box = [[lon - 5e-4, lat - 4e-4], [lon + 5e-4, lat - 4e-4], [lon, lat + 4e-4]]
    area = {"type": "Polygon", "coordinates": [[*box, box[0]]]}
    Path("area.geojson").write_text(json.dumps(area))
    for options in (
        ("--near", f"{lat},{lon}", "--within-km", "0.04"),
        ("--area", "area.geojson"),
    ):
        (answer,) = json.loads(invoke("in/3.png", "--json", *options).stdout)
        assert answer["candidates"][0]["id"] in (140, 141, 132)
    (answer,) = json.loads(
        invoke("in/19.png", "--json", "--near", "exif", "--within-km", "0.1").stdout
    )
    assert 0 < len(answer["candidates"]) < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in", "--json", "--csv"), "choose one of --json and --csv"),
        (("nowhere.jpg",), "nowhere.jpg does not exist"),
        (("in", "--near", "47"), "--near 47 is not LAT,LON"),
        (("in", "--near", "47,8"), "--near needs --within-km"),
        (("in", "--within-km", "2"), "--within-km needs --near"),
        (("in", "--near", "0,0", "--within-km", "2"), "the gallery covers latitudes"),
        (("in", "--area", "no.geojson"), "no.geojson is missing"),
        (("in", "--area", "in/3.png"), "is not GeoJSON"),
        (("in", "--every-s", "0"), "--every-s 0"),
        (("in", "--top", "0"), "--top 0"),
    ],
)
def test_bad_options_give_one_message(
    photos: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert result.stdout == ""


def test_an_outage_of_a_store_is_no_bad_area(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> Any:
        raise StoreError(f"{uri}: no answer")

    monkeypatch.setattr("s4g_ray.storage.files.read_json", fail)
    result = invoke("in", "--area", "s3://data/area.geojson")
    assert isinstance(result.exception, StoreError)


def render(answers: list[Answer], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), soft_wrap=True, highlight=False)
    for shown in locate_output.tables(answers):
        console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


CANDIDATE = Candidate(2**62, -47.123456, -112.123456, 60.0, 0.5, 0.41, 90.0, (2**62,))
FULL: dict[str, Any] = {
    "candidates": (CANDIDATE,),
    "lat": -47.1,
    "lon": -112.1,
    "radius_50_m": 120.0,
    "radius_90_m": 45_000.0,
    "heading_deg": 90.0,
    "is_located": True,
    "exif": ExifPosition(-47.2, -112.2, 80.0, is_magnetic=True),
}


@pytest.mark.parametrize("num_photos", [1, 8])
def test_tables_fit_80_columns_and_show_names_as_they_are(num_photos: int) -> None:
    answers = [Answer(f"in/[red]{i}.jpg", **FULL) for i in range(num_photos)]
    text = render(answers, 80)
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert "[red]0.jpg" in text
    assert "41.0%" in text


def test_names_cannot_control_the_terminal() -> None:
    answer = Answer("a\x1b[31m\n.jpg", reason="torn\x1b[0m")
    for answers in ([answer], [answer] * 5):
        assert "\x1b" not in render(answers, 80)


def test_photos_without_an_answer_are_grouped_by_their_reason() -> None:
    outside = "it lies outside of the gallery with a probability of {}; no place is given from 50%"
    answers = [
        Answer(f"{i}.jpg", (CANDIDATE,), reason=outside.format(share), none_probability=share)
        for i, share in enumerate((0.62, 0.99, 0.7))
    ]
    reason = "the photo has no EXIF position to search near, with a probability of its own"
    answers += [Answer(f"{i}.jpg", reason=reason) for i in range(3, 10)]
    nowhere = "the gallery has no tile there"
    answers.append(Answer("10.jpg", reason=nowhere, none_probability=1.0))
    lines = [" ".join(line.split()) for line in render(answers, 300).splitlines()[-3:]]
    assert lines == [
        "no answer for 0.jpg, 1.jpg, 2.jpg: outside of the gallery with a probability of 62% to"
        " 99%",
        f"no answer for 3.jpg, 4.jpg, 5.jpg, 6.jpg, 7.jpg and 2 more: {reason}",
        f"no answer for 10.jpg: {nowhere}",
    ]


def test_an_exact_position_and_no_answer_are_told() -> None:
    refined = Refined(-47.1001, -112.1001, 47, 33.0, 1.0, 2**62)
    text = render([Answer("a.jpg", refined=refined, **FULL)], 120)
    assert "exact position -47.100100, -112.100100, by 47 matching points, heading 33°" in text
    assert "heading 80° magnetic" in text
    nothing = Answer("a.jpg", (CANDIDATE,), reason="it lies outside")
    assert "no answer: it lies outside" in render([nothing], 80)
