"""The page in Chromium: a photo goes in, its tile comes first and lies on the map."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from s4g_ray.data.sphere import metres_between
from tests.support.lake_gallery import SIZE_M, LakeGallery, build_lake_gallery
from tests.support.local_service import local_service
from tests.support.page_server import PAGE, SceneGallery, serving_page

pytest.importorskip("playwright.sync_api", reason="the page is tested by playwright")
from playwright.sync_api import Browser, Page, expect, sync_playwright

expect.set_options(timeout=60_000)  # on a busy machine an answer takes long
CHROMIUM = shutil.which("chromium") or ""
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium: apt-get install chromium"),
]
expect.set_options(timeout=90_000)  # milliseconds; a loaded machine takes more than the usual 5 s
DROP = """([name, text]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
  const target = document.getElementById("drop");
  for (const kind of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(
      new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""
PASTE = """([name, text]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
  document.body.dispatchEvent(
    new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def gallery() -> SceneGallery:
    return SceneGallery().cut()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(gallery: SceneGallery) -> Iterator[str]:
    with serving_page(gallery) as served:
        yield served


@pytest.fixture
def faults() -> list[str]:
    """What no page may do: errors of scripts, refusals of the policy, requests to elsewhere."""
    return []


@pytest.fixture
def page(browser: Browser, address: str, faults: list[str]) -> Iterator[Page]:
    size: Any = {"width": 1280, "height": 800}
    with browser.new_context(viewport=size, reduced_motion="reduce") as context:
        opened = open_page(context.new_page(), address, faults)
        yield opened
        assert faults == []


def open_page(page: Page, address: str, faults: list[str]) -> Page:
    """Open the page and note its faults."""

    def note_request(request: Any) -> None:
        if not request.url.startswith((address, "blob:", "data:")):
            faults.append(request.url)

    def note_message(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(message.text)

    page.on("request", note_request)
    page.on("console", note_message)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    expect(page.locator("#gallery-facts")).to_contain_text("tiles")
    return page


def photo_of(gallery: SceneGallery, row: int, path: Path) -> Path:
    """A photo that shows what tile `row` shows, larger."""
    path.write_bytes(gallery.images[gallery.ids[row]])
    Image.open(path).resize((300, 300)).save(path, quality=90)
    return path


def payload(path: Path) -> list[str]:
    return [path.name, base64.b64encode(path.read_bytes()).decode()]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> LakeGallery:
    return build_lake_gallery(tmp_path_factory.mktemp("lake"))


@pytest.fixture(scope="module")
def lake_address(lake: LakeGallery) -> Iterator[str]:
    with local_service(lake.gallery) as (client, _):
        yield f"http://127.0.0.1:{client.port}/"


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_the_right_tile_of_a_real_gallery_comes_first_and_its_square_is_on_the_map(
    browser: Browser,
    lake: LakeGallery,
    lake_address: str,
    faults: list[str],
    tmp_path: Path,
    way: str,
) -> None:
    tiles = lake.gallery.tiles
    row = len(tiles) // 2 + 3
    photo = lake.take_photo(row, tmp_path / "lake.jpg")
    by_hand = lake.rank_by_hand(photo, 1)
    assert by_hand[0] == tiles.ids[row]  # the right tile
    with browser.new_context(
        viewport={"width": 1280, "height": 800}, reduced_motion="reduce"
    ) as context:
        page = open_page(context.new_page(), lake_address, faults)
        if way == "choose":
            page.set_input_files("#file", photo)
        else:
            page.evaluate({"drop": DROP, "paste": PASTE}[way], payload(photo))
        first = page.locator(".candidate").first
        expect(first).to_have_attribute("data-tile", str(tiles.ids[row]))
        lat, lon = map(float, page.locator(".position").inner_text().split(", "))
        away_m = metres_between(lat, lon, tiles.lat[row], tiles.lon[row])
        assert away_m < SIZE_M
        expect(page.locator("#status")).to_contain_text("lake.jpg: ")
        square = page.locator("path.square.first").bounding_box()
        shown = page.locator("#map").bounding_box()
        assert square is not None
        assert shown is not None
        assert square["width"] > 20
        assert square["x"] >= shown["x"]
        assert square["y"] >= shown["y"]
        assert square["x"] + square["width"] <= shown["x"] + shown["width"]
        assert abs(square["width"] - square["height"]) <= 6  # on the ground, in Mercator too
        circle = page.locator("path.circle-90").bounding_box()
        assert circle is not None
        (answer,) = lake.gallery.locate([photo])
        assert answer.radius_90_m is not None
        wide = square["width"] * 2 * answer.radius_90_m / SIZE_M
        assert circle["width"] == pytest.approx(wide, rel=0.05, abs=4)  # pixels of its line
        expect(page.locator(".leaflet-mosaic-pane img").first).to_be_visible()
    assert faults == []


def test_the_map_shows_tiles_and_hovering_a_square_shows_its_tile(
    page: Page, gallery: SceneGallery, tmp_path: Path
) -> None:
    page.set_input_files("#file", photo_of(gallery, 500, tmp_path / "hills.jpg"))
    tiles = page.locator(".leaflet-mosaic-pane img")
    expect(tiles.first).to_be_visible()
    page.locator(".badge.first").hover()
    shown = page.locator(".tile-tip img")
    expect(shown).to_have_attribute("src", f"tiles/{gallery.ids[500]}")
    expect(page.locator(".tile-tip img")).not_to_have_js_property("naturalWidth", 0)
    expect(page.locator(".candidate").first).to_have_class(re.compile(r"\bon\b"))


def test_a_keyboard_alone_reaches_everything(
    page: Page, gallery: SceneGallery, tmp_path: Path
) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.set_input_files("#file", photo_of(gallery, 900, tmp_path / "a.jpg"))
    first = page.locator(".candidate").first
    first.focus()
    page.keyboard.press("ArrowDown")
    second = page.locator(".candidate").nth(1)
    expect(second).to_be_focused()
    named = "(all) => all.filter((e) => e.tabIndex >= 0 && !e.getAttribute('aria-label')).length"
    assert page.locator("#map path.leaflet-interactive").evaluate_all(named) == 0
    expect(page.locator("path.square.on")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.locator("#compared-caption")).to_have_text("Candidate 2")
    expect(page.locator("#compared-tile")).to_have_attribute(
        "src", f"tiles/{second.get_attribute('data-tile')}"
    )
    page.keyboard.press("Escape")


def test_no_answer_and_errors_say_why(page: Page, gallery: SceneGallery, tmp_path: Path) -> None:
    nowhere = photo_of(gallery, 10, tmp_path / "nowhere.jpg")
    broken = tmp_path / "bro\u202eken.jpg"  # turns the direction of what follows
    broken.write_text("no picture <b>at all</b>")
    text = tmp_path / "notes.txt"
    text.write_text("a list")
    page.set_input_files("#file", [nowhere, broken, text])
    expect(page.locator("#summary")).to_contain_text(
        "less than the 30 % that this gallery asks for"
    )
    expect(page.locator("path.circle")).to_have_count(0)
    marks = page.locator(".thumb")
    expect(marks.nth(1)).to_have_attribute("aria-label", "broken.jpg: failed")
    marks.nth(1).click()
    expect(page.get_by_role("alert")).to_contain_text("no image; give a JPEG")
    marks.nth(2).click()
    expect(page.get_by_role("alert")).to_contain_text("notes.txt is text/plain")
    marks.nth(0).click()
    expect(page.locator("#summary")).to_contain_text("No answer")
    expect(page.locator(".leaflet-control-attribution")).to_contain_text("Landsat 7 <USGS>")


def test_a_busy_service_is_asked_again(page: Page, gallery: SceneGallery, tmp_path: Path) -> None:
    page.set_input_files("#file", photo_of(gallery, 300, tmp_path / "busy.jpg"))
    expect(page.locator(".candidate").first).to_be_visible()
    assert gallery.asked["busy.jpg"] == 3


def test_options_are_sent(page: Page, gallery: SceneGallery, tmp_path: Path) -> None:
    page.set_input_files("#file", photo_of(gallery, 300, tmp_path / "options.jpg"))
    expect(page.locator(".candidate")).to_have_count(5)
    page.locator("#options summary").click()
    page.get_by_label("Candidates").fill("3")
    page.get_by_label("Camera direction").select_option("4")
    page.get_by_label("Find the exact position").check()
    page.get_by_label("Search only near a point").check()
    page.get_by_label("Latitude, longitude").fill("40.9 -112.7")
    page.get_by_label("Within, km").fill("2.5")
    page.get_by_role("button", name="Search again").click()
    expect(page.locator(".candidate")).to_have_count(3)
    assert gallery.queries[-1] == {
        "top": "3",
        "turns": "4",
        "format": "json",
        "refine": "true",
        "near": "40.9,-112.7",
        "within_km": "2.5",
    }


def test_the_answer_that_is_shown_is_saved(
    page: Page, gallery: SceneGallery, tmp_path: Path
) -> None:
    page.set_input_files("#file", photo_of(gallery, 300, tmp_path / "kept.jpg"))
    expect(page.locator(".candidate")).to_have_count(5)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # no https
    page.get_by_title("Copy the position").click()
    expect(page.get_by_title("Copy the position")).to_have_text("Copied")
    page.locator("#options summary").click()
    page.get_by_label("Candidates").fill("3")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as JSON").click()
    (answer,) = json.loads(saved.value.path().read_text())["answers"]
    assert answer["candidates"][0]["id"] == gallery.ids[300]
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as GeoJSON").click()
    assert saved.value.suggested_filename == "kept.geojson"
    assert (gallery.queries[-1]["format"], gallery.queries[-1]["top"]) == ("geojson", "5")


def test_a_gallery_without_calibration_says_so(
    browser: Browser, gallery: SceneGallery, tmp_path: Path, faults: list[str]
) -> None:
    gallery.calibrated = False
    try:
        with serving_page(gallery) as address, browser.new_context() as context:
            page = context.new_page()
            page.route("**/gallery/tiles*", lambda route: route.fulfill(json={"tiles": []}))
            open_page(page, address, faults)
            expect(page.locator("#banner")).to_contain_text("not calibrated")
            expect(page.locator("#map-hint")).to_have_text("Zoom in to see the tiles")
            page.set_input_files("#file", photo_of(gallery, 300, tmp_path / "a.jpg"))
            expect(page.locator("#summary")).to_contain_text("without a probability")
            expect(page.locator(".candidate .value").first).to_have_text(re.compile(r"0\.\d{3}"))
    finally:
        gallery.calibrated = True
    assert faults == []


def test_a_token_is_asked_for_and_opens_tiles_too(
    browser: Browser, gallery: SceneGallery, tmp_path: Path
) -> None:
    gallery.token = "open-sesame"
    try:
        with serving_page(gallery) as address, browser.new_context() as context:
            page = context.new_page()
            page.goto(address)
            expect(page.locator("#token-refused")).to_be_hidden()
            page.get_by_label("access token").fill("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#token-refused")).to_be_visible()
            page.get_by_label("access token").fill("open-sesame")
            page.get_by_role("button", name="Use it").click()
            expect(page.locator("#gallery-facts")).to_contain_text("tiles")
            page.set_input_files("#file", photo_of(gallery, 300, tmp_path / "a.jpg"))
            tile = page.locator(".candidate img").first
            expect(tile).to_have_attribute("src", re.compile("^blob:"))
            shown = page.locator(".candidate img").first
            expect(shown).not_to_have_js_property("naturalWidth", 0)
    finally:
        gallery.token = None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(
    browser: Browser, address: str, gallery: SceneGallery, tmp_path: Path, scheme: str
) -> None:
    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    with browser.new_context(**phone, is_mobile=True, has_touch=True) as context:
        page = open_page(context.new_page(), address, [])
        page.set_input_files("#file", photo_of(gallery, 700, tmp_path / "a.jpg"))
        expect(page.locator(".candidate").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        light = (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(244, 246, 249)"
        )
        assert light == (scheme == "light")
        for name in (".button.primary", ".candidate", ".actions button"):
            box = page.locator(name).first.bounding_box()
            assert box is not None
            assert box["height"] >= 40  # of a finger


def test_ids_beyond_the_numbers_of_javascript_keep_their_digits(page: Page) -> None:
    text = json.dumps(
        {"id": 2**62 + 1, "s": 'a "4611686018427387905" \\', "x": 0.12345678901234567, "n": [7]}
    )
    read = page.evaluate(
        "(text) => import('./static/api.js').then((api) => api.parseJson(text))", text
    )
    assert read["id"] == str(2**62 + 1)
    assert read["s"] == 'a "4611686018427387905" \\'
    assert read["x"] == pytest.approx(0.12345678901234567)
    assert read["n"] == [7]


def test_no_file_of_the_page_names_another_host() -> None:
    for path in PAGE.glob("*.*"):
        if path.suffix in {".html", ".css", ".js"}:
            found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text())
            assert found == [], path


def test_no_outline_of_the_world_crosses_the_map_from_edge_to_edge() -> None:
    world = json.loads((PAGE / "world.geojson").read_text())
    for feature in world["features"]:
        for part in feature["geometry"]["coordinates"]:
            for line in part if feature["properties"]["kind"] == "land" else [part]:
                steps = [abs(a[0] - b[0]) for a, b in itertools.pairwise(line) if a[1] > -90]
                assert max(steps) < 180
