"""The stages of benchmarks.scale, each as the driver of a process of its own.

    python -m benchmarks.support.scale_stages STAGE FOLDER [ARGUMENT ...]

Prints a line of JSON: seconds within the stage, without imports and the start of Ray, and counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import MiningConfig, RunConfig

DIM = 64
K = 32
QUERIES = 2000  # of an index
CONFIG = """\
run_dir: {run}
data:
  uri: {data}
  query_size: [16, 16]
  reference_size: [16, 16]
model:
  name: test_resnet
  pretrained: false
  head: linear
  embedding_dim: {dim}
train:
  epochs: 2
  batch_size: 128
  num_workers: 2
  loader_processes: 0
  precision: fp32
  channels_last: false
  warmup_epochs: 0
  log_every_steps: 20
  cpus_per_worker: 0.5
sampling:
  mode: similarity
  num_hard_negatives: 32
  neighbor_pool_size: {k}
mining:
  every_epochs: 1
  min_recall: 0.5
embedding:
  num_actors: 2
  batch_size: 512
evaluation:
  before_training: false
ray:
  num_cpus: 4
"""


def write_config(folder: Path) -> Path:
    """Write the configuration of all stages."""
    path = folder / "config.yaml"
    text = CONFIG.format(run=folder / "run", data=folder / "data", dim=DIM, k=K)
    path.write_text(text)
    return path


def load(folder: Path) -> RunConfig:
    """Load the configuration of all stages."""
    return load_config(folder / "config.yaml")


def write_data(folder: Path, num_places: str) -> dict[str, Any]:
    """Write the data set."""
    from benchmarks.support.scale_data import write_scale_dataset

    write_scale_dataset(folder / "data", int(num_places))
    return {}


def open_data(folder: Path) -> dict[str, Any]:
    """Open the data set, which validates it."""
    from s4g_ray.data.dataset import open_dataset

    open_dataset(str(folder / "data"))
    return {}


def _open_graphs(folder: Path) -> Any:
    from s4g_ray.data.dataset import open_dataset
    from s4g_ray.data.train_split import TrainSplit
    from s4g_ray.pipeline.rounds.graphs import RunGraphs
    from s4g_ray.pipeline.run_folder import RunFolder

    config = load(folder)
    dataset = open_dataset(config.data.uri)
    split = TrainSplit.read(config, dataset)
    run = RunFolder(str(folder / "stages"), config, {}, [], [])
    return RunGraphs.from_config(config, split, dataset.fingerprint, run)


def write_graph(folder: Path) -> dict[str, Any]:
    """Write the geographic graph."""
    _open_graphs(folder).write_geographic()
    return {}


def plan(folder: Path, version: str = "0") -> dict[str, Any]:
    """Plan an epoch with a version of the graph."""
    from s4g_ray.pipeline.planner import Planner

    planner = Planner(_open_graphs(folder), seed=0, protocol="strict")
    record = planner.plan_epoch(int(version) + 1, int(version), due=int(version))
    return {"hardness": record["hardness"], "left out": record["pairs_left_out"]}


def index(folder: Path, kind: str, num_shards: str) -> dict[str, Any]:
    """Build an index and search it for QUERIES embeddings of queries."""
    import ray

    from s4g_ray.data.tables.embedding_table import sample_queries
    from s4g_ray.distributed.session import ray_session
    from s4g_ray.index.sharded.service import IndexService

    config = load(folder)
    cfg = MiningConfig.model_validate(
        {"index_kind": kind, "num_shards": int(num_shards), "index_threads": 1, "min_recall": 0.5}
    )
    table = str(folder / "embeddings")
    uri = str(folder / f"index-{kind}-{num_shards}")
    rng = np.random.default_rng(0)
    query_ids = np.load(folder / "query_ids.npy")
    _, sample = sample_queries(table, query_ids, QUERIES, rng)
    with ray_session(config.ray, config.storage), IndexService(cfg, uri) as service:
        started = time.perf_counter()
        report = service.build(0, table, sample=sample[:256], k=K)
        built = time.perf_counter()
        service.search(0, sample, K)
        searched = time.perf_counter()
        ray.get(ray.put(0))
    return {
        "build s": round(built - started, 2),
        "search s": round(searched - built, 2),
        "recall": report.recall,
        "effort": report.effort,
    }


def ids(folder: Path) -> dict[str, Any]:
    """Write the ids of the train queries."""
    graphs = _open_graphs(folder)
    np.save(folder / "query_ids.npy", graphs.split.query_ids)
    return {}


STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "write_data": write_data,
    "open": open_data,
    "graph": write_graph,
    "plan": plan,
    "index": index,
    "ids": ids,
}


def main(arguments: list[str]) -> None:
    """Run a stage and print its time and counts."""
    name, folder, *rest = arguments
    started = time.perf_counter()
    counts = STAGES[name](Path(folder), *rest)
    print(json.dumps({"seconds": time.perf_counter() - started, **counts}))


if __name__ == "__main__":
    main(sys.argv[1:])
