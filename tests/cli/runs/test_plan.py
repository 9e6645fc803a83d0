"""`s4g plan`: what a run will take, from its data set and this machine, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from s4g_ray.cli.app import app
from s4g_ray.config.loading import dump_config
from s4g_ray.data.dataset import GeoDataset
from tests.conftest import NUM_TRAIN, tiny_config


@pytest.fixture
def config(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.setattr("s4g_ray.pipeline.budget.measure.MEASURE_S", 0.01)
    monkeypatch.setattr("s4g_ray.pipeline.budget.measure.WRITTEN", 10_000)
    monkeypatch.setattr("s4g_ray.pipeline.budget.measure.LOADED", "json")
    monkeypatch.setattr("s4g_ray.index.rates.MEASURE_S", 0.01)
    path = tmp_path / "config.yaml"
    ray = {"num_cpus": 4}
    path.write_text(dump_config(tiny_config(tmp_path / "run", synthetic.uri, ray=ray)))
    return {"path": str(path), "run": tmp_path / "run"}


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})


def test_disk_memory_actors_and_hours_are_shown_and_nothing_is_written(
    config: dict[str, Any],
) -> None:
    done = plan(config["path"])
    assert done.exit_code == 0, done.stderr
    for words in (
        "checkpoints",
        "embeddings",
        "graphs",
        "at most",
        "training worker",
        "index shard (pairs)",
        "start of all processes",
        "geographic neighbors",
        "embed for mining",
        "the run",
        f"{NUM_TRAIN} pairs of {NUM_TRAIN} places",
        "1 node with 4 CPUs and 0 GPUs: ray.num_cpus on this machine",
        "index of pairs: flat in 1 shard",
        "most of the work: ",
        "speed of this machine",
    ):
        assert words in done.stdout, words
    assert not config["run"].exists()


def test_json_holds_all_figures_and_names_what_does_not_fit(
    config: dict[str, Any],
) -> None:
    done = plan(config["path"], "--json", "ray.num_cpus=1", "train.num_workers=4")
    found = json.loads(done.stdout)
    assert found["disk_bytes"] == sum(stock["total"] for stock in found["disk"])
    assert found["seconds"] > 0
    assert all(stage["seconds"] >= 0 for stage in found["stages"])
    (fault,) = found["faults"]
    assert "lower num_workers" in fault
    assert found["rates"]["decode_s"] > 0


def test_a_run_that_is_none_is_refused_before_anything_is_measured(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("s4g_ray.pipeline.budget.plan.measure_rates", measure)
    done = plan(config["path"], "--rates", "nowhere")
    assert "nowhere is no run's folder: run.json is missing" in str(done.exception)


def test_a_misspelt_key_is_reported_at_once(config: dict[str, Any]) -> None:
    done = plan(config["path"], "train.epoch=3")
    assert done.exit_code == 1
    assert "did you mean 'train.epochs'" in str(done.exception)
