"""The disk of a run: no more than a simulated run holds, and compared with what is free."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from s4g_ray.amounts import format_bytes
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.batch_plan import BatchPlan, PlanStats
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.errors import InputError
from s4g_ray.pipeline.budget.disk import (
    check_room,
    checkpoint_bytes,
    describe_stocks,
    graph_bytes,
    list_stocks,
    plan_bytes,
    table_bytes,
)
from s4g_ray.pipeline.budget.disk_check import check_disk
from s4g_ray.pipeline.budget.sizes import RunSizes
from s4g_ray.pipeline.retention.artefacts import Keep
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import RunFolder
from s4g_ray.progress import Reporter
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config
from tests.support.simulated_run import SimulatedRun

GB = 10**9


@pytest.fixture(scope="module")
def sizes(synthetic: GeoDataset) -> RunSizes:
    config = tiny_config("x", synthetic.uri)
    encoder = Encoder.build(config.model)
    return RunSizes.read(synthetic, TrainSplit.read(config, synthetic), encoder)


def test_sizes_are_counted_from_the_data_set_and_the_encoder(sizes: RunSizes) -> None:
    assert sizes.rows["queries"] == {"train": NUM_TRAIN, "val": 0, "test": NUM_TEST, "gallery": 0}
    assert sizes.pairs == sizes.places == sizes.references == NUM_TRAIN
    config = tiny_config("x", "y")
    assert sizes.mined_images(config) == {"queries": NUM_TRAIN, "references": NUM_TRAIN}
    assert sizes.scored_images(config) == {"queries": NUM_TEST, "references": NUM_TEST}
    assert sizes.scored_pairs(config) == NUM_TEST**2


@pytest.mark.parametrize("when_late", ["wait", "reuse"])
def test_no_simulated_run_holds_more_than_the_bound(sizes: RunSizes, when_late: str) -> None:
    for seed in range(150):
        rng = random.Random(seed)
        every, lag, overlaps = rng.randint(1, 4), rng.randint(0, 5), rng.random() < 0.6
        keep = Keep(*rng.choices([0, 1, 2], k=3))
        config = tiny_config(
            "x",
            "y",
            data={"val_split": "val"},
            train={"epochs": rng.randint(1, 16)},
            mining={
                "every_epochs": every,
                "lag_epochs": lag,
                "schedule": "overlap" if overlaps else "sync",
                "when_late": when_late,
                "keep": keep.graphs,
            },
            embedding={"keep": keep.embeddings},
            sampling={"keep_plans": keep.plans},
            checkpoint={"keep": rng.randint(1, 3)},
            evaluation={"every_epochs": rng.randint(1, 5)},
        )
        run = SimulatedRun(Schedule(config), keep, seed=seed, crashes=0, failures=0)
        run.run()
        for stock in list_stocks(config, sizes):
            assert run.most[stock.name] <= stock.count, (seed, stock)


def test_the_bytes_of_one_are_those_of_real_files(tmp_path: Path, sizes: RunSizes) -> None:
    config = tiny_config("x", "y", sampling={"neighbor_pool_size": 64, "num_hard_negatives": 8})
    rng = np.random.default_rng(0)
    count = 2000
    own = replace(sizes, places=count, pairs=count)
    graph = NeighborGraph(
        np.arange(count) + 10**8,
        rng.integers(0, 10**8, (count, 64)),
        rng.uniform(0, 1, (count, 64)).astype(np.float32),
    )
    (part,) = graph.save(str(tmp_path / "graph")).parts
    assert 0.7 * graph_bytes(config, own) < part.num_bytes <= graph_bytes(config, own)
    ids = rng.permutation(10**7)[:count] * 1000
    batches = rng.permutation(count).reshape(-1, 16)
    stats = PlanStats(count, count, 0, 1.0)
    BatchPlan(batches, stats).save(str(tmp_path / "plan"), PairTable(ids, ids, ids))
    overhead = 4000  # of a Parquet file
    size = (tmp_path / "plan").stat().st_size
    assert 0.5 * plan_bytes(config, own) < size <= plan_bytes(config, own) + overhead
    assert checkpoint_bytes(config, sizes) == 12 * sizes.parameters
    rows = 2 * (NUM_TRAIN + NUM_TEST)
    assert table_bytes(config, sizes) == rows * (2 * sizes.dim + 16)  # float16


def test_a_file_system_with_less_is_warned_of_and_one_without_room_for_two_refused(
    sizes: RunSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocks = list_stocks(tiny_config("x", "y"), sizes, [2e9])
    total = sum(stock.total for stock in stocks)
    line = describe_stocks(stocks)
    assert line.startswith(f"disk: at most {format_bytes(total)}: checkpoints ")
    assert "indexes 3 x 2 GB" in line

    def room(free: int, held: int = 0, run: str = "/runs/a") -> str | None:
        monkeypatch.setattr("s4g_ray.pipeline.budget.disk.free_bytes", lambda _: free)
        return check_room(run, stocks, held)

    assert room(total) is None
    assert room(total - GB, held=GB) is None
    assert room(0, run="s3://bucket/run") is None
    warning = room(total - GB)
    assert warning is not None
    assert f"may take up to {format_bytes(total)}; choose another run_dir" in warning
    assert "has 1 GB for this run" in str(room(GB))  # the index may be of a smaller kind
    with pytest.raises(InputError, match="has 10 kB for this run, which needs at least 5"):
        room(10_000)


def test_a_run_without_room_is_refused_before_anything_is_written(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", synthetic.uri)
    folder = RunFolder.open(config, synthetic, resume=False)
    split = TrainSplit.read(config, synthetic)
    lines: list[str] = []
    reporter: Any = SimpleNamespace(line=lines.append)
    check_disk(folder, synthetic, split, Encoder.build(config.model), reporter)
    assert len(lines) == 1
    monkeypatch.setattr("s4g_ray.pipeline.budget.disk.free_bytes", lambda _: 1000)
    with pytest.raises(InputError, match="needs at least"):
        check_disk(folder, synthetic, split, Encoder.build(config.model), Reporter())
    assert not (tmp_path / "run").exists()
    folder.info["status"] = "done"
    check_disk(folder, synthetic, split, Encoder.build(config.model), Reporter())
