"""The last lines of a run that SIGTERM ends."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.distributed.placement import Node
from s4g_ray.pipeline import driver
from s4g_ray.pipeline.preemption import PreemptedError
from s4g_ray.pipeline.run import run
from s4g_ray.progress import Reporter
from tests.conftest import tiny_config

LAST = "stopped; the newest checkpoint is that of step 7"


def test_no_line_follows_that_of_a_run_that_is_stopped(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    rounds: list[threading.Thread] = []

    class Stopped:
        """A Driver that is stopped while a round is in progress."""

        def __init__(self, *arguments: Any) -> None:
            self.reporter: Reporter = arguments[5]

        def check_indexes(self) -> None:
            """Find no fault."""

        def train(self, _: Any) -> None:
            rounds.append(threading.Thread(target=self.mine))
            rounds[0].start()
            raise PreemptedError(LAST)

        def mine(self) -> None:
            go_on.wait(60)
            self.reporter.line("  mining: 3 of 7")

    text = io.StringIO()
    reporter = Reporter(Console(file=text, width=200))

    @contextmanager
    def session(*_: Any) -> Iterator[list[Node]]:
        try:
            yield [Node(4, 0)]
        finally:
            reporter.line("Ray has ended")

    monkeypatch.setattr(driver, "Driver", Stopped)
    monkeypatch.setattr(driver, "ray_session", session)
    monkeypatch.setattr(driver, "check_disk", lambda *_: None)
    config = tiny_config(tmp_path / "run", synthetic.uri)
    result = run(config, reporter=reporter)
    go_on.set()
    rounds[0].join(60)
    assert not result.finished
    assert text.getvalue().splitlines()[-2:] == ["Ray has ended", LAST]
