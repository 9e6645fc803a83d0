"""A run with a validation split, loader processes, micro-batches and one kept checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.pipeline.records import read_records
from s4g_ray.pipeline.rounds.mining_round import best_epoch
from s4g_ray.pipeline.run import run
from s4g_ray.storage import files
from tests.conftest import NUM_TEST, tiny_config, with_validation


def test_the_best_epoch_is_the_first_with_the_highest_metric_on_the_validation_split() -> None:
    records = [
        {"kind": kind, "epoch": epoch, "recall@1": value}
        for kind, epoch, value in (
            ("validation", 0, 0.1),
            ("evaluation", 1, 0.9),
            ("validation", 1, 0.5),
            ("validation", 2, 0.4),
            ("validation", 3, 0.5),
        )
    ]
    assert best_epoch(records, "recall@1") == {"epoch": 1, "metric": "recall@1", "value": 0.5}


@pytest.fixture
def validated(synthetic: GeoDataset, tmp_path: Path) -> GeoDataset:
    return with_validation(synthetic, tmp_path / "data")


@pytest.mark.cluster
def test_the_best_checkpoint_by_the_validation_split_outlives_newer_ones(
    warm_pool: None, validated: GeoDataset, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "run",
        validated.uri,
        data={"val_split": "val"},
        checkpoint={"keep": 1},
        train={
            "num_workers": 1,
            "loader_processes": 1,
            "micro_batch_size": 3,
            "learning_rate": 0.02,
        },
        evaluation={"every_epochs": 1},
        mining={"schedule": "overlap", "lag_epochs": 1, "every_epochs": 1},
        sampling={"mode": "geographic"},
    )
    result = run(config)
    records = read_records(config.run_dir)
    scores = {r["epoch"]: r["recall@1"] for r in records if r["kind"] == "validation"}
    assert set(scores) == {0, 1, 2, 3}
    best = min(epoch for epoch in scores if scores[epoch] == max(scores.values()))
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert info["best"] == {"epoch": best, "metric": "recall@1", "value": scores[best]}
    assert files.list_names(f"{config.run_dir}/checkpoints") == [
        f"epoch={e:04d}" for e in sorted({0, best, 3})
    ]
    (tested,) = (r for r in records if r["kind"] == "evaluation" and r["epoch"] == 3)
    assert tested["queries"] == NUM_TEST // 2
    assert result.metrics["recall@1"] == tested["recall@1"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert all(np.isfinite([r["loss"], r["load_wait"], r["wait_share"]]).all() for r in epochs)
    assert "(best)" in (tmp_path / "run/report.html").read_text() or best == 0
