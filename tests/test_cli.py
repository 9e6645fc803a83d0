from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from s4g_ray.config import dump_config
from s4g_ray.dataset import GeoDataset
from tests.conftest import tiny_config


def s4g(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "s4g_ray.cli", *arguments], capture_output=True, text=True, timeout=400, check=False
    )


def config_file(tmp_path: Path, dataset: str, name: str = "config.yaml") -> str:
    (tmp_path / name).write_text(dump_config(tiny_config(tmp_path / "run", dataset)))
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epoch=3"], "s4g: unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        (["train.batch_size=15"], "is not divisible by num_workers=2"),
        (["data.uri=/no/such/data"], "no data set at /no/such/data"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    synthetic: GeoDataset, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = s4g("train", config_file(tmp_path, synthetic.uri), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_a_missing_configuration_and_an_unfinished_run_are_exit_2(tmp_path: Path) -> None:
    for arguments in (
        ["train", str(tmp_path / "none.yaml")],
        ["report", str(tmp_path)],
        ["convert", "earth", "x", "y"],
    ):
        done = s4g(*arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


@pytest.mark.cluster
def test_a_run_from_the_command_line_shows_its_progress_and_none_of_rays_noise(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    path = config_file(tmp_path, synthetic.uri)
    done = s4g("train", path, "train.epochs=1", "evaluation.before_training=false", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metrics"]["queries"] > 0
    lines = done.stderr.splitlines()
    expected = (
        "data set synthetic",
        "run folder ",
        "test_convnext, 1 epochs",
        "epoch",
        "           embedded",
        "           test R@1",
        "report:",
        "  ",
    )
    assert [line for line in lines if not line.startswith(expected)] == []
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["epochs"] == 1
    again = s4g("train", path, "train.epochs=1", "evaluation.before_training=false")
    assert again.returncode == 2
    assert "--resume" in again.stderr
