"""`s4g prune` on run folders that were made without a cluster, and the mark of a driver."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from s4g_ray.pipeline.retention.prune import prune_run, read_state
from s4g_ray.storage import files
from s4g_ray.storage.ownership.lease import owning
from tests.support.branched_runs import read_tree, run_config, write_run


@pytest.fixture
def run(tmp_path: Path, synthetic: GeoDataset) -> str:
    """A finished run of 4 epochs: rounds after 1, 2 and 3, evaluations after each."""
    write_run(str(tmp_path / "run"), synthetic)
    return str(tmp_path / "run")


def test_a_finished_run_keeps_what_reports_and_branches_need(run: str) -> None:
    before = read_tree(run)
    pruned = prune_run(run, keep=0, dry_run=True)
    assert read_tree(run) == before
    assert pruned.removed == {
        "embeddings": ["v=0001", "v=0002", "v=0003"],
        "plans": [f"epoch={epoch:04d}.parquet" for epoch in (1, 2, 3)],
        "neighbors": ["v=0001"],
        "index": ["v=0001", "v=0002", "v=0003"],
    }
    assert prune_run(run, keep=0) == pruned
    after = read_tree(run)
    gone = [name for names in pruned.removed.items() for name in names[1]]
    assert {name for name in before if not any(f"/{one}" in name for one in gone)} <= set(after)
    # a branch from the checkpoints after epochs 2 and 3 begins with these graphs
    assert {name.split("/")[1] for name in after if name.startswith("neighbors/")} == {
        "v=0002",
        "v=0003",
    }
    assert pruned.total_bytes == sum(map(len, before.values())) - sum(map(len, after.values()))
    assert prune_run(run, keep=0).removed == {}


def test_a_stopped_run_keeps_the_tables_and_the_index_of_the_round_that_it_will_repeat(
    run: str,
) -> None:
    records = Path(run, "metrics.jsonl").read_text().splitlines()
    kept = [
        line
        for line in records
        if (json.loads(line)["kind"], json.loads(line).get("epoch")) != ("mining", 3)
    ]
    Path(run, "metrics.jsonl").write_text("\n".join(kept) + "\n")
    for name in ("checkpoints/epoch=0004", "plans/epoch=0004.parquet", "embeddings/v=0004"):
        files.remove(f"{run}/{name}")
    removed = prune_run(run, keep=0).removed
    assert removed["embeddings"] == ["v=0001", "v=0002"]
    assert removed["index"] == ["v=0001", "v=0002"]
    assert removed["plans"] == ["epoch=0001.parquet", "epoch=0002.parquet"]
    assert 3 in read_state(run, run_config(run, "x")).pending


def test_keep_is_what_the_run_was_configured_with_unless_it_is_given(run: str) -> None:
    assert "neighbors" not in prune_run(run, dry_run=True).removed  # keep=9
    assert prune_run(run, keep=2, dry_run=True).removed["plans"] == ["epoch=0001.parquet"]


def test_runs_in_progress_or_about_to_branch_and_other_folders_are_refused(
    run: str, tmp_path: Path
) -> None:
    before = read_tree(run)
    with owning(run):
        with pytest.raises(InputError, match=rf"is being written by process {os.getpid()} of"):
            prune_run(run)
        prune_run(run, dry_run=True)  # writes nothing
    with pytest.raises(InputError, match="leave out --steal"):
        prune_run(run, dry_run=True, steal=True)
    with pytest.raises(InputError, match=r"is no run's folder: run\.json is missing"):
        prune_run(str(tmp_path))
    info = json.loads(Path(run, "run.json").read_text())
    files.write_json(f"{run}/run.json", {**info, "branching": {}})
    with pytest.raises(InputError, match="interrupted while it branched"):
        prune_run(run)
    files.write_json(f"{run}/run.json", info)
    assert read_tree(run).keys() == before.keys()


def test_the_command_says_what_it_removes(run: str) -> None:
    told = CliRunner().invoke(app, ["prune", run, "--keep", "0", "--dry-run"])
    assert told.exit_code == 0
    assert "neighbors: would remove v=0001 (" in told.output
    assert "kept v=0002, v=0003" in told.output
    result = CliRunner().invoke(app, ["prune", run, "--keep", "0", "--json"])
    assert json.loads(result.stdout)["removed"]["neighbors"] == ["v=0001"]
    assert "nothing to remove" in CliRunner().invoke(app, ["prune", run, "--keep", "0"]).output
