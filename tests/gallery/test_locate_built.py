"""Photos are located in a gallery as it is built, by the function, the method and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s4g_ray import open_gallery
from s4g_ray.cli.app import app
from s4g_ray.data.area import Area
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.gallery.build import build_gallery
from s4g_ray.gallery.locate import locate
from tests.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def built(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("built")
    config = tiny_config("-", synthetic.uri)
    weights = folder / "model.safetensors"
    weights.write_bytes(encode_weights(Encoder.build(config.model, seed=1)))
    build_gallery(str(weights), synthetic.uri, str(folder / "gallery"), config=config)
    return str(folder / "gallery")


def test_references_are_found_at_their_places(built: str, synthetic: GeoDataset) -> None:
    gallery = open_gallery(built)
    paths = [Path(synthetic.uri, "images", "references", f"{i}.png") for i in range(0, 120, 7)]
    answers = gallery.locate(paths, top=3)
    assert [answer.candidates[0].id for answer in answers] == list(range(0, 120, 7))
    assert [answer.photo for answer in answers] == [str(path) for path in paths]
    rows = gallery.rows(gallery.tiles.ids)
    for answer in answers:
        row = rows[answer.candidates[0].id]
        assert answer.candidates[0].lat == gallery.tiles.lat[row]
        assert (answer.lat, answer.lon) == pytest.approx(
            (gallery.tiles.lat[row], gallery.tiles.lon[row])
        )
    again = locate(gallery, paths, top=3)
    assert [answer.to_json() for answer in again] == [answer.to_json() for answer in answers]


def test_turns_and_areas_work_on_a_built_index(built: str, synthetic: GeoDataset) -> None:
    gallery = open_gallery(built)
    pixels = gallery.read_tile(5)
    (turned,) = gallery.locate([pixels.transpose(1, 0, 2)[::-1]], turns=4, top=1)
    assert turned.candidates[0].id == 5
    assert turned.heading_deg == 90
    lat, lon = float(gallery.tiles.lat[9]), float(gallery.tiles.lon[9])
    area = Area.circle(lat, lon, 3_000_000)
    (near,) = gallery.locate([pixels], area=area, top=50)
    inside = area.contains(gallery.tiles.lat, gallery.tiles.lon)
    assert {c.id for c in near.candidates} == set(gallery.tiles.ids[inside][:].tolist())


def test_the_command_answers_as_the_function(built: str, synthetic: GeoDataset) -> None:
    folder = str(Path(synthetic.uri, "images", "queries"))
    result = CliRunner().invoke(app, ["locate", built, f"{folder}/1*.png", "--json", "--top", "2"])
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    paths = [answer["photo"] for answer in answers]
    assert len(paths) == 31
    expected = open_gallery(built).locate(paths, top=2)
    assert answers == [json.loads(json.dumps(answer.to_json())) for answer in expected]
