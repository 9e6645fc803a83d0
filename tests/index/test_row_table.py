"""Ids and coordinates of rows, against lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.data.area import Area
from s4g_ray.index import row_table
from s4g_ray.index.row_table import GONE, RowTable


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 50), unique=True, max_size=30),
    asked=st.lists(st.integers(-1, 55), max_size=20),
    gone=st.sets(st.integers(0, 29), max_size=10),
)
def test_rows_are_found_by_id_in_any_order(
    ids: list[int], asked: list[int], gone: set[int]
) -> None:
    table = RowTable.empty()
    for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
        table.append(np.array(half, np.int64), None)
    rows = sorted(row for row in gone if row < len(ids))
    table.mark_gone(np.array(rows, np.int64))
    left = [GONE if row in gone else i for row, i in enumerate(ids)]
    assert len(table) == len(ids) - len(rows)
    wanted = [left.index(i) if i in left and i != GONE else -1 for i in asked]
    assert table.rows_of(np.array(asked, np.int64)).tolist() == wanted
    chosen = table.select(np.unique(np.array(asked, np.int64)), None)
    assert chosen is not None
    assert chosen.tolist() == sorted({row for row in wanted if row >= 0})
    assert not len(table.find_repeated())
    again = RowTable(np.array(left, np.int64))
    assert (len(again), again.ids.tolist()) == (len(table), table.ids.tolist())


def test_an_id_in_several_rows_is_found() -> None:
    table = RowTable(np.array([5, 9, 5, 7, 9, 5]))
    assert table.find_repeated().tolist() == [5, 9]


def test_rows_in_an_area_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_table, "AREA_BLOCK", 7)
    rng = np.random.default_rng(0)
    table = RowTable.empty()
    coordinates = rng.uniform(-50, 50, (100, 2))
    table.append(rng.permutation(100), coordinates)
    area = Area.circle(0, 0, 3_000_000)
    inside = np.flatnonzero(area.contains(*coordinates.T))
    found = table.select(None, area)
    assert found is not None
    assert found.tolist() == inside.tolist()
    kept = np.arange(100) % 3 > 0
    table.keep(kept)
    inside = np.flatnonzero(area.contains(*coordinates[kept].T))
    found = table.select(None, area)
    assert found is not None
    assert found.tolist() == inside.tolist()
