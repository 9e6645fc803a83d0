"""A run with all signals of learning that the paper does not have, on tiles that overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.sphere import METRES_A_DEGREE
from s4g_ray.data.tables.batch_plan import load_plan
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.data.tables.query_scores import read_query_scores
from s4g_ray.pipeline.records import read_records
from s4g_ray.pipeline.run import run
from tests.conftest import NUM_TRAIN, tiny_config

NUM_PLACES = 32  # of the train split
SIZE_M = 60.0


@pytest.fixture
def overlapping(synthetic: GeoDataset, tmp_path: Path) -> GeoDataset:
    """A lattice of half a tile's side; a place has its own query and those of two others."""
    places = np.arange(NUM_PLACES)
    found = {}
    for view, table in (("references", synthetic.references), ("queries", synthetic.queries)):
        rows = table.to_table(columns=["id", "uri"]).sort_by("id")
        found[view] = [f"{synthetic.uri}/{uri}" for uri in rows["uri"].to_pylist()]
    step = SIZE_M / 2 / METRES_A_DEGREE
    at = {"lat": places // 8 * step, "lon": places % 8 * step}
    columns = {"place_id": places + 500, "split": ["train"] * NUM_PLACES, **at}
    tiles = {"id": places, "uri": found["references"][:NUM_PLACES], **columns}
    sizes = pa.array(np.full(NUM_PLACES, SIZE_M), pa.float32())
    queries = []
    for number in range(3):
        uris = found["queries"][number * NUM_PLACES : (number + 1) * NUM_PLACES]
        queries.append(pa.table({"id": places + 100 * number, "uri": uris, **columns}))
    test = {"id": [900], "uri": [found["queries"][NUM_TRAIN]], "place_id": [999], "split": ["test"]}
    tested = pa.table({**test, "lat": [9.0], "lon": [9.0]})
    references = pa.table({**tiles, "size_m": sizes})
    return write_dataset(
        str(tmp_path / "data"), [references, tested], [*queries, tested], name="overlapping"
    )


@pytest.mark.cluster
def test_easy_queries_of_a_place_leave_their_slot_to_hard_ones(
    warm_pool: None, overlapping: GeoDataset, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "run",
        overlapping.uri,
        train={"num_workers": 1, "epochs": 2, "soft_labels": 1.0},
        augment={"query_shift": 0.1, "query_scale": [0.9, 1.1]},
        sampling={"hard_positives": 1.0},
        evaluation={"every_epochs": 2, "before_training": False},
    )
    run(config)
    records = read_records(config.run_dir)
    epochs = {record["epoch"]: record for record in records if record["kind"] == "epoch"}
    assert all(np.isfinite(record["loss"]) for record in epochs.values())
    assert "positives_repeated" not in epochs[1]  # geographic
    queries = read_embeddings(f"{config.run_dir}/embeddings/v=0001", "queries")
    tiles = read_embeddings(f"{config.run_dir}/embeddings/v=0001", "references")
    scores = read_query_scores(f"{config.run_dir}/neighbors/v=0001")
    assert len(scores) == 3 * NUM_PLACES
    wanted = {}
    for query, place, vector in zip(queries.ids, queries.place_ids, queries.vectors, strict=True):
        tile = tiles.vectors[tiles.place_ids == place][0]
        cosine = vector @ tile / np.linalg.norm(vector) / np.linalg.norm(tile)
        wanted[int(query)] = float(cosine)
    found = dict(zip(scores.query_ids.tolist(), scores.scores.tolist(), strict=True))
    assert found == pytest.approx(wanted, abs=1e-5)
    planned, _ = load_plan(f"{config.run_dir}/plans/epoch=0002.parquet")
    values, counts = np.unique(planned, return_counts=True)
    taken = dict(zip(values.tolist(), counts.tolist(), strict=True))
    for place in range(NUM_PLACES):
        ranked = sorted([place, place + 100, place + 200], key=lambda query: found[query])
        assert taken.get(ranked[0], 0) <= 2  # fewer where pairs are left out
        assert taken.get(ranked[1], 0) <= 1
        assert ranked[2] not in taken
    # a hard query whose own slot is left out stands once
    assert (counts - 1).sum() <= epochs[2]["positives_repeated"] <= NUM_PLACES
    assert (counts - 1).sum() > NUM_PLACES / 2
