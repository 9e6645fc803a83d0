"""A user's names and paths are shown as they are, whatever rich makes of them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.config.loading import dump_config
from s4g_ray.data.dataset import GeoDataset
from tests.conftest import tiny_config
from tests.support.display_calls import find_in_package, find_markup
from tests.support.evaluated_runs import GRID, SOUTH, write_ground, write_run
from tests.support.galleries import write_weights

ROOT = Path(__file__).parents[2]
NAME = "[bold] :bus: [/x] run"  # closes what is not open, which rich refuses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a run, a configuration and weights, all of such names."""
    made = tmp_path_factory.mktemp("display") / NAME
    made.mkdir(parents=True)
    ground = write_ground(made / "data")
    vectors = np.eye(GRID * GRID)
    write_run(made / "run", ground, queries=vectors, references=vectors)
    config = tiny_config(made / "new", ground.uri, model={"name": "test_convnext"})
    (made / "config.yaml").write_text(dump_config(config))
    write_weights(made)
    rows = ground.references.to_table().to_pylist()
    for name in ("queries", "references"):
        with (made / f"data/{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "lat", "lon", "region"])
            writer.writerows([row["uri"], row["lat"], row["lon"], row["region"]] for row in rows)
    return made


def shown(*arguments: str) -> str:
    """Run a command; return what it prints, in one line."""
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert not re.search(r" $", done.stdout, re.MULTILINE)
    return " ".join(done.output.split())


def test_tables_in_a_pipe_are_as_wide_as_they_need_and_end_without_blanks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    done = CliRunner().invoke(app, ["configs"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert len(lines) == len(list((ROOT / "configs").glob("*.yaml")))
    assert max(map(len, lines)) > 80
    assert [line for line in lines if line != line.rstrip()] == []


def test_commands_show_names_and_paths_as_they_are(folder: Path) -> None:
    data = str(folder / "data")
    assert SOUTH in shown("check", data)
    assert f"{NAME}/run/report.html" in shown("report", str(folder / "run"))
    assert SOUTH in (folder / "run/report.html").read_text()
    target = str(folder / "converted")
    options = ("--region-column", "region", "--name", NAME)
    assert f"{NAME}: " in shown("convert", "folder", data, target, *options)
    weights = str(folder / "weights-0.safetensors")
    gallery = str(folder / "gallery")
    config = str(folder / "config.yaml")
    made = shown("gallery", "build", weights, data, gallery, "--config", config, "--name", NAME)
    assert f"{NAME}/gallery: 64 tiles" in made
    assert f"gallery {NAME} (" in shown("gallery", "info", gallery)
    photo = str(folder / "data/images/tile <3>.png")
    assert photo in shown("locate", gallery, photo)


@pytest.mark.cluster
def test_stages_on_a_cluster_show_names_and_paths_as_they_are(
    folder: Path, synthetic: GeoDataset, ray_cluster: None
) -> None:
    data = str(folder / "data")
    weights = str(folder / "weights-0.safetensors")
    config = ("--config", str(folder / "config.yaml"))
    out = ("--out", str(folder / "out"))
    assert SOUTH in shown("evaluate", weights, data, *config, *out)
    assert (folder / "out/result.json").exists()
    table = str(folder / "table")
    shown("embed", weights, data, table, *config)
    assert f"{NAME}/table is finished already" in shown("embed", weights, data, table, *config)
    graph = str(folder / "graph")
    shown("mine", table, graph, *config)
    assert f"{NAME}/graph is finished already" in shown("mine", table, graph, *config)


def test_no_text_is_read_as_markup() -> None:
    assert find_in_package(ROOT) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from rich.markup import escape", "imports rich.markup"),
        ("from rich import print", "imports rich"),
        ("import rich", "imports rich itself; import what is used"),
        ("x = Text.from_markup(name)", "from_markup"),
        ("Console(markup=False, emoji=False)", "Console: use progress.make_console"),
        ("TextColumn('{task.description}')", "TextColumn without markup=False"),
    ],
)
def test_the_check_finds_each_breach(source: str, found: str) -> None:
    assert find_markup("s4g_ray/other.py", source) == [f"s4g_ray/other.py:1: {found}"]
    maker = "def make_console():\n    Console(markup=True, emoji=False)"
    assert len(find_markup("s4g_ray/progress.py", maker)) == 1
