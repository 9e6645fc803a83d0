"""Parts in place order, no place in two of them, and blocks of whole batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4g_ray.encoder.embedding.part_plan import (
    BLOCK_BATCHES,
    digest_rows,
    plan_parts,
    rows_of_part,
)


@given(
    places=st.lists(st.integers(-3, 12), max_size=80),
    part_rows=st.integers(1, 40),
    batch_size=st.integers(1, 6),
    share=st.sampled_from([None, 0.5]),
)
def test_rows_follow_places_and_no_place_lies_in_two_parts(
    places: list[int], part_rows: int, batch_size: int, share: float | None
) -> None:
    place_ids = np.array(places, dtype=np.int64)
    ids = np.arange(len(places)) * 3 + 7
    rows = None
    if share is not None:
        rows = np.flatnonzero(np.random.default_rng(len(places)).random(len(places)) < share)
    parts = plan_parts("queries", ids, place_ids, rows, part_rows=part_rows, batch_size=batch_size)
    chosen = range(len(places)) if rows is None else rows.tolist()
    wanted = sorted(chosen, key=lambda row: (places[row], ids[row]))
    blocks = [block for part in parts for block in part.blocks]
    assert [row for block in blocks for row in block.rows.tolist()] == wanted
    held = [{places[row] for b in part.blocks for row in b.rows.tolist()} for part in parts]
    for one, other in itertools.pairwise(held):
        assert max(one) < min(other)
    for part in parts[:-1]:
        assert part.num_images >= part_rows
    for part in parts:
        for block in part.blocks[:-1]:
            assert len(block.rows) % batch_size == 0
        for block in part.blocks:
            assert 0 < len(block.rows) <= 1.5 * BLOCK_BATCHES * batch_size
            assert block.digest == digest_rows(ids[block.rows], place_ids[block.rows])


def test_a_part_has_at_least_its_megabytes() -> None:
    assert rows_of_part(32, 1024, "float16") == 15_504
    assert rows_of_part(32, 1024, "float16") * (2 * 1024 + 16) >= 32e6
    assert rows_of_part(32, 1024, "float32") == pytest.approx(15_504 / 2, rel=0.01)
    assert rows_of_part(1e-9, 1024, "float32") == 1


def test_names_tell_view_part_and_block() -> None:
    ids = np.arange(100)
    parts = plan_parts("references", ids, ids, part_rows=60, batch_size=2)
    assert [part.name for part in parts] == [
        "references/part-00000.parquet",
        "references/part-00001.parquet",
    ]
    assert [block.name for block in parts[1].blocks] == [
        "references/part-00001/block-00000",
        "references/part-00001/block-00001",
    ]
