from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import learning
from benchmarks.support.learning_run import LearningRun
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from tests.conftest import tiny_config

K = 4  # neighbors of a place


def make_config(dataset: GeoDataset, **sections: dict[str, Any]) -> RunConfig:
    parts: dict[str, dict[str, Any]] = {
        "train": {"epochs": 3, "batch_size": 16, "num_workers": 1, "learning_rate": 1e-3},
        "sampling": {"num_hard_negatives": 2, "neighbor_pool_size": K},
        "mining": {"every_epochs": 1},
    }
    for name, values in sections.items():
        parts[name] = {**parts.get(name, {}), **values}
    return tiny_config("-", dataset.uri, **parts)


@pytest.mark.parametrize("scope", ["global", "cells"])
def test_mined_neighbors_are_those_of_a_plain_search(synthetic: GeoDataset, scope: str) -> None:
    mining = {"scope": scope, "cell_places": 16, "far_references": 1000}
    trained = LearningRun(make_config(synthetic, mining=mining), 4, 1)
    trained.mine(1)
    split = trained.config.data.train_split
    queries = synthetic.table("queries", [split])
    references = synthetic.table("references", [split])
    scores = trained.embed(queries, "queries") @ trained.embed(references, "references").T
    graph = trained.graphs[1]
    for row, place in enumerate(graph.places):
        own = queries.place_ids == place
        best = scores[own].max(axis=0)
        best[references.place_ids == place] = -np.inf
        wanted = references.place_ids[np.argsort(-best)[:K]]
        found = graph.places[graph.rows[row]]
        others = [best[np.flatnonzero(references.place_ids == one)].max() for one in found]
        np.testing.assert_allclose(others, np.sort(best)[::-1][:K], atol=1e-5)
        assert len(set(found) & set(wanted)) >= K - 1  # equal scores aside


def test_a_run_is_measured_at_equal_steps_and_needs_enough_epochs(synthetic: GeoDataset) -> None:
    curve = LearningRun(make_config(synthetic), 8, 2).run().record()
    assert curve["steps"] == [0, 4, 8]
    assert [set(point) for point in curve["metrics"]] == [set(curve["metrics"][0])] * 3
    assert curve["metrics"][2]["recall@1"] >= curve["metrics"][0]["recall@1"]
    assert curve["loss"][2] < curve["loss"][1]
    with pytest.raises(ValueError, match="3 epochs have 18 steps, but 40 are asked for"):
        LearningRun(make_config(synthetic), 40, 2)


def test_epochs_of_whole_batches_have_the_steps() -> None:
    # 1,527 pairs, as earth has: 23 batches of the 1,481 that a plan keeps
    assert learning.count_epochs(900, 1527, 64) == 40
    assert learning.count_epochs(23, 1527, 64) == 1
    assert learning.count_epochs(24, 1527, 64) == 2


def write_run(arm: str, seed: int, recalls: list[float], **changes: Any) -> None:
    point = {"recall@5": 0.5, "recall@10": 0.6, "median_error_m": 100.0}
    run = {
        "arm": arm,
        "seed": seed,
        **learning.describe_run("landsat", arm),
        "steps": [0, 100, 200],
        "metrics": [{"recall@1": recall, **point} for recall in recalls],
        "train_recall": [0.1, 0.2, 0.5],
        "hardness": [1.0, 2.0],
        "cpu_s": 1,
        **changes,
    }
    learning.keep_run("landsat", run)


def test_arms_are_compared_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "RUNS", tmp_path)
    for seed, (plain, mined) in enumerate([(0.20, 0.24), (0.30, 0.33), (0.25, 0.30)], 1):
        write_run("random", seed, [0.0, plain - 0.1, plain])
        write_run("mined", seed, [0.0, mined - 0.1, mined])
    settings = learning.describe_run("landsat", "mined")["settings"]
    write_run("mined", 5, [0.0, 0.1, 0.1], settings={**settings, "model.name": "another"})
    write_run("mined", 6, [0.0, 0.1, 0.1], settings={**settings, "train.unknown": 1})
    before = {key: value for key, value in settings.items() if key != "train.soft_labels"}
    write_run("mined", 4, [0.0, 0.9, 0.9], settings=before)  # has no pair
    runs = learning.read_runs("landsat")
    assert learning.seeds_of(runs, "mined") == [1, 2, 3, 4]
    row = learning.describe_arm(runs, "mined")
    assert row[0:2] == ["mined", 4]
    # differences 4, 3 and 5 points: mean 4, standard error 1 / sqrt(3), t = 6.93 with 2 degrees of
    # freedom; p = 2 (1 - F(t)) = 1 - t / sqrt(2 + t^2)
    t = 4 * 3**0.5
    assert row[6] == "+4.0 ± 0.6 to random"
    assert row[7] == f"{1 - t / (2 + t * t) ** 0.5:.3f}"
    # mean curve of the pairs: 0, 19 and 29 %; the end of random is 25 %
    assert row[8] == "160"
    assert learning.describe_arm(runs, "random")[6:9] == ["", "", ""]
    lines = (tmp_path / "landsat.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [1, 1, 2, 2, 3, 3, 5, 6, 4]
