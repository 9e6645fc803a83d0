from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.data.tables.embedding_table import (
    encode_part,
    open_embeddings,
    read_embedding_parts,
    read_heads,
    sample_queries,
)
from s4g_ray.errors import RunError
from s4g_ray.storage.manifest import publish, write_part
from tests.support.embedding_tables import random_unit, write_table


def test_heads_of_many_parts_hold_their_ids_and_places_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folders = [
        write_table(
            tmp_path / name, rng.permutation(1000)[:370], random_unit(rng, 370, dim), part_rows=9
        )
        for name, dim in (("a", 3), ("b", 4))
    ]
    files = [
        (folder, part) for folder in folders for part in open_embeddings(folder, "references").parts
    ]
    tables = [table for folder in folders for table in read_embedding_parts(folder, "references")]
    heads = list(read_heads(files))
    assert len(heads) == len(tables) == 84
    for head, table in zip(heads, tables, strict=True):
        assert head.ids.tolist() == table.ids.tolist()
        assert head.place_ids.tolist() == table.place_ids.tolist()
        assert head.dim == table.vectors.shape[1]
    Path(folders[0], files[30][1].name).unlink()
    with pytest.raises(RunError, match=rf"{files[30][1].name} is in the manifest but missing"):
        list(read_heads(files))


def test_queries_are_sampled_uniformly_over_parts_of_unequal_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.sort(rng.permutation(5000)[:300])
    vectors = random_unit(rng, 300)
    edges = [0, 5, 15, 100, 300]
    parts = []
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        data = encode_part(ids[start:stop], ids[start:stop], vectors[start:stop], "float32")
        name = f"queries/part-{number:05d}.parquet"
        parts.append(write_part(str(tmp_path), name, data, stop - start))
    publish(str(tmp_path), "embeddings", parts)
    wanted = ids[::3]
    counts = np.zeros(300)
    for seed in range(300):
        found, rows = sample_queries(str(tmp_path), wanted, 20, np.random.default_rng(seed))
        assert len(found) == len(set(found.tolist())) == 20
        assert np.isin(found, wanted).all()
        positions = np.searchsorted(ids, found)
        np.testing.assert_array_equal(rows, vectors[positions])
        counts[positions] += 1
    expected = 300 * 20 / 100  # of each wanted query; four standard deviations are 28
    assert (np.abs(counts[::3] - expected) < 4 * (expected * 0.8) ** 0.5).all()
    every, _ = sample_queries(str(tmp_path), wanted, 1000, rng)
    assert every.tolist() == wanted.tolist()
    again, _ = sample_queries(str(tmp_path), wanted, 20, np.random.default_rng(299))
    assert again.tolist() == found.tolist()
