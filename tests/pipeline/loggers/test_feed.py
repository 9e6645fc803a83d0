from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from s4g_ray.pipeline.loggers import feed as feed_module
from s4g_ray.pipeline.loggers.feed import LoggerFeed
from s4g_ray.pipeline.loggers.pictures import Picture
from s4g_ray.pipeline.loggers.points import Point


class Tool:
    """Keeps what it is given; fails as often as it is told to."""

    batch_size = 2

    def __init__(self, *, num_failures: int = 0, fails_to_open: bool = False) -> None:
        self.num_failures = num_failures
        self.fails_to_open = fails_to_open
        self.opened: list[tuple[str | None, int]] = []
        self.written: list[str] = []
        self.finished: bool | None = None

    def fail_if_told(self) -> None:
        if self.num_failures > 0:
            self.num_failures -= 1
            raise ConnectionError("no network")

    def open(self, run_id: str | None, last_step: int) -> str:
        if self.fails_to_open:
            self.fail_if_told()
        self.opened.append((run_id, last_step))
        return run_id or "new"

    def write(self, points: Sequence[Point]) -> None:
        assert len(points) <= self.batch_size
        self.fail_if_told()
        self.written.extend(point.key for point in points)

    def show(self, pictures: Sequence[Picture], step: int) -> None:
        self.written.append(f"pictures {step}")

    def commit(self) -> None:
        pass

    def close(self, *, finished: bool) -> None:
        self.finished = finished


class Scene:
    def __init__(self, folder: Path) -> None:
        self.uri = str(folder / "tool.json")
        self.lines: list[str] = []

    def feed(self, tool: Tool, origin: str = "a") -> LoggerFeed:
        made = LoggerFeed("tool", tool, self.uri, origin=origin, line=self.lines.append)
        made.start()
        return made

    def write(self, tool: Tool, points: Sequence[Point], *, origin: str = "a") -> None:
        feed = self.feed(tool, origin)
        for point in points:
            feed.put(point)
        feed.end(finished=True)
        feed.join(60)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(feed_module, "RETRY_S", 0.01)
    return Scene(tmp_path)


def step(number: int) -> Point:
    return Point(f"step {number}", number, 1.0, {"step/loss": 0.5}, is_step=True)


def other(epoch: int, at: int) -> Point:
    return Point(f"epoch {epoch}", at, 1.0, {"epoch/loss": 0.5})


def test_points_are_written_once_also_where_steps_are_repeated(scene: Scene) -> None:
    tool = Tool()
    scene.write(tool, [step(1), step(2), other(1, 2), step(1), step(2), other(1, 2), step(3)])
    assert tool.written == ["step 1", "step 2", "epoch 1", "step 3"]
    assert tool.finished is True
    assert scene.lines == []


def test_a_resumed_run_continues_the_tools_run_after_what_is_written(scene: Scene) -> None:
    scene.write(Tool(), [step(1), other(1, 4), step(2)])
    tool = Tool()
    scene.write(tool, [step(1), other(1, 4), step(2), step(3), other(2, 8)])
    assert tool.opened == [("new", 4)]
    assert tool.written == ["step 3", "epoch 2"]


def test_points_of_another_configuration_begin_a_new_run_of_the_tool(scene: Scene) -> None:
    scene.write(Tool(), [step(1), step(2)])
    tool = Tool()
    scene.write(tool, [step(1)], origin="b")
    assert tool.opened == [(None, -1)]
    assert tool.written == ["step 1"]


@pytest.mark.parametrize("fails_to_open", [False, True])
def test_after_failures_all_points_are_written_in_order_and_it_is_said_once(
    scene: Scene, fails_to_open: bool
) -> None:
    tool = Tool(num_failures=3, fails_to_open=fails_to_open)
    feed = scene.feed(tool)
    written = [step(number) for number in range(1, 8)]
    for point in written:
        feed.put(point)
    for _ in range(6000):
        if len(tool.written) == len(written):
            break
        threading.Event().wait(0.01)
    feed.end(finished=False)
    feed.join(60)
    assert tool.written == [point.key for point in written]
    assert tool.finished is False
    assert scene.lines == [
        "tool: cannot write (ConnectionError: no network); the run continues; records wait, and"
        " are written when a later try succeeds",
        "tool: writing again after 3 failures",
    ]


def test_what_is_never_written_is_counted_and_comes_with_the_next_session(scene: Scene) -> None:
    scene.write(Tool(num_failures=1_000_000), [step(1), step(2), step(3)])
    assert scene.lines[1:] == ["tool: 3 records were not written; metrics.jsonl has them"]
    tool = Tool()
    scene.write(tool, [step(1), step(2), step(3)])
    assert tool.written == ["step 1", "step 2", "step 3"]


def test_a_tool_that_hangs_holds_up_neither_records_nor_the_end(scene: Scene) -> None:
    released = threading.Event()

    class Hanging(Tool):
        def write(self, points: Sequence[Point]) -> None:
            released.wait(60)

    feed = scene.feed(Hanging())
    for number in range(1, 101):
        feed.put(step(number))
    feed.end(finished=True)
    feed.join(0.05)
    assert scene.lines == ["tool: 100 records were not written; metrics.jsonl has them"]
    released.set()
    feed.join(60)


def test_pictures_are_written_after_the_points_before_them(scene: Scene) -> None:
    tool = Tool()
    feed = scene.feed(tool)
    feed.put(step(1))
    feed.show([], 1)
    feed.end(finished=True)
    feed.join(60)
    assert tool.written == ["step 1", "pictures 1"]


def test_the_state_is_on_disk_soon_without_waiting_for_the_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "COMMIT_S", 0.01)
    feed = scene.feed(Tool())
    feed.put(step(5))
    for _ in range(6000):
        path = Path(scene.uri)
        if path.exists() and '"step": 5' in path.read_text():
            break
        threading.Event().wait(0.01)
    else:
        pytest.fail("the state was not written")
    feed.end(finished=True)
    feed.join(60)
