"""Lines of a command: which are printed."""

from __future__ import annotations

import io
import threading

from rich.console import Console

from s4g_ray.progress import Reporter


def test_a_thread_that_outlives_a_block_prints_nothing_after_it() -> None:
    text = io.StringIO()
    reporter = Reporter(Console(file=text, width=80))
    go_on = threading.Event()

    def work(name: str) -> None:
        reporter.line(f"{name} begins")
        go_on.wait(60)
        reporter.line(f"{name} ends")

    def start(name: str) -> threading.Thread:
        thread = threading.Thread(target=work, args=(name,))
        thread.start()
        return thread

    threads = [start("before")]
    with reporter.silencing_left_threads():
        threads.append(start("within"))
    reporter.line("stopped")
    go_on.set()
    threads.append(start("after"))
    for thread in threads:
        thread.join(60)
    lines = text.getvalue().splitlines()
    assert lines[:2] == ["before begins", "within begins"]
    assert lines.index("stopped") == 2
    assert sorted(lines[3:]) == ["after begins", "after ends", "before ends"]
