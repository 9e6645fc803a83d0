from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import MiningConfig
from s4g_ray.errors import RunError
from s4g_ray.mining.candidates import Filters, References, SearchReferences, Widths
from s4g_ray.mining.cells.cell_plan import CellPlan
from s4g_ray.mining.cells.cell_tasks import (
    CellMining,
    deal_rows,
    mine_block,
    plan_blocks,
    plan_dealing,
)
from s4g_ray.mining.group_tasks import MiningJob
from s4g_ray.storage.manifest import open_published, publish
from tests.mining.cells.test_geographic_cells import draw_places
from tests.support.mining_tables import STAMP, write_view


class RefusingSearch:
    """A search that must not be opened."""

    def open(self, vectors: Floats32, ids: Ints) -> SearchReferences:
        raise AssertionError("a cell was searched")


@pytest.mark.parametrize("change", ["cut", "removed"])
def test_a_dealt_file_that_is_cut_short_or_missing_is_named(tmp_path: Path, change: str) -> None:
    places = draw_places(40, 1)
    vectors = np.eye(40, 6, dtype=np.float32)
    folder = str(tmp_path / "e")
    parts = write_view(folder, "queries", places.ids, places.ids, vectors, 20)
    parts += write_view(folder, "references", places.ids, places.ids, vectors, 20)
    publish(folder, "embeddings", parts, STAMP, {})
    cfg = MiningConfig(cell_places=10, far_references=0)
    known = References(places.ids, places.ids)
    widths = Widths.from_references(known, Filters(3), 20)
    target = str(tmp_path / "g")
    job = MiningJob(0, folder, target, cfg, 3, widths, places.ids, known, None, None)
    plan = CellPlan.from_places(places, places.ids, known, cfg, 3, (0,))
    shared = CellMining(job, RefusingSearch(), plan, 6, "float32")
    dealing = plan_dealing(open_published(folder, "embeddings").parts)
    dealt = [deal_rows(shared, row, lambda _: None) for row in dealing]
    rows = plan_blocks(plan, dealing, dealt)
    assert dealt[0].aside is not None
    path = tmp_path / "g" / "_work" / dealt[0].aside.name
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    with pytest.raises(RunError, match=r"dealt-00000\.bin cannot be read .*; resume"):
        mine_block(shared, rows[0], lambda _: None)
