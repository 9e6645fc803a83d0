"""Plans from the graphs of a run folder, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.tables.batch_plan import load_gallery, load_plan, load_record
from s4g_ray.data.tables.neighbor_graph import publish_graph, write_graph_part
from s4g_ray.data.tables.query_scores import (
    QueryScores,
    describe_query_scores,
    write_query_scores,
)
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.errors import RunError
from s4g_ray.pipeline.planner import Planner
from s4g_ray.pipeline.rounds.graphs import RunGraphs
from s4g_ray.pipeline.run_folder import RunFolder
from s4g_ray.sampling.compact_graph import CompactGraph
from s4g_ray.sampling.gallery_negatives import choose_gallery
from s4g_ray.sampling.geographic_neighbors import geographic_graph, nearest_places
from tests.conftest import tables, tiny_config


@pytest.fixture
def graphs(tmp_path: Path) -> RunGraphs:
    """24 places with pairs, 10 of the gallery, some of them between these."""
    references, queries = tables(24)
    ids = np.arange(100, 110)
    more = {"id": ids, "place_id": ids + 200, "uri": ["x.jpg"] * 10, "split": ["train"] * 10}
    at: dict[str, Any] = {"lat": np.linspace(-9.7, 9.7, 10), "lon": np.linspace(20.3, 29.7, 10)}
    both = pa.concat_tables([references, pa.table({**more, **at}).select(references.column_names)])
    dataset: GeoDataset = write_dataset(str(tmp_path / "data"), both, queries, name="with gallery")
    config: RunConfig = tiny_config(
        tmp_path / "run",
        dataset.uri,
        train={"batch_size": 8},
        sampling={"mode": "geographic", "gallery_negatives": 2},
    )
    split = TrainSplit.read(config, dataset)
    folder = RunFolder.open(config, dataset, resume=False)
    return RunGraphs.from_config(config, split, dataset.fingerprint, folder)


def test_a_plan_is_made_from_the_graphs_of_its_version_and_records_it(graphs: RunGraphs) -> None:
    planner = Planner(graphs, seed=3, protocol="strict")
    record, uri = planner.plan_epoch(1, 0, due=0), planner.plan_uri(1)
    assert (record["graph"], record["cells"], record["gallery_mined"]) == ("geographic", 1, 6)
    assert load_record(uri) == record
    assert graphs.split.gallery is not None
    near = nearest_places(
        graphs.split.places, graphs.split.gallery.places, 10, graphs.split.exclusions
    )
    rows = CompactGraph.from_graph(
        near, graphs.split.places.ids, 10, among=graphs.split.gallery.places.ids
    )
    places = load_plan(uri)[0] + 100
    wanted, _ = choose_gallery(
        places,
        rows,
        graphs.split.gallery,
        num=2,
        seed=3,
        epoch=1,
        exclusions=graphs.split.exclusions,
    )
    assert np.array_equal(load_gallery(uri), wanted)
    known = pq.read_schema(uri).metadata
    assert (known[b"s4g.num_pairs"], known[b"s4g.num_cells"]) == (b"24", b"1")


def test_hard_queries_come_once_more_in_place_of_easy_ones(tmp_path: Path) -> None:
    """24 places of two queries each, the second of which scores lower."""
    references, queries = tables(24)
    second = queries.set_column(0, "id", pa.array(np.arange(24) + 50))
    dataset = write_dataset(
        str(tmp_path / "data"), references, pa.concat_tables([queries, second]), name="two"
    )
    config = tiny_config(
        tmp_path / "run", dataset.uri, train={"batch_size": 8}, sampling={"hard_positives": 1.0}
    )
    split = TrainSplit.read(config, dataset)
    folder = RunFolder.open(config, dataset, resume=False)
    graphs = RunGraphs.from_config(config, split, dataset.fingerprint, folder)
    k = config.sampling.neighbor_pool_size
    for version in (1, 2):  # as a round publishes them; the first without scores
        uri = graphs.uri(version)
        part = write_graph_part(uri, 0, geographic_graph(split.places, k))
        info: dict[str, Any] = {"dataset": dataset.fingerprint}
        if version == 2:
            ids = np.concatenate([np.arange(24), np.arange(24) + 50])
            scores = QueryScores(ids, np.repeat([0.9, 0.1], 24).astype(np.float32))
            info.update(describe_query_scores([write_query_scores(uri, 0, scores)]))
        publish_graph(uri, [part], k, info=info)
    planner = Planner(graphs, seed=3, protocol="strict")
    assert planner.plan_epoch(2, 1, due=1)["positives_repeated"] == 0
    each_once, _ = load_plan(planner.plan_uri(2))
    assert len(np.unique(each_once)) == each_once.size
    record = planner.plan_epoch(2, 2, due=2)
    query_ids, reference_ids = load_plan(planner.plan_uri(2))
    assert record["positives_repeated"] == (each_once < 50).sum() > 0
    np.testing.assert_array_equal(query_ids, each_once % 50 + 50)
    np.testing.assert_array_equal(reference_ids, each_once % 50)


@pytest.mark.parametrize("name", ["neighbors", "gallery_neighbors"])
def test_a_graph_of_another_data_set_is_refused(graphs: RunGraphs, name: str) -> None:
    graphs.write_geographic()
    manifest = Path(graphs.folder.uri) / name / "v=0000" / "_MANIFEST.json"
    value = json.loads(manifest.read_text())
    value["info"]["dataset"] = "another"
    manifest.write_text(json.dumps(value))
    with pytest.raises(
        RunError,
        match=rf"run/{name}/v=0000: made of the data set 'another', but '{graphs.fingerprint}'",
    ):
        Planner(graphs, seed=3, protocol="strict").plan_epoch(1, 0, due=0)
