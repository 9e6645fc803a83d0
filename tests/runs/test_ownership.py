"""One process at a time works on a run: a second one is refused, a stolen one stops."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from s4g_ray.pipeline.run import run
from s4g_ray.storage import files
from s4g_ray.storage.ownership.lease import owning
from tests.conftest import tiny_config
from tests.support.branched_runs import read_tree
from tests.support.faulty_runs import Command, held, records


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_works_on_is_refused_before_ray_starts(
    synthetic: GeoDataset, tmp_path: Path, resume: bool
) -> None:
    config = tiny_config(tmp_path / "run", synthetic.uri)
    with owning(config.run_dir):
        with pytest.raises(InputError, match=rf"is being written by process {os.getpid()} of"):
            run(config, resume=resume)
        assert [path.name for path in Path(config.run_dir).iterdir()] == [files.LEASE]
    assert not Path(config.run_dir).exists()


def test_a_command_with_bad_input_steals_nothing(synthetic: GeoDataset, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", str(tmp_path / "none"))
    with owning(config.run_dir) as lease:
        with pytest.raises(InputError, match="no data set at"):
            run(config, steal=True)
        (tmp_path / "run" / "run.json").write_text("{}")
        with pytest.raises(InputError, match="holds a run already"):
            run(tiny_config(tmp_path / "run", synthetic.uri), steal=True)
        lease.check()


def published(tree: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a run, without the lease and what Ray Train removes at its end."""
    passing = (files.LEASE, ".ray_train/")
    return {name: data for name, data in tree.items() if not name.startswith(passing)}


@pytest.mark.cluster
def test_a_second_start_changes_nothing_and_a_stolen_run_stops(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", synthetic.uri)
    waits = held("checkpoints/epoch=0002/training_state", tmp_path / "never")
    first = Command(config, [waits])
    first.wait_for((tmp_path / "never.held").exists)
    before = read_tree(config.run_dir)
    for resume in (False, True):
        second = Command(config, resume=resume)
        assert second.wait() == 2, second.output
        assert f"is being written by process {first.process.pid} of" in second.output
        assert len(second.output.splitlines()) == 1
    with owning(config.run_dir, steal=True):
        assert first.wait() == 1, first.output
        assert f"was taken over by process {os.getpid()} of" in first.output
        assert "Traceback" not in first.output
        assert first.left_behind() == []
        (tmp_path / "never").touch()
        after = read_tree(config.run_dir)
    assert published(after) == published(before)
    last = Command(config, resume=True)
    assert last.wait() == 0, last.output
    assert [record["epoch"] for record in records(config, "epoch")] == [1, 2, 3]
