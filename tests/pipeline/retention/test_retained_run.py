"""Whole runs: what is left of one, and the graphs of one whose rounds take a share each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.pipeline.records import read_records
from s4g_ray.pipeline.report.page import write_report
from s4g_ray.pipeline.retention.prune import prune_run
from s4g_ray.pipeline.rounds.rotation import choose_places
from s4g_ray.pipeline.run import run as run_config
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config

pytestmark = pytest.mark.cluster


def test_a_run_keeps_what_its_report_and_branches_need_and_no_more(undisturbed: RunConfig) -> None:
    """4 epochs, rounds after 1 and 2, evaluations after 2 and 4; checkpoints 0, 3 and 4 stay."""
    run = Path(undisturbed.run_dir)
    mined = [record["epoch"] for record in read_records(str(run)) if record["kind"] == "mining"]
    assert mined == [1, 2]
    assert sorted(path.name for path in (run / "embeddings").iterdir()) == ["v=0004"]
    # a branch from epoch 3 trains epoch 4 on the graph of epoch 2
    assert sorted(path.name for path in (run / "neighbors").iterdir()) == ["v=0002"]
    assert not (run / "_OWNER.json").exists()
    write_report(str(run))
    assert set(prune_run(str(run), dry_run=True).removed) == {"index"}


def test_rotating_rounds_mine_their_share_and_carry_on_the_graph_of_the_others(
    synthetic: GeoDataset, ray_cluster: None, warm_pool: None, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "run",
        synthetic.uri,
        train={"epochs": 4, "num_workers": 1},
        mining={"refresh": "rotate", "refresh_share": 0.5},
        evaluation={"every_epochs": 4, "before_training": False},
    )
    assert run_config(config).finished
    graphs = [NeighborGraph.load(f"{config.run_dir}/neighbors/v={v:04d}") for v in (1, 2, 3)]
    places = TrainSplit.read(config, synthetic).places
    for number in (1, 2):
        share = choose_places(places, config.mining, number, seed=config.seed)
        before, after = ({*graphs[i].place_ids.tolist()} for i in (number - 1, number))
        assert before == after == set(places.ids.tolist())
        order = [np.argsort(graphs[i].place_ids) for i in (number - 1, number)]
        old = graphs[number - 1].neighbors[order[0]]
        new = graphs[number].neighbors[order[1]]
        is_taken = np.isin(places.ids, share)
        assert np.array_equal(old[~is_taken], new[~is_taken])
        assert np.isin(new[is_taken], share).all()
        uri = f"{config.run_dir}/embeddings/v={number + 1:04d}"
        queries = read_embeddings(uri, "queries")
        references = read_embeddings(uri, "references")
        assert set(references.place_ids.tolist()) == set(share.tolist())
        for query, place in zip(queries.vectors, queries.place_ids, strict=True):
            scores = references.vectors.astype(np.float64) @ query
            scores[references.place_ids == place] = -2
            wanted = references.place_ids[np.argsort(-scores, kind="stable")[:12]]
            assert set(new[places.rows(place)].tolist()) == set(wanted.tolist())
    epochs = [record["images"] for record in read_records(config.run_dir) if "images" in record]
    assert epochs == [2 * NUM_TRAIN, NUM_TRAIN, NUM_TRAIN, 2 * NUM_TEST]
