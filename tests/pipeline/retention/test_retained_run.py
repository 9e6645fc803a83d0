"""What is left of a whole run whose rounds and epochs overlap."""

from __future__ import annotations

from pathlib import Path

import pytest

from s4g_ray.config.schema import RunConfig
from s4g_ray.pipeline.report.page import write_report
from s4g_ray.pipeline.retention.prune import prune_run
from s4g_ray.pipeline.run_folder import read_records

pytestmark = pytest.mark.cluster


def test_a_run_keeps_what_its_report_and_branches_need_and_no_more(undisturbed: RunConfig) -> None:
    """4 epochs, rounds after 1 and 2, evaluations after 2 and 4; checkpoints 0, 3 and 4 stay."""
    run = Path(undisturbed.run_dir)
    mined = [record["epoch"] for record in read_records(str(run)) if record["kind"] == "mining"]
    assert mined == [1, 2]
    assert sorted(path.name for path in (run / "embeddings").iterdir()) == ["v=0004"]
    # a branch from epoch 3 trains epoch 4 on the graph of epoch 2
    assert sorted(path.name for path in (run / "neighbors").iterdir()) == ["v=0002"]
    assert not (run / "driver.json").exists()
    write_report(str(run))
    assert set(prune_run(str(run), dry_run=True).removed) == {"index"}
