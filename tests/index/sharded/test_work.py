"""The work of many shards is that of one index, whatever the order of the ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.arrays import Floats32, spread_rows
from s4g_ray.index.faiss_library import faiss
from s4g_ray.index.plan import plan_index
from s4g_ray.index.sharded.merging import ShardAnswer, search_filled
from s4g_ray.index.sharded.shard import search_once
from s4g_ray.index.sharded.sharding import deal_rows, open_sources, read_ranges
from s4g_ray.index.vector_index import VectorIndex
from tests.support.embedding_tables import Array, write_table

NUM_ROWS, DIM, NUM_SHARDS, K = 20_000, 16, 8, 100


def draw_regions(rng: np.random.Generator, count: int, per_region: int) -> Array:
    """Vectors in the order of places: a stretch of `per_region` rows looks alike."""
    centres = rng.standard_normal((count // per_region, DIM))
    vectors = np.repeat(centres, per_region, axis=0)
    vectors += 0.25 * rng.standard_normal(vectors.shape)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / lengths, np.float32)


@pytest.mark.parametrize("nprobe", [2, 16])
def test_eight_shards_of_ids_in_geographic_order_work_as_one_index_and_alike(
    tmp_path: Path, nprobe: int
) -> None:
    rng = np.random.default_rng(0)
    vectors = draw_regions(rng, NUM_ROWS, 400)
    table = write_table(
        tmp_path / "e", np.arange(NUM_ROWS), vectors, part_rows=8000, group_rows=1000, stamp=None
    )
    queries = vectors[::40] + 0.05 * rng.standard_normal((NUM_ROWS // 40, DIM), np.float32)
    plan = plan_index(NUM_ROWS, DIM, kind="ivf_sq8", nprobe=nprobe)
    template = VectorIndex.template(plan, vectors[spread_rows(NUM_ROWS, plan.train_size, 0)])
    sources, _ = open_sources([table])
    counts = [[1000] * (source.part.rows // 1000) for source in sources]
    shards = []
    for share in deal_rows(sources, counts, NUM_SHARDS):
        shards.append(VectorIndex.empty(plan, template, num_threads=1))
        for ids, rows in read_ranges(share, None):
            shards[-1].add(rows, ids)
    work = np.zeros(NUM_SHARDS)

    def ask(some: Floats32, effort: int | None) -> Sequence[ShardAnswer]:
        answers = []
        for number, shard in enumerate(shards):
            faiss.cvar.indexIVF_stats.reset()
            answers.append(search_once(shard, some, K, effort, None, None))
            work[number] += faiss.cvar.indexIVF_stats.ndis
        return answers

    (found, scores), taken = search_filled(ask, queries, K, None)
    one = VectorIndex.empty(plan, template, num_threads=1)
    one.add(vectors, np.arange(NUM_ROWS))
    faiss.cvar.indexIVF_stats.reset()
    wanted, wanted_scores = one.search(queries, K)
    alone = faiss.cvar.indexIVF_stats.ndis
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)
    assert taken.repeats > 0 or nprobe > 2  # two lists often hold fewer than K
    assert work.sum() <= 1.2 * alone
    assert work.max() <= 1.2 * alone / NUM_SHARDS
