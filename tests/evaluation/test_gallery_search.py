from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s4g_ray.data.dataset import write_dataset
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.errors import RunError
from s4g_ray.evaluation.gallery_parts import GalleryPart
from s4g_ray.evaluation.gallery_search import QuerySide
from s4g_ray.evaluation.metrics import PROTOCOLS, Retrieval, retrieve_both, retrieve_parts
from s4g_ray.evaluation.scores import score, score_tables
from s4g_ray.storage.manifest import publish, write_part
from tests.conftest import tables
from tests.support.embedding_tables import STAMP

FIELDS = ("ranks", "ap", "hits", "literal_hits", "located")


def values_of(found: Retrieval) -> dict[str, object]:
    values = {name: np.asarray(getattr(found, name)).tolist() for name in FIELDS}
    return {**values, "within": {radius: r.tolist() for radius, r in found.within.items()}}


@pytest.mark.parametrize("seed", range(6))
def test_ranks_and_precision_do_not_depend_on_the_parts_of_the_gallery(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd seeds draw from a pool of vectors, so that scores tie within and across parts."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(250, 12)).astype(np.float32)
    if seed % 2:
        vectors = vectors[rng.integers(0, 30, 250)]
    places = rng.integers(0, 25, 250)
    latlon = rng.uniform(0, 0.005, (250, 2))
    latlon[rng.random(250) < 0.2] = np.nan
    semi = [rng.integers(0, 28, rng.integers(0, 4)) for _ in range(50)]
    options: dict[str, Any] = {
        "semi_positives": semi,
        "query_latlon": latlon[:50],
        "reference_latlon": latlon[50:],
        "radii_m": (50, 100),
        "distractors": rng.random(200) < 0.2,
    }
    arrays = (vectors[:50], vectors[50:], places[:50], places[50:])
    whole = retrieve_both(*arrays, **options)
    monkeypatch.setattr("s4g_ray.evaluation.gallery_parts.ROWS_AT_ONCE", 23)
    monkeypatch.setattr("s4g_ray.evaluation.gallery_search.BLOCK_SCORES", 200)
    parted = retrieve_both(*arrays, **options)
    for protocol in PROTOCOLS:
        assert str(values_of(parted[protocol])) == str(values_of(whole[protocol]))
        if seed % 2 == 0:
            assert parted[protocol].metrics(protocol) == whole[protocol].metrics(protocol)


def test_rows_of_bad_embeddings_are_numbered_over_the_parts_before() -> None:
    vectors = np.ones((5, 4), np.float32)
    vectors[3, 1] = np.nan

    def read() -> Iterator[GalleryPart]:
        for rows in (slice(0, 2), slice(2, 5)):
            yield GalleryPart(vectors[rows], np.arange(5)[rows])

    side = QuerySide(vectors[:2], np.arange(2))
    with pytest.raises(RunError, match="1 reference embeddings are not finite; the first is row 3"):
        retrieve_parts(side, read, has_distractors=False)


def test_a_split_is_scored_from_the_parts_of_float16_tables_as_from_arrays(tmp_path: Path) -> None:
    """Parts are in the order of places; they hold rows of other splits, and lack skipped images."""
    rng = np.random.default_rng(3)
    references, queries = tables(60)
    splits = ["train"] * 20 + ["test"] * 25 + ["gallery"] * 15
    shown = queries.slice(10, 40).to_pydict()
    shown["split"] = ["train"] * 10 + ["test"] * 30
    shown["region"] = ["north", "south"] * 20
    shown["semi_positives"] = [[100 + place] for place in rng.integers(0, 60, 40)]
    references = references.set_column(5, "split", pa.array(splits)).take(rng.permutation(60))
    dataset = write_dataset(str(tmp_path / "d"), references, pa.Table.from_pydict(shown), name="n")
    vectors = rng.normal(size=(60, 8)).astype(np.float16)
    noisy = (vectors + rng.normal(size=(60, 8))).astype(np.float16)
    embedded = np.delete(np.arange(60), [22, 50])  # their images were skipped
    parts = []
    for number, rows in enumerate(np.array_split(embedded, 5)):
        contents = encode_part(rows, rows + 100, vectors[rows].astype(np.float32), "float16")
        parts.append(
            write_part(str(tmp_path / "e"), f"references/part-{number:05d}.parquet", contents, 9)
        )
    rows = np.arange(10, 50)
    contents = encode_part(rows, rows + 100, noisy[rows].astype(np.float32), "float16")
    parts.append(write_part(str(tmp_path / "e"), "queries/part-00000.parquet", contents, 40))
    publish(str(tmp_path / "e"), "embeddings", parts, STAMP)
    uri = str(tmp_path / "e")
    found = score_tables(dataset, "test", uri, uri, stamp=STAMP, radii_m=(50, 500_000))
    gallery = dataset.table("references", ["test", "gallery"])
    gallery = gallery.take(np.flatnonzero(~np.isin(gallery.ids, [22, 50])))
    test_queries = dataset.table("queries", ["test"])
    wanted = score(
        dataset,
        "test",
        test_queries,
        gallery,
        (noisy[test_queries.ids].astype(np.float32), vectors[gallery.ids].astype(np.float32)),
        radii_m=(50, 500_000),
    )
    assert found == wanted
    assert set(found.regions) == {"north", "south"}
    assert [found.metrics[p]["references"] for p in PROTOCOLS] == [38, 29]
    dataset.release_columns()
    assert score_tables(dataset, "test", uri, uri, stamp=STAMP, radii_m=(50, 500_000)) == wanted
