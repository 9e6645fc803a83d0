"""Hours and memory are counted work times rates, and each stage names what binds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.config.loading import dump_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import InputError
from s4g_ray.index.cost import Cost
from s4g_ray.index.plan import plan_index
from s4g_ray.pipeline.budget.hours import (
    RAY_START_S,
    Machines,
    Stage,
    average_share,
    list_stages,
    total_seconds,
)
from s4g_ray.pipeline.budget.memory import list_memory
from s4g_ray.pipeline.budget.rates import Rates, read_rates
from s4g_ray.pipeline.budget.sizes import RunSizes
from tests.conftest import tiny_config

SIZES = RunSizes(
    rows={
        "queries": {"train": 1000, "val": 0, "test": 100, "gallery": 0},
        "references": {"train": 1000, "val": 0, "test": 100, "gallery": 300},
    },
    queries=1000,
    references=1000,
    pairs=1000,
    places=1000,
    gallery_references=0,
    gallery_places=0,
    parameters=10**6,
    dim=64,
)
RATES = Rates(
    load_pair_s=0.04,
    decode_s=0.01,
    train_pair_s=0.1,
    embed_s=0.02,
    plan_pair_s=0.001,
    graph_place_s=0.002,
    score_s=1e-5,
    write_bytes_s=1e8,
    process_start_s=3.0,
)
COSTS = {"pairs": Cost(train_s=0.0, build_s=2.0, search_s=4.0, queries_per_s=250.0)}


def configure(**sections: dict[str, Any]) -> RunConfig:
    train = {"epochs": 4, "num_workers": 2, "loader_processes": 2, **sections.pop("train", {})}
    embedding = {"num_actors": 2, **sections.pop("embedding", {})}
    return tiny_config("x", "y", train=train, embedding=embedding, **sections)


def stages_of(config: RunConfig, cpus: float = 64, rates: Rates = RATES) -> dict[str, Stage]:
    machines = Machines(cpus, 0, 1, "a test")
    return {stage.name: stage for stage in list_stages(config, SIZES, rates, machines, COSTS)}


def test_a_synchronous_run_takes_the_sum_of_its_stages() -> None:
    config = configure()
    stages = stages_of(config)
    wanted: dict[str, Any] = {
        "start of all processes": (pytest.approx(4 * 3.0), 1),  # controller, workers, actors, shard
        "geographic neighbors": (pytest.approx(2.0), 1),
        "plan": (pytest.approx(1.0), 4),
        "epoch": (pytest.approx(50.0), 4),  # 1000 pairs x 0.1 s on 2 workers
        "embed for mining": (pytest.approx(20.0), 3),  # 2000 images x 0.02 s on 2 actors
        "index pairs": (pytest.approx(2.0), 3),
        "search pairs": (pytest.approx(4.0), 3),
        "embed for evaluation": (pytest.approx(5.0), 3),  # 100 queries, 400 references
        "evaluate": (pytest.approx(0.4), 3),
    }
    assert {name: (one.seconds, one.count) for name, one in stages.items()} == wanted
    total = total_seconds(config, list(stages.values()))
    assert total == pytest.approx(12 + 2 + 4 * 51 + 3 * (20 + 6) + 3 * 5.4)
    assert stages["epoch"].binds == "the encoder, on the workers' CPUs"


def test_what_takes_longest_binds_a_stage() -> None:
    few = stages_of(configure(), cpus=1)
    assert few["epoch"].seconds == pytest.approx(100 + 40)  # all of it on one processor
    assert few["epoch"].binds == few["embed for mining"].binds == "1 CPU"
    assert few["embed for mining"].seconds == pytest.approx(40 + 20)
    slow = stages_of(configure(train={"loader_processes": 1, "use_gpu": True}), rates=RATES)
    assert slow["epoch"].binds == "the GPUs of the workers"
    fast = Rates(**{**vars(RATES), "train_pair_s": 0.001})
    loading = stages_of(configure(train={"loader_processes": 1, "use_gpu": True}), rates=fast)
    assert loading["epoch"].seconds == pytest.approx(1000 * 0.04 / 2)
    assert loading["epoch"].binds == "reading and decoding, on 2 loader_processes"


def test_rounds_beside_training_cost_what_exceeds_the_epochs_that_hide_them() -> None:
    mining = {"schedule": "overlap", "lag_epochs": 1, "every_epochs": 2}
    config = configure(mining=mining, train={"epochs": 8})
    stages = stages_of(config)
    round_s = 20 + 6 + (5 + 0.4)
    assert stages["embed for mining"].beside
    assert round_s < 51  # an epoch with its plan
    hidden = total_seconds(config, list(stages.values()))
    assert hidden == pytest.approx(12 + 2 + 8 * 51)
    slow = Rates(**{**vars(RATES), "embed_s": 0.2})
    longer = total_seconds(config, list(stages_of(config, rates=slow).values()))
    assert longer is not None
    assert longer > 12 + 2 + 8 * 51 + 3 * (200 - 51)


def test_processes_start_one_after_the_other_on_few_processors() -> None:
    config = configure(embedding={"num_actors": 5})
    stages = {}
    for cpus, starts_ray in ((2, False), (2, True)):
        machines = Machines(cpus, 0, 1, "a test", starts_ray)
        stages[starts_ray] = list_stages(config, SIZES, RATES, machines, COSTS)[0]
    assert stages[False].seconds == pytest.approx(3 * (1 + 1 + 3 + 1))
    assert stages[True].seconds == pytest.approx(3 * (1 + 1 + 3 + 1) + RAY_START_S)


def test_rotating_rounds_take_their_share_of_embedding_and_its_square_of_searching() -> None:
    config = configure(
        train={"epochs": 6}, mining={"refresh": "rotate", "refresh_share": 0.5, "every_epochs": 1}
    )
    stages = stages_of(config)
    assert average_share(config, 5) == pytest.approx((1 + 4 / 2) / 5)
    assert stages["embed for mining"].total == pytest.approx(20 * (1 + 4 / 2))
    assert stages["search pairs"].total == pytest.approx(4 * (1 + 4 / 4))


def test_an_unknown_rate_leaves_its_stage_and_the_run_unknown() -> None:
    config = configure(train={"use_gpu": True})
    stages = stages_of(config, rates=Rates(**{**vars(RATES), "train_pair_s": None}))
    assert stages["epoch"].seconds is None
    assert stages["epoch"].binds == "the GPUs of the workers: not known"
    assert total_seconds(config, list(stages.values())) is None


def test_rates_of_an_earlier_run_are_those_of_its_warm_epochs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text(dump_config(configure(embedding={"num_actors": 3})))
    with pytest.raises(InputError, match="holds no finished epoch"):
        read_rates(str(run))
    epoch = {"kind": "epoch", "workers": 2, "load_s": 1.0, "step_s": 9.0, "plan_s": 0.5}
    lines = [
        {**epoch, "epoch": 1, "pairs_per_s": 10.0},
        {**epoch, "epoch": 2, "pairs_per_s": 100.0},
        {**epoch, "epoch": 3, "pairs_per_s": 100.0},
        {"kind": "embedding", "epoch": 1, "warm_images_per_s": 600.0},
        {"kind": "embedding", "epoch": 2, "warm_images_per_s": 0.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = RATES.updated(read_rates(str(run)))
    assert found.train_pair_s == pytest.approx(2 / 100)
    assert found.embed_s == pytest.approx(3 / 600)
    assert found.plan_pair_s == pytest.approx(0.5 / 1000)
    assert found.graph_place_s == RATES.graph_place_s
    # its waits for images are in the rates, so decoding is not counted again
    assert stages_of(configure(), cpus=1, rates=found)["epoch"].seconds == pytest.approx(10)
    with pytest.raises(InputError, match=r"is no run's folder: run\.json is missing"):
        read_rates(str(tmp_path))


def test_memory_grows_with_the_places_of_each_process() -> None:
    many = RunSizes(**{**vars(SIZES), "pairs": 10**7, "places": 10**7, "queries": 10**7})
    config = configure(sampling={"neighbor_pool_size": 128, "max_pairs_per_cell": 10**8})
    plans = {"pairs": replace(plan_index(10**7, 64), num_shards=4)}
    found = {process.name: process for process in list_memory(config, many, plans)}
    assert found["driver"].gb == pytest.approx(1 + 0.64 + 0.48 + 5.12)
    assert found["training worker"].gb == pytest.approx(0.9 + 0.016)
    assert found["index shard (pairs)"].count == 4
    assert found["index shard (pairs)"].gb == plans["pairs"].peak_gb
    cells = configure(sampling={"neighbor_pool_size": 128, "max_pairs_per_cell": 10**6})
    found = {process.name: process for process in list_memory(cells, many, plans)}
    assert found["driver"].gb == pytest.approx(1 + 0.64 + 0.64)
    assert found["planning task"].gb == pytest.approx(0.512)
