"""Shared fixtures: a small synthetic data set, one Ray session, an object store.

The environment is set before Ray is imported.
"""

from __future__ import annotations

import os

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    # a busy machine needs more than Ray's 30 s to start a node or an agent, and 60 s for a worker
    RAY_raylet_start_wait_time_s="300",
    RAY_worker_register_timeout_seconds="300",
    RAY_agent_register_timeout_ms="300000",
    RAY_memory_monitor_refresh_ms="0",  # it kills tasks for the memory that others use
    # set, it leaves malloc as it is: that of a test's process, and workers that start at once
    MALLOC_ARENA_MAX="1",
)

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray
from PIL import Image

from benchmarks.support.s3_server import client, environment, serving
from s4g_ray.config.loading import parse_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.freed_memory import VARIABLES
from s4g_ray.storage import files, object_store
from tests.support import forked_processes
from tests.support.faulty_s3 import Store, copy_dataset, proxied

if TYPE_CHECKING:
    from s4g_ray.encoder.actors import EncoderPool

NUM_TRAIN, NUM_TEST, SIZE = 96, 24, 32

# a busy machine is slow, and each run draws the same examples
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


def tile(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A smooth random pattern: what both views of a place show."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def tables(rows: int = 4) -> tuple[pa.Table, pa.Table]:
    """Minimal reference and query tables of `rows` train places."""
    ids = np.arange(rows)
    columns: dict[str, Any] = {
        "id": ids,
        "place_id": ids + 100,
        "uri": [f"{i}.jpg" for i in ids],
        "lat": np.linspace(-10.0, 10.0, rows),
        "lon": np.linspace(20.0, 30.0, rows),
        "split": ["train"] * rows,
    }
    return pa.table(columns), pa.table(columns)


def write_synthetic(folder: Path, num_gallery: int = 0) -> GeoDataset:
    """Write NUM_TRAIN + NUM_TEST places, and `num_gallery` train references without a query.

    A reference is a pattern; its query is the same with channels swapped and noise.
    """
    rng = np.random.default_rng(7)
    count = NUM_TRAIN + NUM_TEST + num_gallery
    for view in ("references", "queries"):
        (folder / "images" / view).mkdir(parents=True)
    for i in range(count):
        reference = tile(rng)
        noise = rng.integers(-20, 21, reference.shape)
        query = np.clip(reference[..., ::-1].astype(int) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(reference).save(folder / f"images/references/{i}.png")
        Image.fromarray(query).save(folder / f"images/queries/{i}.png")
    lat, lon = rng.uniform(-60, 60, count), rng.uniform(-180, 180, count)
    made = {}
    for view in ("references", "queries"):
        made[view] = pa.table(
            {
                "id": np.arange(count),
                "place_id": np.arange(count) + 1000,
                "uri": [f"images/{view}/{i}.png" for i in range(count)],
                "lat": lat,
                "lon": lon,
                "split": ["train"] * NUM_TRAIN + ["test"] * NUM_TEST + ["train"] * num_gallery,
            }
        )
    made["queries"] = made["queries"].slice(0, NUM_TRAIN + NUM_TEST)
    return write_dataset(str(folder), made["references"], made["queries"], name="synthetic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup, tests on hosts of their own run beside those that share a session."""
    for item in items:
        group = "session" if item.get_closest_marker("hosts") is None else "hosts"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def malloc_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user who has not chosen how malloc works."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_synthetic(tmp_path_factory.mktemp("data") / "synthetic")


def with_validation(synthetic: GeoDataset, folder: Path, name: str = "validated") -> GeoDataset:
    """Write the same images with half of the test places as validation split, in two regions."""
    made = []
    for table in (synthetic.references.to_table(), synthetic.queries.to_table()):
        split = ["train"] * NUM_TRAIN + ["val"] * (NUM_TEST // 2) + ["test"] * (NUM_TEST // 2)
        uris = [files.join(synthetic.uri, uri) for uri in table["uri"].to_pylist()]
        for column, values in (
            ("split", split),
            ("uri", uris),
            ("region", [name, "elsewhere"] * (len(uris) // 2)),
        ):
            table = table.sort_by("id").set_column(
                table.column_names.index(column), column, pa.array(values)
            )
        made.append(table)
    return write_dataset(str(folder), *made, name=name)


def tiny_config(run_dir: Path | str, dataset: str, **sections: dict[str, Any]) -> RunConfig:
    """A configuration that runs in seconds; keyword arguments change its sections."""
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "seed": 3,
        "data": {"uri": dataset, "query_size": [SIZE, SIZE], "reference_size": [SIZE, SIZE]},
        "augment": {"dropout_probability": 0.0},
        "model": {"name": "test_convnext", "pretrained": False},
        "train": {
            "epochs": 3,
            "batch_size": 16,
            "num_workers": 2,
            "learning_rate": 1e-3,
            "warmup_epochs": 0.5,
            "precision": "fp32",
            "channels_last": False,
            "log_every_steps": 1,
            "loader_processes": 0,
        },
        # tests look at all artefacts of a run
        "sampling": {
            "mode": "similarity",
            "num_hard_negatives": 6,
            "neighbor_pool_size": 12,
            "keep_plans": 9,
        },
        "mining": {"every_epochs": 1, "keep": 9},
        "embedding": {"part_mb": 0.005, "num_actors": 1, "keep": 9},
        "evaluation": {"every_epochs": 3},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_config(tree)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray session for all tests that need one."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in forked_processes.variables().items():
            patch.setenv(name, value)
        ray.init(
            "local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="s4g-tests"
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def lent_pools(ray_cluster: None) -> Iterator[list[EncoderPool]]:
    """The first of them lends its actors to all others, and stops them at the end."""
    from s4g_ray.encoder.actors import EncoderPool

    pools: list[EncoderPool] = []
    yield pools
    for pool in pools[:1]:
        EncoderPool.__exit__(pool)


@pytest.fixture(scope="module")
def warm_pool(lent_pools: list[EncoderPool]) -> Iterator[None]:
    """Embedding actors that stay between commands and runs; they load the weights of each job."""
    from s4g_ray.encoder.actors import EncoderPool

    class Lent(EncoderPool):
        def __enter__(self) -> Any:
            lent_pools.append(self)
            return lent_pools[0]

        def __exit__(self, *_: object) -> None:
            pass

        def job(self) -> Any:
            return super().job() if self is lent_pools[0] else lent_pools[0].job()

    with pytest.MonkeyPatch.context() as patch:
        for module in ("driver", "stages.table_job", "stages.evaluation_job"):
            patch.setattr(f"s4g_ray.pipeline.{module}.EncoderPool", Lent)
        yield


def overlapped_config(run_dir: Path | str, dataset: str, **sections: dict[str, Any]) -> RunConfig:
    """Four epochs, mining beside training, a checkpoint every other step; for runs with faults."""
    changed: dict[str, dict[str, Any]] = {
        "ray": {"num_cpus": 4},
        "train": {"epochs": 4},
        "checkpoint": {"every_steps": 2},
        "mining": {
            "schedule": "overlap",
            "every_epochs": 1,
            "lag_epochs": 1,
            "exact_engine": "torch",
            "keep": 0,
        },
        "embedding": {"keep": 0},
        "evaluation": {"every_epochs": 2, "before_training": False},
    }
    for name, values in sections.items():
        changed[name] = {**changed.get(name, {}), **values}
    return tiny_config(run_dir, dataset, **changed)


@pytest.fixture(scope="session")
def undisturbed(
    synthetic: GeoDataset, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A run of overlapped_config that nothing has happened to."""
    from s4g_ray.pipeline.run import run

    config = overlapped_config(tmp_path_factory.mktemp("undisturbed") / "run", synthetic.uri)
    assert run(config).finished
    return config


ATTEMPTS = 6  # of a request to the store


@pytest.fixture(scope="session")
def object_server(synthetic: GeoDataset) -> Iterator[Store]:
    """A store with the synthetic data set as s3://data/synthetic."""
    with serving("data") as endpoint, proxied(endpoint) as proxy:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(endpoint).items():
                patch.setenv(name, value)
            copy_dataset(synthetic, "s3://data/synthetic")
        yield Store(proxy, client(endpoint))


@pytest.fixture
def store(object_server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store, reached through its proxy by the environment; waits between attempts are short."""
    for name, value in {
        **environment(object_server.proxy.endpoint),
        "AWS_MAX_ATTEMPTS": str(ATTEMPTS),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "LONGEST_WAIT_S", 0.02)
    object_server.proxy.reset()
    return object_server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch in one thread: for small tensors, starting threads takes longer than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
