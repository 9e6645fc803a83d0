"""A large run in miniature: two index shards, cells, gallery negatives, an exclusion radius."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.sphere import metres_between
from s4g_ray.data.tables.batch_plan import load_gallery, load_plan
from s4g_ray.data.tables.embedding_table import EmbeddingTable, read_embeddings
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.errors import InputError, RunError
from s4g_ray.pipeline.rounds.graphs import RunGraphs
from s4g_ray.pipeline.rounds.miner import Miner
from s4g_ray.pipeline.run import run
from s4g_ray.pipeline.run_folder import RunFolder, RunResult
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.manifest import latest_version
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config, write_synthetic

pytestmark = pytest.mark.cluster
NUM_GALLERY, NUM_NEGATIVES, RADIUS_M = 30, 4, 700_000.0
GALLERY = np.arange(
    NUM_TRAIN + NUM_TEST, NUM_TRAIN + NUM_TEST + NUM_GALLERY
)  # ids; places are these + 1000


@pytest.fixture(scope="module")
def regional(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_synthetic(tmp_path_factory.mktemp("data") / "regional", NUM_GALLERY)


@pytest.fixture(scope="module")
def large(
    regional: GeoDataset, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    config = tiny_config(
        tmp_path_factory.mktemp("runs") / "large",
        regional.uri,
        train={"epochs": 3},
        checkpoint={"keep": 4},
        sampling={
            "gallery_negatives": NUM_NEGATIVES,
            "exclude_radius_m": RADIUS_M,
            "max_pairs_per_cell": 40,
        },
        mining={"num_shards": 2, "part_mb": 0.002, "query_block": 16},
        evaluation={"before_training": False},
    )
    result: RunResult = run(config)
    assert result.metrics["queries"] == NUM_TEST
    return config


def records(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def near(regional: GeoDataset) -> set[tuple[int, int]]:
    """Pairs of places that are within the radius of each other."""
    table = regional.table("references", ["train"])
    lat, lon = table.lat, table.lon
    metres = metres_between(lat[:, None], lon[:, None], lat, lon)
    places = table.place_ids
    return {(int(places[i]), int(places[j])) for i, j in np.argwhere(metres <= RADIUS_M)}


def oracle(
    near: set[tuple[int, int]], q: EmbeddingTable, r: EmbeddingTable, place: int, k: int
) -> dict[int, float]:
    query = q.vectors[q.place_ids == place][0].astype(np.float64)
    scores = {
        # the length of float16 vectors is nearly 1
        int(p): float(v @ query / np.linalg.norm(v) / np.linalg.norm(query))
        for p, v in zip(r.place_ids, r.vectors, strict=True)
        if p != place
    }
    allowed = {p: s for p, s in scores.items() if (place, p) not in near}
    return dict(sorted(allowed.items(), key=lambda item: -item[1])[:k])


def test_mined_graphs_are_the_nearest_places_beyond_the_radius_of_each_collection(
    large: RunConfig, near: set[tuple[int, int]]
) -> None:
    folder = f"{large.run_dir}/embeddings/v=0002"
    q, r = read_embeddings(folder, "queries"), read_embeddings(folder, "references")
    for name, ids, k in (
        ("neighbors", np.arange(NUM_TRAIN), 12),
        ("gallery_neighbors", GALLERY, NUM_GALLERY),
    ):
        graph = NeighborGraph.load(f"{large.run_dir}/{name}/v=0002")
        assert sorted(graph.place_ids.tolist()) == list(range(1000, 1000 + NUM_TRAIN))
        among, shorter = r.take(ids), 0
        assert graph.scores is not None
        for row, place in enumerate(graph.place_ids.tolist()):
            wanted = oracle(near, q, among, place, k)
            found = [n for n in graph.neighbors[row].tolist() if n >= 0]
            assert len(found) == len(wanted)
            np.testing.assert_allclose(
                graph.scores[row, : len(found)], list(wanted.values()), atol=1e-5
            )
            assert set(found) <= set((among.place_ids).tolist())
            shorter += len(wanted) < k
        assert name == "neighbors" or shorter > 0  # the radius bars some gallery places


def test_plans_by_cells_use_each_pair_once_and_keep_near_places_and_gallery_tiles_apart(
    large: RunConfig, near: set[tuple[int, int]]
) -> None:
    for record in records(large, "epoch"):
        assert record["cells"] >= 3
        uri = f"{large.run_dir}/plans/epoch={record['epoch']:04d}.parquet"
        queries, references = load_plan(uri)
        gallery = load_gallery(uri)
        assert gallery.shape == (len(queries), NUM_NEGATIVES)
        assert (
            len(set(queries.ravel().tolist()))
            == queries.size
            == NUM_TRAIN - record["pairs_left_out"]
        )
        assert record["pairs_left_out"] <= NUM_TRAIN // 2
        assert np.isin(gallery, GALLERY).all()
        for batch, tiles in zip(references, gallery, strict=True):
            assert len(set(tiles.tolist())) == NUM_NEGATIVES
            together = [*batch.tolist(), *tiles.tolist()]
            pairs = [(a, b) for i, a in enumerate(batch.tolist()) for b in together[i + 1 :]]
            assert not any((a + 1000, b + 1000) in near for a, b in pairs)


def test_gallery_tiles_of_a_batch_are_mined_for_its_queries(large: RunConfig) -> None:
    """More of a batch's tiles are among the first four of one of its places than by chance."""
    graph = NeighborGraph.load(f"{large.run_dir}/gallery_neighbors/v=0002")
    uri = f"{large.run_dir}/plans/epoch=0003.parquet"
    for places, tiles in zip(load_plan(uri)[0] + 1000, load_gallery(uri) + 1000, strict=True):
        rows = np.flatnonzero(np.isin(graph.place_ids, places))
        assert np.isin(tiles, graph.neighbors[rows, :4]).all()


def test_each_round_logs_the_neighbors_that_it_found_and_dropped(large: RunConfig) -> None:
    rounds = records(large, "mining")
    assert [(r["epoch"], r["collection"]) for r in rounds] == [
        (e, c) for e in (1, 2) for c in ("pairs", "gallery")
    ]
    for record in rounds:
        assert record["recall"] == 1
        assert record["index"] == "flat"
        assert record["shards"] == 2
        assert 0 < record["coverage"] <= 1
        assert (
            ("above_positive" in record)
            == ("train_recall@1" in record)
            == (record["collection"] == "pairs")
        )
        assert 0 <= record.get("above_positive", 0) <= 1
        assert record["age"] == 1
        assert record["dropped_near"] > 0
        assert record["dropped_own"] >= (NUM_TRAIN if record["collection"] == "pairs" else 0)
    graphs = [NeighborGraph.load(f"{large.run_dir}/neighbors/v={v:04d}") for v in (1, 2)]
    rows = [dict(zip(g.place_ids.tolist(), g.neighbors.tolist(), strict=True)) for g in graphs]
    shared = sum(len(set(rows[0][p]) & set(rows[1][p]) - {-1}) for p in rows[1])
    total = sum(len(set(found) - {-1}) for found in rows[1].values())
    assert rounds[-2]["overlap"] == pytest.approx(shared / total)
    ages = [(record["graph"], record["graph_age"]) for record in records(large, "epoch")]
    assert ages == [("geographic", 0), *((f"similarity v={v:04d}", 0) for v in (1, 2))]


def test_the_margin_to_the_positive_is_not_asked_of_the_gallery_which_holds_no_positive(
    large: RunConfig, regional: GeoDataset, tmp_path: Path
) -> None:
    mining = large.mining.model_copy(update={"relative_margin": 0.1, "max_score": 0.9})
    config = large.model_copy(update={"mining": mining, "run_dir": str(tmp_path / "none")})
    split = TrainSplit.read(config, regional)
    folder = RunFolder.open(config, regional, resume=False)
    graphs = RunGraphs.from_config(config, split, regional.fingerprint, folder)
    miner = Miner(graphs, mining, Reporter(), seed=config.seed, ray=config.ray)
    assert miner.config_for("pairs") == mining
    of_gallery = miner.config_for("gallery")
    assert (of_gallery.relative_margin, of_gallery.max_score) == (None, 0.9)


def test_two_versions_of_each_index_are_kept(large: RunConfig) -> None:
    for name in ("index", "gallery_index"):
        assert files.list_names(f"{large.run_dir}/{name}") == ["v=0001", "v=0002"]


def test_a_round_interrupted_between_its_graphs_mines_the_missing_one_and_logs_each_once(
    large: RunConfig, tmp_path: Path
) -> None:
    """One graph is lost but logged; of the other, the record is lost but the graph exists."""
    whole, part = Path(large.run_dir), tmp_path / "part"
    shutil.copytree(whole, part)
    for name in ("checkpoints/epoch=0003", "embeddings/v=0003"):
        shutil.rmtree(part / name)
    (part / "plans/epoch=0003.parquet").unlink()
    (part / "gallery_neighbors/v=0002/_MANIFEST.json").unlink()
    info = json.loads((part / "run.json").read_text())
    del info["exact_engine"]
    files.write_json(str(part / "run.json"), {**info, "status": "running"})
    lines = [json.loads(line) for line in (part / "metrics.jsonl").read_text().splitlines()]
    (lost,) = (
        r
        for r in lines
        if (r["kind"], r.get("epoch"), r.get("collection")) == ("mining", 2, "pairs")
    )
    (part / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines if r != lost))
    kept = [part / f"{name}/v=0002/_MANIFEST.json" for name in ("embeddings", "neighbors")]
    before = [path.stat().st_mtime_ns for path in kept]
    resumed = large.model_copy(update={"run_dir": str(part)})
    run(resumed, resume=True)
    assert [path.stat().st_mtime_ns for path in kept] == before
    rounds = {(r["epoch"], r["collection"]): r for r in records(resumed, "mining")}
    assert len(rounds) == len(records(resumed, "mining")) == 4
    assert {**rounds[2, "pairs"], "time": 0} == {**lost, "time": 0}
    assert (
        json.loads((part / "run.json").read_text())["exact_engine"]
        == rounds[2, "gallery"]["engine"]
    )
    ours, theirs = (folder / "checkpoints/epoch=0003/model.safetensors" for folder in (part, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_radius_that_excludes_nearly_all_places_is_refused_before_anything_is_written(
    regional: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s4g_ray.data.exclusions.MAX_NEAR_PLACES", 90)
    config = tiny_config(tmp_path / "run", regional.uri, sampling={"exclude_radius_m": 2.1e7})
    with pytest.raises(
        InputError, match=r"sampling\.exclude_radius_m=2\.1e\+07 .* 95 of 95 others"
    ):
        run(config)
    assert not (tmp_path / "run").exists()


def test_an_index_below_the_wanted_recall_fails_the_round_with_the_remedy(
    ray_cluster: None, regional: GeoDataset, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "run",
        regional.uri,
        mining={"index_kind": "ivf_rabitq", "nprobe": 1, "min_recall": 1.0, "max_retries": 0},
        evaluation={"before_training": False},
    )
    with pytest.raises(RunError, match=r"recall@12 .* mining\.min_recall=1.*nprobe"):
        run(config)
    assert latest_version(f"{config.run_dir}/neighbors", "v") == 0
