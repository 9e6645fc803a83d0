from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError, OwnershipLostError
from s4g_ray.pipeline.branches.branch import flatten
from s4g_ray.pipeline.branches.branch_record import Branch
from s4g_ray.pipeline.branches.make_branch import make_branch
from s4g_ray.pipeline.run_folder import FREE_ON_RESUME, RunFolder
from tests.conftest import tiny_config


def test_a_resumed_run_may_change_the_keys_that_errors_of_the_index_name(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    RunFolder.open(tiny_config(tmp_path / "run", synthetic.uri), synthetic, resume=False).start()

    def resume(**mining: Any) -> RunFolder:
        return RunFolder.open(
            tiny_config(tmp_path / "run", synthetic.uri, mining=mining), synthetic, resume=True
        )

    index = {
        "index_kind": "ivf_sq8",
        "nprobe": 9,
        "ef_search": 9,
        "min_recall": 0.5,
        "recall_sample": 7,
    }
    assert (
        resume(**index, num_shards=3, index_memory_gb=2.0, gpus_per_shard=1).config.mining.nprobe
        == 9
    )
    for key, value in {"every_epochs": 2, "max_score": 0.5, "exact_engine": "torch"}.items():
        with pytest.raises(InputError, match=rf"other values \(mining\.{key}: .* -> {value!r}\)"):
            resume(**{key: value})


@pytest.mark.parametrize("name", ["synthetic", "other"])
def test_a_data_set_of_another_name_is_refused_with_the_option_that_names_it(
    synthetic: GeoDataset, tmp_path: Path, name: str
) -> None:
    config = tiny_config(tmp_path / "run", synthetic.uri)
    RunFolder.open(config, synthetic, resume=False).start()
    other = dataclasses.replace(synthetic, name=name, fingerprint="0" * 64)
    with pytest.raises(InputError, match="was started on another data set") as caught:
        RunFolder.open(config, other, resume=True)
    assert ("--name synthetic" in str(caught.value)) is (name == "other")


def test_every_key_that_may_change_is_one_of_the_configuration(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", synthetic.uri)
    tree = config.model_dump()
    assert all(
        key.partition(".")[2] in tree[key.partition(".")[0]]
        for key in FREE_ON_RESUME - {"run_dir", "loggers"}
    )
    assert not FREE_ON_RESUME & set(flatten(config, FREE_ON_RESUME))


def start_folder(folder: RunFolder) -> None:
    folder.start()


def branch_folder(folder: RunFolder) -> None:
    make_branch(folder)


@pytest.mark.parametrize("write", [start_folder, branch_folder])
def test_nothing_is_written_into_a_folder_that_another_process_has_taken(
    tmp_path: Path, write: Callable[[RunFolder], None]
) -> None:
    def refuse() -> None:
        raise OwnershipLostError("taken over")

    run = tmp_path / "run"
    run.mkdir()
    config = tiny_config(run, "data")
    folder = RunFolder(str(run), config, {"status": "running"}, [], [])
    folder.branch = Branch("0001", 1, {}, [])
    folder.guard = refuse
    with pytest.raises(OwnershipLostError):
        write(folder)
    assert list(run.iterdir()) == []
