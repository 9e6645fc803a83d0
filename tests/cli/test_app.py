from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.config.loading import dump_config
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.checkpoint import save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.errors import InputError
from s4g_ray.pipeline.run_folder import RunFolder
from tests.conftest import NUM_TEST, tiny_config
from tests.support.evaluated_runs import GRID, write_ground, write_run
from tests.support.forked_processes import Forked, variables
from tests.support.galleries import write_weights
from tests.support.json_fields import documented

MODULE = "s4g_ray.cli.app"


def s4g(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-m", MODULE, *arguments],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def forked_s4g(*arguments: str, starts_ray: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command forked: the imports of an interpreter of its own take 7 s."""
    environment = {**os.environ, **(variables() if starts_ray else {})}
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        status = Forked(MODULE, arguments, environment, out, error).wait(900)
        return subprocess.CompletedProcess(arguments, status, out.read_text(), error.read_text())


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
    path = config_file(tmp_path, synthetic.uri)
    done = forked_s4g("train", path, *arguments, starts_ray=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


CORRECT_PATH = "correct the path, or make one with `s4g convert` or write_dataset"
CORRECT_KEY = "correct data.uri, or make one with `s4g convert` or write_dataset"


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ("train CONFIG", CORRECT_KEY),
        ("train CONFIG --resume", "if it has moved, add data.uri=ITS_NEW_PLACE"),
        ("plan CONFIG", CORRECT_KEY),
        ("index plan CONFIG", CORRECT_KEY),
        ("evaluate WEIGHTS NONE --config CONFIG", CORRECT_PATH),
        ("embed WEIGHTS NONE OUT --config CONFIG", CORRECT_PATH),
        ("gallery build WEIGHTS NONE OUT --config CONFIG", CORRECT_PATH),
        ("gallery calibrate OUT NONE --outside NONE", "correct --outside"),
        ("check NONE", CORRECT_PATH),
        ("pack NONE OUT", CORRECT_PATH),
        ("convert relocate NONE OUT", CORRECT_PATH),
    ],
)
def test_a_data_set_that_is_not_there_is_named_with_what_mends_the_command(
    tmp_path: Path, arguments: str, remedy: str
) -> None:
    none = str(tmp_path / "none")
    given = {"CONFIG": config_file(tmp_path, none), "NONE": none, "OUT": str(tmp_path / "out")}
    if "WEIGHTS" in arguments:
        given["WEIGHTS"] = write_weights(tmp_path)
    done = CliRunner().invoke(app, [given.get(word, word) for word in arguments.split()])
    assert isinstance(done.exception, InputError)
    assert str(done.exception) == f"no data set at {none}: dataset.json is missing; {remedy}"


def test_a_missing_configuration_and_an_unfinished_run_are_exit_2(tmp_path: Path) -> None:
    for arguments in (
        ["train", str(tmp_path / "none.yaml")],
        ["report", str(tmp_path)],
        ["convert", "earth", "x", "y"],
    ):
        done = s4g(*arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


@pytest.mark.cluster
def test_a_run_from_the_command_line_shows_its_progress_and_no_line_of_ray(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    path = config_file(tmp_path, synthetic.uri)
    given = ("train", path, "train.epochs=1", "evaluation.before_training=false")
    done = s4g(*given, "--json", **variables())
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metrics"]["queries"] > 0
    lines = done.stderr.splitlines()
    expected = (
        "data set synthetic",
        "run folder ",
        "disk: at most",
        "test_convnext, 1 epoch of",
        "epoch",
        "           embedded",
        "           test R@1",
        "report:",
        "  ",
    )
    assert [line for line in lines if not line.startswith(expected)] == []
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["epochs"] == 1
    again = forked_s4g(*given)
    assert again.returncode == 2
    assert "--resume" in again.stderr


def test_check_shows_a_table_or_json_and_fails_for_a_fault(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    done = s4g("check", synthetic.uri, "--decode")
    assert (done.returncode, done.stderr) == (0, "")
    assert "images decoded, none undecodable" in " ".join(done.stdout.split())
    shutil.copytree(synthetic.uri, tmp_path / "copy")
    (tmp_path / "copy/images/queries/3.png").unlink()
    done = s4g("check", str(tmp_path / "copy"), "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    fields = documented("s4g check")
    assert (found.keys(), found["findings"][0].keys()) == (fields.own, fields.nested)
    (fault,) = [finding for finding in found["findings"] if finding["level"] == "fault"]
    assert "3.png" in fault["examples"][0]
    done = s4g("check", str(tmp_path))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "loose"], "--protocol loose is none of strict, paper and both"),
        (["--fov", "360,wide"], "--fov 360,wide is not a list of numbers"),
        (["--fov", "360,400"], "--fov 360,400 is not within 0..360 degrees"),
        (["--config", "none.yaml"], "cannot read the configuration none.yaml"),
        (["--queries-out", "q.json"], "neither Parquet nor CSV"),
        (["--queries-out", "q.csv", "--top", "0"], "--top 0 is below 1"),
        ([], "is no run, no export and no .pth or .safetensors file"),
    ],
)
def test_evaluate_answers_bad_input_with_one_line(
    synthetic: GeoDataset, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = forked_s4g("evaluate", str(tmp_path), synthetic.uri, *arguments, starts_ray=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_reports_of_one_run_and_of_two_are_written_and_told_as_json(tmp_path: Path) -> None:
    dataset = write_ground(tmp_path / "data")
    vectors = np.eye(GRID * GRID)
    runs = [str(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        write_run(Path(run), dataset, queries=vectors, references=vectors)
    done = forked_s4g("report", runs[0], "--json", starts_ray=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.keys() == documented("s4g report RUN").own
    assert told["report"] == f"{runs[0]}/report.html"
    assert Path(told["report"]).exists()
    assert told["results"][-1]["name"] == "trained, epoch 2"
    page = str(tmp_path / "both.html")
    done = forked_s4g("report", *runs, "--out", page, "--json", starts_ray=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.keys() == documented("s4g report RUN RUN").own
    assert told["report"] == page
    assert Path(page).exists()
    for arguments, message in (
        ([*runs, "--gallery", "g"], "--gallery belongs to the report of one run"),
        ([runs[0], "--out", page], "--out is for several runs"),
        ([runs[0], runs[0]], "is given 2 times; give each run once"),
    ):
        done = forked_s4g("report", *arguments, starts_ray=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr


@pytest.mark.cluster
def test_an_export_is_evaluated_from_the_command_line(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", synthetic.uri)
    folder = RunFolder.open(config, synthetic, resume=False)
    folder.start()
    save_checkpoint(folder.checkpoint(0), Encoder.build(config.model), None, epoch=0, step=0)
    done = forked_s4g("export", str(tmp_path / "run"), str(tmp_path / "model"), "--epoch", "0")
    assert done.returncode == 0, done
    assert done.stdout == f"test_convnext after epoch 0, D=64: {tmp_path / 'model'}\n"
    missing = forked_s4g("export", str(tmp_path / "run"), str(tmp_path / "other"), "--epoch", "7")
    assert missing.returncode == 2
    queries = tmp_path / "queries.csv"
    options = ["--protocol", "paper", "--queries-out", str(queries), "--top", "3", "--json"]
    done = forked_s4g("evaluate", str(tmp_path / "model"), synthetic.uri, *options)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(queries.open()))
    assert len(rows) == NUM_TEST
    assert all(row["top_uris_3"].endswith(".png") and "top_ids_4" not in row for row in rows)
    value = json.loads(done.stdout)
    fields = documented("s4g evaluate")
    assert value.keys() == fields.own
    (result,) = value["results"]
    assert result.keys() == fields.nested - {"strict"}
    assert result["paper"]["queries"] == NUM_TEST
    assert "strict" not in result
