"""The ten commands of docs/locate.md, from a GeoTIFF to the page, over a real scene."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.config.loading import load_config
from s4g_ray.data.dataset import open_dataset
from s4g_ray.gallery.gallery import open_gallery
from s4g_ray.pipeline.records import read_records
from tests.repository.test_docs import check_s4g
from tests.support.doc_commands import ROOT, Command, commands
from tests.support.lake_photos import write_lake_photos
from tests.support.local_service import local_service
from tests.support.page_server import landsat
from tests.support.tiny_training import TINY_TRAINING

TEN = [command for command in commands(ROOT / "docs/locate.md") if command.program == "s4g"]
STEPS = [
    "convert imagery",
    "check",
    "convert folder",
    "train",
    "export",
    "gallery build",
    "gallery calibrate",
    "gallery info",
    "locate",
    "serve",
]
# what makes a command small, appended to it: a fifth of the scene, cut in this process; an epoch of
# a tiny encoder
SMALLER = {
    "convert imagery": ["--bounds", "-112.75,40.65,-112.62,40.80", "--workers", "0"],
    "train": [
        *TINY_TRAINING,
        "evaluation.before_training=false",
        "evaluation.correlation_baseline=false",
    ],
}
NUM_PHOTOS = 1500  # most lie outside of the part that is cut; 40 of the test split calibrate
CHROMIUM = shutil.which("chromium") or ""
pytestmark = pytest.mark.cluster  # training runs on Ray


def arguments_of(command: Command, folder: Path) -> list[str]:
    """The command's arguments, with what /path/to stands for."""
    words = [word.replace("/path/to/landsat.tif", str(landsat())) for word in command.words[1:]]
    words = [word.replace("/path/to", str(folder)) for word in words]
    return [*words, *SMALLER.get(step_of(words), [])]


def step_of(words: list[str]) -> str:
    """Which of STEPS the arguments belong to."""
    return next(step for step in STEPS if " ".join(words).startswith(step))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and the configurations."""
    made = tmp_path_factory.mktemp("guide")
    shutil.copytree(ROOT / "configs", made / "configs")
    write_lake_photos(made / "photos", NUM_PHOTOS)
    write_lake_photos(made / "new", 2, seed=9)
    return made


@pytest.fixture(scope="module")
def outputs(folder: Path) -> dict[str, str]:
    """The output of each of the ten commands, in order; that of `serve`, which is checked, ''."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in TEN:
            words = arguments_of(command, folder)
            name = step_of(words)
            if name == "serve":  # runs until it is stopped
                check_s4g(words)
                found[name] = ""
                continue
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
            found[name] = done.output
    return found


def test_the_guide_has_ten_commands_in_this_order(outputs: dict[str, str]) -> None:
    assert list(outputs) == STEPS


def test_the_guides_configuration_trains_the_model_that_its_gallery_holds(
    outputs: dict[str, str], folder: Path
) -> None:
    train = next(command for command in TEN if command.words[1] == "train")
    assert train.words[2] == "configs/landsat.yaml"
    config = load_config(ROOT / train.words[2], train.words[3:])
    run = folder / config.run_dir
    (epoch,) = [record for record in read_records(str(run)) if record["kind"] == "epoch"]
    assert epoch["loss"] > 0
    assert len(open_dataset(str(folder / "data/lake_photos")).pairs("train")) > 100
    trained, untrained, exported = (
        load_file(path / "model.safetensors")
        for path in (
            run / "checkpoints/epoch=0001",
            run / "checkpoints/epoch=0000",
            folder / "models/lake",
        )
    )
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    assert not all(torch.equal(exported[name], untrained[name]) for name in trained)
    data = (folder / "models/lake/model.safetensors").read_bytes()
    header = open_gallery(str(folder / "data/lake_gallery")).info["model"]
    assert header["weights_sha256"] == hashlib.sha256(data).hexdigest()


def test_the_photos_get_candidates_in_the_region(outputs: dict[str, str], folder: Path) -> None:
    done = CliRunner().invoke(
        app, ["locate", str(folder / "data/lake_gallery"), str(folder / "new"), "--json"]
    )
    answers = json.loads(done.stdout)
    assert len(answers) == 2
    for answer in answers:
        assert len(answer["candidates"]) > 0
        assert all(-112.76 < each["lon"] < -112.61 for each in answer["candidates"])


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium: apt-get install chromium")
def test_the_page_shows_the_answer_of_a_gallery_that_was_copied(
    outputs: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested by playwright")
    copied = tmp_path / "copied"
    shutil.copytree(folder / "data/lake_gallery", copied)
    gallery = open_gallery(str(copied))
    tile = int(gallery.tiles.ids[len(gallery.tiles.ids) // 2])
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(gallery.read_tile_bytes(tile)[0])
    # the model is untrained: the best candidate is whichever the gallery itself names
    best = str(gallery.locate([gallery.read_tile(tile)])[0].candidates[0].id)
    requested = []
    with local_service(gallery) as (client, _), sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
        page.on("request", lambda request: requested.append(request.url))
        refused: list[str] = []
        page.on("pageerror", lambda error: refused.append(str(error)))
        address = f"http://127.0.0.1:{client.port}/"
        page.goto(address)
        page.set_input_files("#file", photo)
        first = page.locator(".candidate").first
        sync_api.expect.set_options(timeout=90_000)
        sync_api.expect(first).to_have_attribute("data-tile", best)
        sync_api.expect(page.locator("path.square.first")).to_be_visible()
        sync_api.expect(page.locator(".leaflet-mosaic-pane img").first).to_be_visible()
        page.screenshot(path=str(tmp_path / "page.png"))
        browser.close()
    assert refused == []
    outside = [url for url in requested if not re.match(rf"{address}|blob:|data:", url)]
    assert outside == []
