"""A rank reads its share of a plan: the same as the share of the whole plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from s4g_ray.arrays import Ints
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables import batch_plan
from s4g_ray.data.tables.batch_plan import (
    BatchPlan,
    PlanStats,
    load_gallery,
    load_gallery_share,
    load_plan,
    load_plan_share,
)
from s4g_ray.errors import RunError


def save_plan(uri: str, batches: Ints) -> PairTable:
    """Save a plan with a gallery of 5 columns; return its pairs."""
    ids = np.arange(batches.size + 3) * 7
    pairs = PairTable(ids + 1, ids + 2, ids)
    gallery = np.random.default_rng(1).integers(-1, 50, (len(batches), 5))
    stats = PlanStats(len(ids), batches.size, 3, 0.0)
    BatchPlan(batches, stats, gallery).save(uri, pairs)
    return pairs


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("read_at_once", [1, 7, 1000])
def test_the_shares_of_ranks_are_those_of_the_whole_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int, read_at_once: int
) -> None:
    monkeypatch.setattr(batch_plan, "ROWS_PER_GROUP", 40)
    monkeypatch.setattr(batch_plan, "READ_AT_ONCE", read_at_once)
    uri = str(tmp_path / "plan.parquet")
    batches = np.random.default_rng(0).permutation(132).reshape(11, 12)
    pairs = save_plan(uri, batches)
    whole = [pairs.query_ids[batches], pairs.reference_ids[batches]]
    shares = [load_plan_share(uri, num_ranks, rank) for rank in range(num_ranks)]
    for ids, own in zip(whole, zip(*shares, strict=True), strict=True):
        check_shares(list(own), ids)
    gallery = [load_gallery_share(uri, num_ranks, rank) for rank in range(num_ranks)]
    check_shares(gallery, load_gallery(uri))


def check_shares(shares: list[Ints], whole: Ints) -> None:
    """Ranks take equal, consecutive shares of whole[B, n]; the last slots of the last are empty."""
    size = -(-whole.shape[1] // len(shares))
    for rank, share in enumerate(shares):
        assert share.shape == (len(whole), size)
        assert share.base is None  # a view would keep more than the share
        for number, row in enumerate(share.tolist()):
            own = whole[number].tolist()[rank * size : (rank + 1) * size]
            assert row == own + [-1] * (size - len(own))


@pytest.mark.parametrize("num_rows", [20, 23, 25])
def test_a_plan_with_another_number_of_pairs_than_it_names_is_refused(
    tmp_path: Path, num_rows: int
) -> None:
    uri = str(tmp_path / "plan.parquet")
    save_plan(uri, np.arange(24).reshape(6, 4))
    pq.write_table(pq.read_table(uri).slice(0, num_rows), uri)
    with pytest.raises(RunError, match="not 6 batches of 4; it was altered: remove it"):
        load_plan(uri)
