from __future__ import annotations

import json
from pathlib import Path

import pytest

from s4g_ray.cli.console import make_reporter
from s4g_ray.distributed.submitted_job import check_kept, stop_note
from s4g_ray.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Act as the driver of a job with a working directory; return the job's copy of it."""
    settings = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(settings))
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("uri", ["runs/a", "./a", "file://runs/a"])
def test_results_in_a_jobs_copy_of_the_working_directory_are_refused(job: Path, uri: str) -> None:
    with pytest.raises(
        InputError,
        match=r"run_dir .* lies in this job's copy .* absolute path that all nodes reach",
    ):
        check_kept("run_dir", uri)
    check_kept("run_dir", "s3://bucket/a")
    check_kept("run_dir", str(job.parent / "a"))
    check_kept("run_dir", "../a")


def test_without_a_working_directory_or_outside_a_job_results_may_lie_anywhere(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}, "metadata": {}})
    )
    check_kept("run_dir", "runs/a")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    check_kept("run_dir", "runs/a")
    assert stop_note(25.0) is None


def test_the_note_of_a_job_with_too_little_time_to_stop_gives_the_setting_that_helps(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = stop_note(25.0)
    assert note is not None
    assert note.startswith("`ray job stop` leaves 3 s ")
    settings = json.loads(note[note.index("'") + 1 : note.rindex("'")])
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", settings["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert stop_note(25.0) is None


def test_an_invalid_time_to_stop_is_named_with_a_remedy_and_an_empty_one_is_rays_default(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unset = stop_note(25.0)
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "")
    assert stop_note(25.0) == unset
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "abc")
    with pytest.raises(
        InputError,
        match=r"^RAY_JOB_STOP_WAIT_TIME_S='abc' is not a whole number of seconds; give one",
    ):
        stop_note(25.0)


def test_the_log_of_a_job_is_not_a_terminal_even_when_the_environment_forces_color(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    reporter = make_reporter(False)
    with reporter.stage("work") as update:
        update(1, 2)
        reporter.line("a line")
    assert capsys.readouterr().out == "a line\n"
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert make_reporter(False).console.is_terminal


def test_the_scripts_are_thin() -> None:
    scripts = sorted((ROOT / "jobs").glob("*.py"))
    assert [path.stem for path in scripts] == [
        *("convert", "embed", "evaluate", "gallery", "mine", "serve", "train")
    ]
    assert max(len(path.read_text().splitlines()) for path in scripts) <= 60
