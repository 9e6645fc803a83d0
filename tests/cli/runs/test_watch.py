"""`s4g watch` and the display of a run: what they make of its records."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.cli.runs import live
from s4g_ray.cli.runs.live import LiveReporter, follow_run
from s4g_ray.cli.runs.run_state import RunState, read_state
from s4g_ray.cli.runs.run_view import describe_epoch, describe_state, make_table
from s4g_ray.cli.runs.watched_run import describe_resuming
from s4g_ray.config.loading import dump_config
from s4g_ray.errors import InputError
from s4g_ray.pipeline.branches.branch_record import Branch
from s4g_ray.pipeline.records import parse_record
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.ownership import lease
from s4g_ray.storage.ownership.lease import owning
from s4g_ray.storage.ownership.observer import LeaseObserver
from s4g_ray.storage.ownership.owner import Owner
from tests.conftest import tiny_config
from tests.support.faulty_s3 import Store
from tests.support.json_fields import documented

Line = dict[str, Any]


def workers(time: float, after_step: int = 0) -> Line:
    return {"kind": "workers", "time": time, "workers": 2, "after_step": after_step}


def step(time: float, number: int, epoch: int) -> Line:
    return {"kind": "step", "time": time, "epoch": epoch, "step": number, "loss": 2.0 / number}


def epoch(time: float, number: int, **values: Any) -> Line:
    line = {"kind": "epoch", "time": time, "epoch": number, "step": 10 * number, "loss": 1.5}
    return {**line, "hardness": 3.25, "wait_share": 0.1, "load_wait": 0.25, **values}


def evaluation(time: float, number: int, recall: float, kind: str = "evaluation") -> Line:
    return {"kind": kind, "time": time, "epoch": number, "recall@1": recall}


LINES = [
    evaluation(90, 0, 0.05),
    workers(100),
    step(110, 5, 1),
    epoch(160, 1),
    evaluation(170, 1, 0.125),
    evaluation(171, 1, 0.5, "validation"),
    epoch(220, 2),
    {"kind": "lost", "time": 225, "during_epoch": 3, "ranks": [1], "reason": "[/red] killed"},
    workers(230, after_step=20),
    step(240, 25, 3),
    epoch(330, 3),
]


def state_of(lines: list[Line], num_epochs: int = 5) -> RunState:
    state = RunState("runs/a", num_epochs)
    for line in lines:
        state.add(parse_record(line))
    return state


def write_run(folder: Path, lines: list[Line], status: str = "running") -> None:
    config = tiny_config(folder, "data", train={"epochs": 5})
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {"status": status, "dataset": {"uri": str(Path("data").absolute())}}
    (folder / "run.json").write_text(json.dumps(info))


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run that a living process writes, since before its first record."""
    monkeypatch.setattr("s4g_ray.storage.ownership.owner.time.time", lambda: 80.0)
    with owning(str(tmp_path / "run")):
        monkeypatch.undo()
        yield tmp_path / "run"


def shown(state: RunState, most: int | None = None) -> list[list[str]]:
    """The cells of the table of epochs, as they are printed."""
    text = io.StringIO()
    Console(file=text, width=200).print(make_table(state, most))
    return [line.replace(" %", "%").split() for line in text.getvalue().splitlines()]


def test_the_table_shows_each_epoch_with_its_recall_and_waits() -> None:
    rows = shown(state_of(LINES))
    heading = "epoch loss R@1 val R@1 hardness plan wait image wait pairs/s"
    assert rows[0] == heading.split()
    assert rows[1] == ["0", "-", "5.0%", "-", "-", "-", "-", "-"]
    assert rows[2] == ["1", "1.500", "12.5%", "50.0%", "3.2", "10%", "25%", "-"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "3"]
    assert shown(state_of(LINES), most=2)[1:] == [*rows[3:], ["2", "earlier", "epochs"]]


def test_the_time_left_is_that_of_the_median_epoch_since_the_workers_started() -> None:
    assert state_of(LINES[:3]).seconds_left(120) is None
    # one epoch of 60 s; four more, of which 20 s are over
    assert state_of(LINES[:6]).seconds_left(180) == pytest.approx(4 * 60 - 20)
    # the second epoch takes 200 s already, so that an epoch takes 130 s
    assert state_of(LINES[:6]).seconds_left(360) == pytest.approx(4 * 130 - 130)
    # after the restart an epoch of 100 s; two more
    assert state_of(LINES).seconds_left(340) == pytest.approx(2 * 100 - 10)
    assert state_of(LINES, num_epochs=3).seconds_left(340) == 0


def test_what_is_trained_again_after_a_loss_is_forgotten() -> None:
    lines = [*LINES[:7], step(222, 23, 3), *LINES[7:9]]
    state = state_of(lines)
    assert sorted(state.rows) == [0, 1, 2]
    assert state.step is None
    assert state.notes == ["lost worker 1: [/red] killed"]
    again = state_of([*LINES, workers(400, after_step=10)])
    assert sorted(again.rows) == [0, 1]


def test_a_run_without_an_epoch_says_so() -> None:
    text = describe_state(state_of(LINES[:3]), 120)
    assert "epoch 0 of 5 done" in text
    assert "step 5, loss 0.400" in text
    assert "2 workers" in text
    assert "known after the first epoch" in text


def test_watch_once_prints_plain_lines_and_json_one_object(trained: Path) -> None:
    run = trained
    write_run(run, LINES)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epo')  # its writer is writing it
    done = CliRunner().invoke(app, ["watch", str(run), "--once"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith(f"{run}: running, last record ")
    assert lines[1:5] == [describe_epoch(row) for _, row in sorted(state_of(LINES).rows.items())]
    assert lines[2] == (
        "epoch   1  loss 1.500  R@1 12.5 %  hardness 3.2  plan wait 10 %  image wait 25 %"
        "  val R@1 50.0 %"
    )
    assert lines[5] == "  lost worker 1: [/red] killed"
    assert lines[6].startswith("epoch 3 of 5 done")

    done = CliRunner().invoke(app, ["watch", str(run), "--json"])
    value = json.loads(done.stdout)
    assert value.keys() == documented("s4g watch").own
    assert (value["status"], value["last_epoch"], value["epochs"]) == ("running", 3, 5)
    assert value["resume"] is None
    assert [row["recall"] for row in value["rows"]] == [0.05, 0.125, None, None]


def test_watch_follows_a_run_until_it_is_done(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained
    write_run(run, LINES[:4])
    waits: list[float] = []

    def grow(seconds: float) -> None:
        waits.append(seconds)
        write_run(run, LINES, "running" if len(waits) == 1 else "done")

    monkeypatch.setattr("s4g_ray.cli.runs.watch.time.sleep", grow)
    done = CliRunner().invoke(app, ["watch", str(run), "--every-s", "7"])
    assert done.exit_code == 0, done.output
    assert waits == [7, 7]
    lines = done.output.splitlines()
    assert [line[:9] for line in lines[:3]] == ["epoch   0", "epoch   1", "epoch   1"]
    assert "R@1 12.5 %" in lines[2]  # its evaluation came later
    assert lines[-1] == f"{run}: done"
    assert len(lines) == len(set(lines)) == 7


def elsewhere(run: Path, age_s: float) -> None:
    """Write the lease of a process of another machine."""
    owner = replace(Owner.of_this_process(), host="node7", machine="another", pid=7, user="eve")
    run.mkdir(exist_ok=True)
    (run / files.LEASE).write_bytes(owner.to_bytes())
    os.utime(run / files.LEASE, (time.time() - age_s, time.time() - age_s))


def leave_no_lease(run: Path) -> str:
    return ""


def leave_lease_of_ended_process(run: Path) -> str:
    script = (
        f"from s4g_ray.storage.ownership.lease import *; Lease({str(run)!r}).acquire(Reporter())"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    assert process.wait(60) == 0
    return f": process {process.pid} of .*: it has ended"


def leave_silent_lease(run: Path) -> str:
    elsewhere(run, 500)
    return ": process 7 of eve on node7: it gave no sign of life for 60 s"


LEAVE = [leave_no_lease, leave_lease_of_ended_process, leave_silent_lease]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4g_ray.storage.ownership.observer.NEXT_BEAT_S", 0.05)
    monkeypatch.setattr(lease, "POLL_S", 0.02)


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("option", [["--once"], ["--json"], ["--every-s", "0.1"]])
def test_a_run_that_no_process_trains_is_stopped_and_the_command_resumes_it(
    tmp_path: Path, quick: None, leave: Callable[[Path], str], option: list[str]
) -> None:
    run = tmp_path / "run"
    write_run(run, LINES)
    reason = leave(run)
    again = f"s4g train {run}/config.yaml --resume"
    done = CliRunner().invoke(app, ["watch", str(run), *option])
    if option == ["--json"]:
        value = json.loads(done.stdout)
        assert (value["status"], value["resume"]) == ("stopped", again)
        assert (value["workers"], value["seconds_left"]) == (None, None)
        assert value.keys() == documented("s4g watch").own
    else:
        lines = done.output.splitlines()
        line = lines[0 if option == ["--once"] else -1]
        wanted = f"{run}: stopped after epoch 3 of 5"
        assert re.fullmatch(f"{wanted}{reason}; resume with: {again}", line), done.output
        assert "left" not in done.output
    assert done.exit_code == (1 if option[0] == "--every-s" else 0)


def test_a_run_that_is_resumed_is_starting_until_its_first_record(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LINES)
    with owning(str(run)):
        done = CliRunner().invoke(app, ["watch", str(run), "--once"])
        lines = done.output.splitlines()
        assert lines[0].startswith(f"{run}: starting, last record ")
        assert lines[-1] == "epoch 3 of 5 done  step 25, loss 0.080"
        write_run(run, [*LINES, workers(time.time() + 1, after_step=20)])
        done = CliRunner().invoke(app, ["watch", str(run), "--once"])
    lines = done.output.splitlines()
    assert lines[0].startswith(f"{run}: running, last record ")
    assert lines[-1] == "epoch 2 of 5 done  2 workers  time left: known after the first epoch"


def test_a_run_whose_lease_is_old_by_another_clock_is_running(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, LINES)
    elsewhere(run, 500)
    observer = LeaseObserver(str(run))
    assert observer.look().is_written
    elsewhere(run, 490)  # a heartbeat, by a clock that is late
    assert observer.look_until_sure().is_written
    (run / files.LEASE).write_bytes(b"{")  # damaged, and of this moment
    assert LeaseObserver(str(run)).look_until_sure().holder == "a process whose lease is damaged"


def test_the_command_that_resumes_names_folders_that_moved_and_the_values_of_a_branch(
    tmp_path: Path,
) -> None:
    config = tiny_config("runs/a", "data")
    info = {"dataset": {"uri": "/elsewhere/my data"}}
    moved = "run_dir=s3://b/runs/a 'data.uri=/elsewhere/my data' --resume"
    uri = "s3://b/runs/a"
    assert describe_resuming(uri, info, config) == f"s4g train {uri}/config.yaml {moved}"
    branch = Branch("0001", 2, {}, [])
    text = describe_resuming(uri, {**info, "branching": branch.as_record()}, config)
    assert text == f"s4g train {uri}/branches/0001/branch.yaml {moved}"


@pytest.mark.parametrize("option", ["--once", "--json"])
def test_a_folder_without_a_run_is_refused_at_once(tmp_path: Path, option: str) -> None:
    run = tmp_path / "run"
    done = CliRunner().invoke(app, ["watch", str(run), option])
    assert str(done.exception).startswith(f"no run has begun in {run} yet; start one with ")
    assert done.output == ""
    with owning(str(run)):
        done = CliRunner().invoke(app, ["watch", str(run), option])
    assert str(done.exception).startswith(f"process {os.getpid()} of ")
    assert str(done.exception).endswith(f"has begun no run in {run} yet; watch again later")
    (tmp_path / "other.txt").touch()
    done = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert f"{tmp_path} holds no run, but other files" in str(done.exception)


def test_a_run_that_begins_during_a_look_is_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    look = files.list_content

    def begin(uri: str) -> list[str]:
        if not run.exists():
            write_run(run, LINES, "done")
        return look(uri)

    monkeypatch.setattr(files, "list_content", begin)
    done = CliRunner().invoke(app, ["watch", str(run), "--once"])
    assert done.output.splitlines()[0] == f"{run}: done"


def test_a_run_that_nobody_trains_has_no_workers(tmp_path: Path) -> None:
    write_run(tmp_path / "run", LINES[:3], "replaced")
    done = CliRunner().invoke(app, ["watch", str(tmp_path / "run"), "--json"])
    found = json.loads(done.stdout)
    assert found["status"] == "replaced"
    assert found["workers"] is None
    assert found["seconds_left"] is None


def test_watch_waits_for_a_run_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    held = ExitStack()

    def begin(_: float) -> None:
        if not run.exists():
            held.enter_context(owning(str(run)))
        elif not (run / "run.json").exists():
            write_run(run, LINES)
        else:
            write_run(run, LINES, "done")

    monkeypatch.setattr("s4g_ray.cli.runs.watch.time.sleep", begin)
    with held:
        done = CliRunner().invoke(app, ["watch", str(run)])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == f"waiting up to 300 s for a process to begin a run in {run}"
    assert lines[1].startswith(f"waiting up to 300 s for process {os.getpid()} of ")
    assert lines[-1] == f"{run}: done"


@pytest.mark.parametrize("is_held", [False, True])
def test_watch_waits_no_longer_than_it_is_told(tmp_path: Path, is_held: bool) -> None:
    run = tmp_path / "run"
    with ExitStack() as held:
        if is_held:
            held.enter_context(owning(str(run)))
        done = CliRunner().invoke(app, ["watch", str(run), "--wait-s", "0.2", "--every-s", "0.1"])
    assert f" in {run} within 0.2 s; " in str(done.exception)
    assert len(done.output.splitlines()) == 1


def test_watch_ends_when_the_process_that_it_waits_for_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    held = ExitStack()
    held.enter_context(owning(str(run)))
    monkeypatch.setattr("s4g_ray.cli.runs.watch.time.sleep", lambda _: held.close())
    done = CliRunner().invoke(app, ["watch", str(run)])
    assert f"ended before it began the run in {run}; see its output" in str(done.exception)


@pytest.mark.s3
def test_a_run_in_an_object_store_is_watched_from_its_beginning_to_its_stop(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "s3://data/watched/run"
    write_run(tmp_path, LINES)
    held = ExitStack()
    names = ["config.yaml", "run.json", "metrics.jsonl"]

    def go_on(_: float) -> None:
        if not files.exists(f"{uri}/{files.LEASE}"):
            held.enter_context(owning(uri))
        elif names:
            name = names.pop(0)
            files.write_bytes(f"{uri}/{name}", (tmp_path / name).read_bytes())
        else:
            held.close()

    monkeypatch.setattr("s4g_ray.cli.runs.watch.time.sleep", go_on)
    with held:
        done = CliRunner().invoke(app, ["watch", uri])
    lines = done.output.splitlines()
    assert done.exit_code == 1, done.output
    assert [line.split()[0] for line in lines[:3]] == ["waiting", "waiting", "epoch"]
    again = f"s4g train {uri}/config.yaml run_dir={uri} --resume"
    assert lines[-1] == f"{uri}: stopped after epoch 3 of 5; resume with: {again}"


class Screen(io.StringIO):
    """Text that was written to a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(text: io.StringIO) -> Console:
    return Console(file=text, width=110, height=20, force_terminal=True, highlight=False)


def test_a_run_that_may_not_start_is_refused_before_anything_is_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(run, "data")
    write_run(run, LINES, "done")
    screen = Screen()
    refused = pytest.raises(InputError, match="holds a run already; continue it with --resume")
    with refused, follow_run(Reporter(terminal(screen)), config, resume=False):
        pass
    assert screen.getvalue() == ""
    # another process that writes the folder is named when its lease is found
    with owning(str(run)), follow_run(Reporter(terminal(screen)), config, resume=False) as followed:
        followed["reporter"].refresh()
    assert "waiting for libraries" in screen.getvalue()
    assert "epoch" not in screen.getvalue()


def test_the_settings_of_the_store_hold_before_a_run_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", "data", storage={"region": "eu-north-1"})
    (name, *_) = s3_settings.variables(config.storage)
    monkeypatch.delenv(name, raising=False)
    seen: list[tuple[str, str | None]] = []

    def check(*_: Any, **__: Any) -> None:
        seen.append(("check", os.environ.get(name)))

    def read(*_: Any) -> RunState:
        seen.append(("read", os.environ.get(name)))
        return RunState("runs/a", 5)

    monkeypatch.setattr(live, "check_start_early", check)
    monkeypatch.setattr(live, "read_state", read)
    with follow_run(Reporter(terminal(Screen())), config, resume=True):
        pass
    monkeypatch.delenv(name)
    assert seen == [("check", "eu-north-1"), ("read", "eu-north-1")]


def test_the_display_keeps_lines_and_ends_as_a_table_of_all_epochs() -> None:
    text = io.StringIO()
    with LiveReporter(terminal(text), RunState("runs/a", 5)) as display:
        display.line("data set [bold] synthetic")
        with display.stage("epoch 1 of 5", "2 workers to start") as update:
            display.refresh()
            waiting = text.getvalue()
            update(3, 7)
            display.refresh()
        for line in LINES:
            display.on_record(parse_record(line))
        display.record_line("epoch   1  loss 1.5")
    printed = text.getvalue()
    assert "waiting for 2 workers to start" in waiting
    assert "3 of 7" in printed[len(waiting) :]
    assert "data set [bold] synthetic" in printed
    assert "epoch   1  loss 1.5" not in printed
    end = [re.sub(r"\x1b\[\d*[A-Za-z]", "", line).split() for line in printed.splitlines()[-5:]]
    assert [row[0] for row in end] == ["epoch", "0", "1", "2", "3"]


def test_a_display_follows_a_run_in_a_terminal_alone(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "data", train={"epochs": 5})
    plain = Reporter(Console(file=io.StringIO()))
    with follow_run(plain, config, resume=False) as followed:
        assert followed == {"reporter": plain}
    write_run(tmp_path / "run", LINES)
    forced = Reporter(terminal(io.StringIO()))  # as by FORCE_COLOR, into a file
    with follow_run(forced, config, resume=True) as followed:
        assert followed == {"reporter": forced}
    with follow_run(Reporter(terminal(Screen())), config, resume=True) as followed:
        display = followed["reporter"]
        assert followed["callbacks"] == [display]
        assert sorted(display.state.rows) == [0, 1, 2, 3]
    assert sorted(read_state(str(tmp_path / "run"), 5).rows) == [0, 1, 2, 3]
