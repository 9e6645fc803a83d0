from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.images import load_view
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.encoder.checkpoint import save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.errors import InputError
from s4g_ray.pipeline.run_folder import RunFolder
from s4g_ray.pipeline.stages.embed import embed_collection
from s4g_ray.pipeline.stages.mine import mine_table
from s4g_ray.storage import files
from tests.conftest import NUM_TEST, NUM_TRAIN, tiny_config
from tests.support.embedding_tables import STAMP, random_unit, write_table

K = 5
KEYS = [f"sampling.neighbor_pool_size={K}", "mining.exact_engine=torch"]


def begin_run(folder: Path, dataset: GeoDataset) -> RunConfig:
    """A run's folder with its untrained encoder."""
    config = tiny_config(folder / "run", dataset.uri)
    run = RunFolder.open(config, dataset, resume=False)
    run.start()
    save_checkpoint(run.checkpoint(0), Encoder.build(config.model), None, epoch=0, step=0)
    return config


def with_semi_positives(folder: Path, dataset: GeoDataset) -> GeoDataset:
    """The data set, each query's place and the next one showing the same ground."""
    references, queries = dataset.references.to_table(), dataset.queries.to_table()
    places = queries["place_id"].to_numpy()
    semi = pa.array([[int(place) + 1] for place in places], pa.list_(pa.int64()))
    queries = queries.set_column(
        queries.schema.get_field_index("semi_positives"), "semi_positives", semi
    )
    for column in ("uri",):
        full = [
            pc.binary_join_element_wise(dataset.uri, t[column], "/") for t in (references, queries)
        ]
        references = references.set_column(
            references.schema.get_field_index(column), column, full[0]
        )
        queries = queries.set_column(queries.schema.get_field_index(column), column, full[1])
    return write_dataset(str(folder / "semi"), references, queries, name="semi")


@pytest.mark.cluster
@pytest.mark.usefixtures("warm_pool")
def test_a_collection_is_embedded_and_mined_as_by_hand_and_a_repeated_command_changes_nothing(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    dataset = with_semi_positives(tmp_path, synthetic)
    config, table, graph = (
        begin_run(tmp_path, dataset),
        str(tmp_path / "table"),
        str(tmp_path / "graph"),
    )
    made = embed_collection(config.run_dir, dataset.uri, table)
    assert (made["queries"], made["references"], made["bad_images"]) == (
        NUM_TRAIN + NUM_TEST,
    ) * 2 + ([],)
    stored, images = read_embeddings(table, "queries"), dataset.table("queries", ["train", "test"])
    encoder = Encoder.build(config.model).eval()
    seen = torch.stack(
        [load_view(images, row, "queries", config.data, seed=0) for row in range(len(images))]
    )
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(encoder.embed(seen, "queries")).numpy()
    np.testing.assert_allclose(
        stored.vectors[np.argsort(stored.ids)], wanted, atol=5e-4
    )  # of float16

    found = mine_table(table, graph, dataset_uri=dataset.uri, overrides=KEYS)
    assert (found["places"], found["neighbors"], found["recall"]) == (NUM_TRAIN, NUM_TRAIN * K, 1.0)
    ids = dataset.table("queries", ["train"]).ids
    queries, references = stored.take(ids), read_embeddings(table, "references").take(ids)
    scores = queries.vectors.astype(np.float64) @ references.vectors.T.astype(np.float64)
    apart = np.abs(queries.place_ids[:, None] - references.place_ids)
    scores[apart <= 1] = -np.inf  # its own place, and the semi-positives: symmetric
    best = references.place_ids[np.argsort(-scores, axis=1)[:, :K]]
    mined, order = NeighborGraph.load(graph), np.argsort(queries.place_ids)
    assert mined.place_ids.tolist() == queries.place_ids[order].tolist()
    assert (
        mined.neighbors == best[order]
    ).mean() > 0.99  # scores that are nearly equal may change places
    assert found["dropped_semi_positive"] > 0

    one_cell = [*KEYS, "mining.scope=cells", "mining.cell_places=500"]
    in_cells = str(tmp_path / "cells")
    record = mine_table(table, in_cells, dataset_uri=dataset.uri, overrides=one_cell)
    assert (record["index"], record["engine"], record["neighbors"]) == (
        "cells",
        "torch",
        NUM_TRAIN * K,
    )
    alike = NeighborGraph.load(in_cells)
    assert alike.place_ids.tolist() == mined.place_ids.tolist()
    assert alike.neighbors.tolist() == mined.neighbors.tolist()

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert embed_collection(config.run_dir, dataset.uri, table) == made
    assert mine_table(table, graph, dataset_uri=dataset.uri, overrides=KEYS) == found
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    } == times
    assert sorted(files.list_names(graph)) == [
        "_MANIFEST.json",
        "mining.json",
        "part-00000.parquet",
    ]
    with pytest.raises(
        InputError, match=r"was begun with \{'splits': .*'test'\]\}, not \{'splits': \['test'\]\}"
    ):
        embed_collection(config.run_dir, dataset.uri, table, splits=["test"])
    with pytest.raises(
        InputError, match=r"was begun with \{'max_score': None\}, not \{'max_score': 0.5\}"
    ):
        mine_table(table, graph, dataset_uri=dataset.uri, overrides=[*KEYS, "mining.max_score=0.5"])


def test_what_cannot_be_embedded_is_refused_before_anything_is_written(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    config = begin_run(tmp_path, synthetic)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    for target, splits, message in (
        ("other", ["train"], "other is not empty, and was not begun by an embedding job"),
        ("table", ["tset"], "split 'tset' is none of train, val, test"),
        ("table", ["val"], "holds no image of split val"),
    ):
        with pytest.raises(InputError, match=message):
            embed_collection(config.run_dir, synthetic.uri, str(tmp_path / target), splits=splits)
    assert (tmp_path / "other/notes.txt").read_text() == "mine"
    assert not (tmp_path / "table").exists()


def test_what_cannot_be_mined_is_refused_before_anything_is_written(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    table = write_table(tmp_path / "table", np.arange(20), random_unit(rng, 20))
    unstamped = write_table(tmp_path / "unstamped", np.arange(20), random_unit(rng, 20), stamp=None)
    other = replace(STAMP, dataset=synthetic.fingerprint)
    strange = write_table(
        tmp_path / "strange", np.arange(500, 520), random_unit(rng, 20), stamp=other
    )
    graph = str(tmp_path / "graph")
    for embeddings, dataset, keys, message in (
        (
            str(tmp_path / "none"),
            None,
            KEYS,
            "holds no published embedding table; make one with `s4g embed`",
        ),
        (unstamped, None, KEYS, "has no stamp of its data set"),
        (
            table,
            None,
            [],
            "neighbor_pool_size=128 is too large for the 20 places of the references; at most 19",
        ),
        (table, None, [*KEYS, "sampling.exclude_radius_m=9"], "name their data set with --dataset"),
        (
            table,
            None,
            [*KEYS, "mining.scope=cells"],
            "scope=cells needs .*; name their data set with --dataset",
        ),
        (table, synthetic.uri, KEYS, "was not made from .*: their fingerprints differ"),
        (strange, synthetic.uri, KEYS, "holds no query of split train"),
        (
            table,
            None,
            [*KEYS, "mining.num_shards=30"],
            "mining.num_shards=30 exceeds the 20 references",
        ),
    ):
        with pytest.raises(InputError, match=message):
            mine_table(embeddings, graph, dataset_uri=dataset, overrides=keys)
    assert not (tmp_path / "graph").exists()
