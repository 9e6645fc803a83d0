from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.sphere import metres_between
from s4g_ray.errors import InputError, WriteError
from s4g_ray.evaluation.query_results import (
    QueryResults,
    check_results_uri,
    check_store,
    write_results,
)
from s4g_ray.evaluation.scores import search_tables
from s4g_ray.evaluation.tables import Evaluation, evaluation_tables
from s4g_ray.storage import files
from tests.support.evaluated_runs import GRID, SOUTH, write_embeddings, write_ground
from tests.support.faulty_s3 import Store

NUM = GRID * GRID
TOP = 3


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> GeoDataset:
    return write_ground(tmp_path_factory.mktemp("ground") / "data")


@pytest.fixture(scope="module")
def found(
    ground: GeoDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QueryResults, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """The results, and all scores[query, reference]; ids lie in the table in another order."""
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(2, NUM, 8)).astype(np.float32)
    order = rng.permutation(NUM)
    uri = str(tmp_path_factory.mktemp("embedded") / "e")
    write_embeddings(uri, order + 500, vectors[0][order], vectors[1][order])
    search = search_tables(ground, "test", uri, uri, num_top=TOP)
    unit = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    scores = unit[0].astype(np.float64) @ unit[1].T
    return QueryResults.from_search(ground, "test", search), scores


def test_the_table_holds_what_a_plain_sort_finds_for_each_query(
    found: tuple[QueryResults, np.ndarray[tuple[int, ...], np.dtype[np.float64]]],
    ground: GeoDataset,
    tmp_path: Path,
) -> None:
    results, scores = found
    target = tmp_path / "new" / "queries.parquet"
    write_results(str(target), [(results, {"fov_deg": 360.0, "heading": "as_is"})])
    rows = pq.read_table(target).to_pylist()
    assert sorted(row["query_id"] for row in rows) == list(range(500, 500 + NUM))
    table = ground.table("references", ["test"])
    for row in rows:
        place = row["query_id"] - 500
        order = np.argsort(-scores[place], kind="stable")
        assert row["place_id"] == place
        assert row["query_uri"].endswith(f"images/tile <{place}>.png")
        assert row["query_source_id"] == f"source {place}"
        assert row["region"] == ("north" if place < NUM / 2 else SOUTH)
        assert row["rank"] == row["rank_paper"] == order.tolist().index(place) + 1
        assert row["top_ids"] == (order[:TOP] + 500).tolist()
        assert row["top_places"] == order[:TOP].tolist()
        assert [uri.rsplit("<", 1)[1] for uri in row["top_uris"]] == [
            f"{one}>.png" for one in order[:TOP]
        ]
        np.testing.assert_allclose(row["top_scores"], scores[place, order[:TOP]], atol=1e-6)
        np.testing.assert_allclose(row["own_score"], scores[place, place], atol=1e-6)
        metres = metres_between(
            row["lat"], row["lon"], table.lat[order[:TOP]], table.lon[order[:TOP]]
        )
        np.testing.assert_allclose(row["top_metres"], metres)
        assert row["own_metres"] == 0
        assert (row["fov_deg"], row["heading"]) == (360, "as_is")


def test_lists_are_as_long_as_the_gallery_at_most(ground: GeoDataset, tmp_path: Path) -> None:
    vectors = np.eye(NUM, dtype=np.float32)
    uri = str(tmp_path / "e")
    write_embeddings(uri, np.arange(NUM) + 500, vectors, vectors)
    search = search_tables(ground, "test", uri, uri, num_top=10**9)
    results = QueryResults.from_search(ground, "test", search)
    assert results.top.shape == (NUM, NUM)
    assert (np.sort(results.top, axis=1) == np.arange(NUM)).all()


def test_lists_may_hold_more_text_than_32_bits_count(
    found: tuple[QueryResults, np.ndarray[tuple[int, ...], np.dtype[np.float64]]],
) -> None:
    schema = found[0].to_table().schema
    assert schema.field("top_uris").type == pa.large_list(pa.large_string())
    assert schema.field("top_ids").type == pa.large_list(pa.int64())


def test_csv_has_a_column_for_each_position_of_the_lists(
    found: tuple[QueryResults, np.ndarray[tuple[int, ...], np.dtype[np.float64]]], tmp_path: Path
) -> None:
    results, _ = found
    views = [(results, {"fov_deg": fov}) for fov in (360.0, 90.0)]
    for name in ("q.csv", "q.parquet"):
        write_results(str(tmp_path / name), views)
    whole = pq.read_table(tmp_path / "q.parquet").to_pylist()
    rows = pyarrow.csv.read_csv(tmp_path / "q.csv").to_pylist()
    assert len(rows) == len(whole) == 2 * NUM
    assert [row["fov_deg"] for row in rows] == [360] * NUM + [90] * NUM
    for row, wanted in zip(rows, whole, strict=True):
        for at in range(TOP):
            for name in ("top_ids", "top_uris", "top_scores", "top_metres"):
                assert row[f"{name}_{at + 1}"] == wanted[name][at]
    assert "top_ids_4" not in rows[0]


def test_a_file_of_another_kind_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither Parquet nor CSV.*end in \.parquet or \.csv"):
        check_results_uri("results.json")
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(InputError, match="is a folder; name a file"):
        check_results_uri(str(tmp_path / "a.csv"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written: .*file takes no files"):
        check_results_uri(str(tmp_path / "file" / "deeper" / "b.csv"))
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        check_results_uri(str(tmp_path / f"{'x' * 300}.csv"))
    check_results_uri(str(tmp_path / "new" / "b.csv"))


@pytest.mark.parametrize("name", ["dataset.json", "_MANIFEST.json"])
def test_a_file_within_a_published_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "published"
    (folder / "queries").mkdir(parents=True)
    (folder / name).touch()
    for inside in ("q.csv", "queries/part-00000.parquet", "queries/new/q.csv"):
        with pytest.raises(InputError, match=f"lies within {folder}, which {name} describes"):
            check_results_uri(str(folder / inside))


@pytest.mark.s3
def test_a_store_that_takes_no_results_is_found_at_once(store: Store, tmp_path: Path) -> None:
    check_store("s3://data/results/q.csv")
    assert not files.exists("s3://data/results")
    files.write_bytes("s3://data/set/dataset.json", b"{}")
    with pytest.raises(InputError, match=r"lies within s3://data/set, which dataset\.json"):
        check_store("s3://data/set/queries/q.csv")
    with pytest.raises(WriteError, match="no-such-bucket"):
        check_store("s3://no-such-bucket/q.csv")
    check_store(str(tmp_path / "q.csv"))
    assert list(tmp_path.iterdir()) == []


def test_names_that_look_like_markup_are_shown_as_they_are(
    ground: GeoDataset, tmp_path: Path
) -> None:
    uri = str(tmp_path / "e")
    write_embeddings(uri, np.arange(NUM) + 500, np.eye(NUM), np.eye(NUM))
    score = search_tables(ground, "test", uri, uri).score()
    evaluation = Evaluation("[/b] set", "test", 360.0, "as_is", score, {})
    buffer = io.StringIO()
    for table in evaluation_tables([evaluation]):
        Console(file=buffer, width=120).print(table)
    assert SOUTH in buffer.getvalue()
    assert "[/b] set, split test" in buffer.getvalue()
