"""`s4g train` and jobs/train.py: what they pass to run(), and the command that resumes."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.config.loading import dump_config
from s4g_ray.pipeline import run as run_module
from s4g_ray.pipeline.run_folder import RunResult
from tests.conftest import tiny_config

JOB = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "train.py"))
Calls = list[dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand in for run(): note its arguments, and end as after SIGTERM."""
    found: Calls = []

    def run(config: Any, **options: Any) -> RunResult:
        options.pop("reporter")
        found.append(options)
        return RunResult(config.run_dir, {}, None, [], finished=False)

    monkeypatch.setattr(run_module, "run", run)
    return found


@pytest.mark.parametrize("option", [["--from-epoch", "2"], ["--from-epoch=2"]])
def test_the_epoch_is_passed_on_and_a_branch_that_has_begun_is_resumed_without_it(
    calls: Calls, option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "tiny.yaml")
    Path(path).write_text(dump_config(tiny_config(tmp_path / "run", "data")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").touch()
    override = "train.learning_rate=0.0005"
    done = CliRunner().invoke(app, ["train", path, override, "--resume", *option])
    assert done.exit_code == 0, done.output
    again = shlex.join(["s4g", "train", path, override, "--resume"])
    assert done.output.splitlines()[-1] == f"resume with: {again}"
    job = typer.Typer()
    job.command()(JOB["train"])
    arguments = ["--config", path, override, "--resume", *option]
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", *arguments])
    done = CliRunner().invoke(job, arguments)
    assert done.exit_code == 0, done.output
    again = shlex.join(["python", "jobs/train.py", "--config", path, override, "--resume"])
    assert done.output.splitlines()[-1] == f"resume with: ray job submit ... -- {again}"
    assert calls == [{"resume": True, "from_epoch": 2, "steal": False}] * 2


def test_a_job_without_options_is_resumed_with_its_arguments() -> None:
    arguments = ["jobs/train.py", "--config", "a.yaml", "run_dir=x y"]
    describe_next = JOB["describe_next"]
    wanted = "ray job submit ... -- python jobs/train.py --config a.yaml 'run_dir=x y' --resume"
    assert describe_next(arguments) == wanted
    assert describe_next([*arguments[:1], "--from-epoch", "3", *arguments[1:]]) == wanted


def test_a_run_that_sigterm_ended_before_it_began_names_no_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: Any, **_: Any) -> RunResult:
        return RunResult(config.run_dir, {}, None, [], finished=False, begun=False)

    monkeypatch.setattr(run_module, "run", run)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(tiny_config(tmp_path / "run", "data")))
    done = CliRunner().invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "SIGTERM: nothing was begun"
    assert "resume" not in done.output
