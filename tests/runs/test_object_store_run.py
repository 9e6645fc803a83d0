"""Data sets, tables and a whole run on an S3 server of another process, through faults."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.support.s3_server import ACCESS_KEY, SECRET_KEY
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.data.images import ImageFile, read_images
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.tables.batch_plan import load_plan, load_record
from s4g_ray.data.tables.embedding_table import read_part_head
from s4g_ray.data.tables.neighbor_graph import read_graph_samples, write_graph_part
from s4g_ray.errors import StoreError
from s4g_ray.pipeline.run import run
from s4g_ray.sampling.sampler import plan_batches
from s4g_ray.storage import files
from s4g_ray.storage.manifest import write_part
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config
from tests.mining.test_overlap import random_graph
from tests.support.faulty_runs import Command
from tests.support.faulty_s3 import PASSING, Store, objects, seeded

pytestmark = pytest.mark.s3
EMBEDDING = pa.list_(pa.float32(), 4)


def test_opening_a_data_set_and_loading_a_batch_lists_no_image_and_asks_for_each_of_the_batch_once(
    store: Store, synthetic: GeoDataset
) -> None:
    dataset = open_dataset("s3://data/synthetic")
    config = tiny_config("unused", synthetic.uri)
    for view in VIEWS:
        dataset.table(view, ["train"])
    opening = Counter(
        (what, key.removeprefix("data/synthetic/")) for what, key in store.proxy.requests
    )
    asked = {(what, key) for what, key in opening if not key.endswith("/part-00000.parquet")}
    assert asked == {("GET", "dataset.json"), ("LIST", "references"), ("LIST", "queries")}
    assert max(count for (_, key), count in opening.items() if not key.endswith("parquet")) == 1
    batch = np.arange(16)[None]
    batches = []
    for used in (dataset, synthetic):
        queries, references = (used.table(view, ["train"]) for view in VIEWS[::-1])
        store.proxy.reset()
        with PairLoader(queries, references, config.data, config.augment, seed=1) as loader:
            batches += list(loader.load(batch, batch, epoch=1))
        if used is dataset:
            wanted = [
                f"data/synthetic/images/{view}/{i}.png"
                for view in ("queries", "references")
                for i in range(16)
            ]
            assert Counter(store.proxy.requests) == Counter(("GET", key) for key in wanted)
    assert (batches[0].queries == batches[1].queries).all()
    assert (batches[0].references == batches[1].references).all()


def test_the_requests_that_open_a_data_set_do_not_grow_with_its_images(store: Store) -> None:
    open_dataset("s3://data/synthetic")
    assert len(store.proxy.requests) == 9
    assert len(objects(store.client, "data", "synthetic/")) > 2 * (NUM_TRAIN + NUM_TEST)


def test_an_image_that_is_missing_is_bad_and_a_store_that_does_not_answer_is_not_its_fault(
    store: Store,
) -> None:
    files = [ImageFile(5, "s3://data/synthetic/images/none.png", None, None, 0.0)]
    assert "id 5, s3://data/synthetic/images/none.png" in str(next(read_images(files)))
    store.proxy.reset(lambda what, key, number: "internal")
    with pytest.raises(StoreError, match=r"none\.png: InternalError"):
        next(read_images(files))


def test_tables_are_read_by_pieces_through_faults_and_an_outage_is_not_taken_for_damage(
    store: Store, synthetic: GeoDataset
) -> None:
    """The data set's columns, a plan, some rows of a graph, the head of an embedding table."""
    graph, folder = random_graph(list(range(30)), 4, 0), "s3://data/tables"
    graph_part = write_graph_part(folder, 0, graph)
    embedded = pa.table(
        {"id": [3, 5], "place_id": [30, 50], "embedding": pa.array([[1.0] * 4] * 2, EMBEDDING)}
    )
    buffer = io.BytesIO()
    pq.write_table(embedded, buffer)
    part = write_part(folder, "embeddings.parquet", buffer.getvalue(), 2)
    pairs = synthetic.pairs("train")
    plan = plan_batches(
        pairs, None, batch_size=16, seed=1, epoch=1, num_hard_negatives=2, neighbor_pool_size=4
    )
    plan.save(f"{folder}/plan.parquet", pairs, record='{"hardness": 1}')

    def read() -> list[Any]:
        dataset = open_dataset("s3://data/synthetic")
        return [
            dataset.pairs("train").query_ids.tolist(),
            dataset.table("references", ["test"]).lat.tolist(),
            [group.ids.tolist() for group in read_graph_samples(folder, graph_part)],
            read_part_head(folder, part).ids.tolist(),
            [rows.tolist() for rows in load_plan(f"{folder}/plan.parquet")],
            load_record(f"{folder}/plan.parquet"),
        ]

    well = read()
    assert well[0] == pairs.query_ids.tolist()
    assert well[2] == [graph.neighbors[graph.neighbors >= 0].tolist()]
    assert well[3] == [3, 5]
    assert well[5] == {"hardness": 1}
    store.proxy.reset(seeded(8, 0.3))
    assert read() == well
    assert store.proxy.faults.total() >= 5
    for outage in (
        lambda: open_dataset("s3://data/synthetic").pairs("train"),
        lambda: read_graph_samples(folder, graph_part),
        lambda: read_part_head(folder, part),
        lambda: load_plan(f"{folder}/plan.parquet"),
    ):
        store.proxy.reset(
            lambda what, key, number: (
                "internal" if key.endswith(".parquet") and what == "GET" else None
            )
        )
        with pytest.raises(StoreError, match=r"s3://data/.*\.parquet: InternalError"):
            outage()


def configure(run_dir: str, dataset: str, **sections: dict[str, Any]) -> RunConfig:
    """Two epochs, with a mining round between them."""
    return tiny_config(
        run_dir,
        dataset,
        ray={"num_cpus": 4},
        mining={"every_epochs": 1, "exact_engine": "torch"},
        evaluation={"every_epochs": 2, "before_training": False},
        checkpoint={"every_steps": 4},
        train={"epochs": 2, "loader_processes": 1},
        **sections,
    )


@pytest.mark.cluster
def test_a_run_from_s3_to_s3_through_faults_ends_as_one_on_files_and_writes_no_credential(
    ray_cluster: None,
    store: Store,
    synthetic: GeoDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(configure(str(tmp_path / "run"), synthetic.uri)).finished
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    store.proxy.reset(seeded(5, 0.05))
    reached = {"endpoint_url": store.proxy.endpoint}
    remote = Command(
        configure("s3://data/run", "s3://data/synthetic", storage=reached),
        folder=tmp_path / "remote",
    )
    assert remote.wait() == 0, remote.output
    assert remote.left_behind() == []
    assert set(store.proxy.faults) == set(PASSING)
    assert store.proxy.faults.total() > 20

    on_disk = {
        str(f.relative_to(tmp_path / "run")): f
        for f in (tmp_path / "run").rglob("*")
        if f.is_file()
    }
    found = {
        key.removeprefix("run/"): data
        for key, data in objects(store.client, "data", "run/").items()
    }
    assert set(found) == set(on_disk)
    for name in found:
        if name.startswith("plans/") or name.endswith("model.safetensors") or "neighbors/" in name:
            assert name.endswith(files.MANIFEST) or found[name] == on_disk[name].read_bytes(), name
    name = "checkpoints/epoch=0002/training_state.pt"
    states = [
        torch.load(io.BytesIO(data), weights_only=True)
        for data in (found[name], on_disk[name].read_bytes())
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    logs = [
        [json.loads(line) for line in data.splitlines()]
        for data in (found["metrics.jsonl"], on_disk["metrics.jsonl"].read_bytes())
    ]
    for kind, keys in {"step": ("step", "loss"), "evaluation": ("recall@1", "recall@5")}.items():
        lines = [
            [[line[key] for key in keys] for line in log if line["kind"] == kind] for log in logs
        ]
        assert lines[0] == lines[1]
        assert lines[0]
    written = b"".join(
        [*found.values(), remote.output.encode(), (tmp_path / "remote.yaml").read_bytes()]
    )
    for secret in (ACCESS_KEY, SECRET_KEY, quote(SECRET_KEY, safe="")):
        assert secret.encode() not in written
