"""`s4g watch` and the display of a run: what they make of its records."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.cli.runs.live import LiveReporter, follow_run
from s4g_ray.cli.runs.run_state import RunState, read_state
from s4g_ray.cli.runs.run_view import describe_epoch, describe_state, make_table
from s4g_ray.config.loading import dump_config
from s4g_ray.pipeline.records import parse_record
from s4g_ray.progress import Reporter
from tests.conftest import tiny_config
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
    (folder / "run.json").write_text(json.dumps({"status": status}))


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


def test_watch_once_prints_plain_lines_and_json_one_object(tmp_path: Path) -> None:
    run = tmp_path / "run"
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
    assert [row["recall"] for row in value["rows"]] == [0.05, 0.125, None, None]


def test_watch_follows_a_run_until_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
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


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert "holds no run (yet)" in str(done.exception)


class Screen(io.StringIO):
    """Text that was written to a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(text: io.StringIO) -> Console:
    return Console(file=text, width=110, height=20, force_terminal=True, highlight=False)


def test_the_display_keeps_lines_and_ends_as_a_table_of_all_epochs() -> None:
    text = io.StringIO()
    with LiveReporter(terminal(text), RunState("runs/a", 5)) as live:
        live.line("data set [bold] synthetic")
        with live.stage("epoch 1 of 5", "2 workers to start") as update:
            live.refresh()
            waiting = text.getvalue()
            update(3, 7)
            live.refresh()
        for line in LINES:
            live.on_record(parse_record(line))
        live.record_line("epoch   1  loss 1.5")
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
    with follow_run(plain, config) as followed:
        assert followed == {"reporter": plain}
    write_run(tmp_path / "run", LINES)
    forced = Reporter(terminal(io.StringIO()))  # as by FORCE_COLOR, into a file
    with follow_run(forced, config) as followed:
        assert followed == {"reporter": forced}
    with follow_run(Reporter(terminal(Screen())), config) as followed:
        live = followed["reporter"]
        assert followed["callbacks"] == [live]
        assert sorted(live.state.rows) == [0, 1, 2, 3]
    assert sorted(read_state(str(tmp_path / "run"), 5).rows) == [0, 1, 2, 3]
