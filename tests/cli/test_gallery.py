"""`s4g gallery`: the commands, their results, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.config.loading import dump_config
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from tests.conftest import tiny_config
from tests.support import galleries
from tests.support.json_fields import documented

pytestmark = pytest.mark.usefixtures("one_thread")


def s4g(*arguments: str) -> Any:
    """Run a command in this process; raise what it raises. Returns its JSON, or its output."""
    result = CliRunner().invoke(app, ["gallery", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


def test_a_gallery_is_built_described_and_changed(synthetic: GeoDataset, tmp_path: Path) -> None:
    weights = galleries.write_weights(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_config(tmp_path / "run", synthetic.uri)))
    target = str(tmp_path / "gallery")
    built = s4g(
        *("build", weights, synthetic.uri, target, "embedding.dtype=float32"),
        *("--config", str(config), "--split", "train", "--name", "[b]lake", "--json"),
    )
    assert built.keys() == documented("s4g gallery build`, `add`, `remove").own
    assert (built["num_tiles"], built["encoded"], built["version"]) == (96, 96, 1)
    assert s4g("add", target, synthetic.uri, "--json")["added"] == 24
    (tmp_path / "ids.txt").write_text("1\n2\n")
    assert s4g("remove", target, "--ids", str(tmp_path / "ids.txt"), "--json")["removed"] == 2
    south = s4g("remove", target, "--bounds=-180,-90,180,0", "--json")
    ring = [[-180, 0], [0, 0], [0, 90], [-180, 90], [-180, 0]]
    (tmp_path / "area.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    last = s4g("remove", target, "--area", str(tmp_path / "area.geojson"), "--json")
    assert last["num_tiles"] == 118 - south["removed"] - last["removed"]
    info = s4g("info", target, "--json")
    assert info.keys() == documented("s4g gallery info").own
    assert (info["num_tiles"], info["version"], info["dtype"]) == (last["num_tiles"], 5, "float32")
    assert info["bounds"][1] > 0
    shown = s4g("info", target)
    assert "[b]lake" in shown  # not taken for markup
    assert f"{last['num_tiles']}" in shown
    assert "test_convnext" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "/no/such"], "is no gallery: gallery.json is missing"),
        (["remove", "/no/such"], "give one of --area, --bounds and --ids"),
        (["remove", "/no/such", "--bounds", "1,2,3"], "--bounds 1,2,3 is not west,south"),
        (["remove", "/no/such", "--ids", "/no/ids"], "/no/ids cannot be read"),
        (["remove", "/no/such", "--area", __file__], "is not GeoJSON"),
        (["add", "/no/such", "/no/data"], "is no gallery"),
        (["build", "/no/model", "/no/data", "/no/target"], "/no/model is no run, no export"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        s4g(*arguments)


def test_the_job_takes_the_commands_arguments() -> None:
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, str(root / "jobs/gallery.py"), "info", "/no/such"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("s4g: /no/such is no gallery")
