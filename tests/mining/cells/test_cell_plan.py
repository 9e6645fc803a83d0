from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.config.schema import MiningConfig
from s4g_ray.data.places import Places
from s4g_ray.errors import InputError
from s4g_ray.mining.candidates import References
from s4g_ray.mining.cells import cell_plan
from s4g_ray.mining.cells.cell_plan import CellPlan
from tests.mining.cells.test_geographic_cells import draw_places

K = 5


def make_plan(seed: int = 0, far: int = 20) -> tuple[CellPlan, References, Places]:
    """150 places in cells of 10, blocks of about 25 mined places, one or two references a place."""
    places = draw_places(150, 3)
    rng = np.random.default_rng(4)
    of_place = np.concatenate([places.ids, rng.choice(places.ids, 70)])
    references = References(np.sort(rng.choice(999, 220, replace=False)), rng.permutation(of_place))
    cfg = MiningConfig(cell_places=10, far_references=far, part_mb=25 * K * 4e-6)
    plan = CellPlan.from_places(places, places.ids[::2], references, cfg, K, (1, seed))
    return plan, references, places


def test_blocks_are_runs_of_cells_with_the_wanted_places_and_mine_each_query_once() -> None:
    plan, _, places = make_plan()
    cells = [cell for block in range(plan.num_blocks) for cell in plan.cells_in(block).tolist()]
    assert cells == list(range(len(plan.cells)))
    mined = places.ids[::2]
    blocks = plan.blocks_of_queries(mined)
    sizes = np.bincount(blocks, minlength=plan.num_blocks)
    assert len(sizes) > 1
    assert (sizes[:-1] >= 25).all()
    for place, block in zip(mined.tolist(), blocks.tolist(), strict=True):
        cell = plan.cells.cell_of[places.ids.tolist().index(place)]
        assert cell in plan.cells_in(block)


def test_a_block_takes_references_of_its_cells_and_those_around_and_a_few_of_anywhere() -> None:
    plan, references, places = make_plan()
    cell_of = dict(zip(places.ids.tolist(), plan.cells.cell_of.tolist(), strict=True))
    taken: list[set[int]] = [set() for _ in range(plan.num_blocks)]
    for rows in np.array_split(np.random.default_rng(0).permutation(len(references)), 7):
        at, blocks = plan.blocks_of_references(rows, references.places[rows])
        for row, block in zip(rows[at].tolist(), blocks.tolist(), strict=True):
            assert row not in taken[block]  # each once
            taken[block].add(row)
    for block in range(plan.num_blocks):
        around = set()
        for cell in plan.cells_in(block).tolist():
            around |= {cell, *plan.cells.adjoining[cell].tolist()}
        near = {
            row for row, place in enumerate(references.places.tolist()) if cell_of[place] in around
        }
        far = set(plan.far_rows[plan.far_blocks == block].tolist())
        assert taken[block] == near | far
        assert 15 <= len(far) <= 20


def test_far_references_are_a_function_of_the_seed() -> None:
    first, second, third = (make_plan(seed)[0] for seed in (0, 0, 1))
    assert first.far_rows.tolist() == second.far_rows.tolist()
    assert first.far_rows.tolist() != third.far_rows.tolist()
    assert not len(make_plan(far=0)[0].far_rows)


def test_a_block_with_many_references_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    num_before = make_plan()[0].num_blocks
    monkeypatch.setattr(cell_plan, "MAX_REFERENCES", 15)
    assert make_plan()[0].num_blocks > num_before


def test_places_without_coordinates_are_refused() -> None:
    places = draw_places(20, 0)
    lat = places.lat.copy()
    lat[3] = np.nan
    unlocated = Places(places.ids, lat, places.lon)
    references = References(np.arange(20), places.ids)
    cfg = MiningConfig()
    with pytest.raises(InputError, match=r"1 have none \(place 9 first\).*mining.scope=global"):
        CellPlan.from_places(unlocated, places.ids[:2], references, cfg, K, (0,))
    with pytest.raises(InputError, match=r"place 4 first"):
        CellPlan.from_places(places, np.array([3, 4]), references, cfg, K, (0,))
