"""Measure in separate processes, keep results as JSON and render them into docs/benchmarks.md.

python -m benchmarks.support.record   # write docs/benchmarks.md from benchmarks/results/*.json
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.support.machine import describe_machine

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
RELIABILITY = PAGE.with_name("reliability.md")
PREFACE = """# Benchmarks

Written by `make bench` from benchmarks/results/*.json; `.venv/bin/python -m benchmarks NAME` runs
one of them again. The machine, its versions and the configuration are listed below each table.
Figures in one row were measured in one run: rely on their ratios. Absolute times of different runs
differ, because the machine is shared. "Published" is the form of the published algorithm, written
anew in benchmarks/ from its description, with its known mistakes of units corrected, on as many
threads.
"""
Cell = str | int | float


class Measured(NamedTuple):
    """Result of a call, its wall time, and its peak memory beyond that in use before it."""

    value: Any
    seconds: float
    extra_gb: float


def _used_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


class Meter:
    """Measures the calls of a process; the memory in use is sampled every 5 ms."""

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Measured:
        """Call a function once and measure it."""
        before = _used_gb()
        stop = threading.Event()
        peaks = [before]

        def watch() -> None:
            while not stop.wait(0.005):
                peaks[0] = max(peaks[0], _used_gb())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        started = time.perf_counter()
        value = function(*args, **kwargs)
        seconds = time.perf_counter() - started
        stop.set()
        thread.join()
        return Measured(value, seconds, max(peaks[0], _used_gb()) - before)


def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module-level function in a new process, whose memory holds no earlier results."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args, kwargs)


def record(
    name: str,
    *,
    title: str,
    text: str,
    command: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    config: Mapping[str, Any],
    order: int,
    rates: Mapping[str, float] | None = None,
) -> None:
    """Write a table to benchmarks/results/NAME.json with machine, versions and date; print it.

    rates: plain numbers that other benchmarks compute with.
    """
    result = {
        "title": title,
        "text": text,
        "command": command,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "config": dict(config),
        "rates": dict(rates or {}),
        "order": order,
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(render(result), flush=True)


def render(result: Mapping[str, Any]) -> str:
    """Render a result as Markdown: title, command, table, configuration and machine."""
    machine_line = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    settings = ", ".join(f"{k}={v}" for k, v in result["config"].items()) or "none"
    lines = [
        f"## {result['title']}",
        "",
        f"`{result['command']}`: {result['text']}",
        "",
        render_table(result),
        "",
        f"Configuration: {settings}. {result['date']}; {machine_line}.",
    ]
    return "\n".join(lines) + "\n"


def render_table(result: Mapping[str, Any]) -> str:
    """Render the rows of a result as Markdown."""
    columns = result["columns"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        cells = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_results() -> dict[str, dict[str, Any]]:
    """Read all results by name, in the order of the page."""
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: (item[1]["order"], item[0])))


def render_page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Render docs/benchmarks.md from all results."""
    return "\n".join([PREFACE, *(render(result) for result in results.values())])


def replace_table(text: str, result: Mapping[str, Any]) -> str:
    """Replace the first table of a page by that of a result."""
    before, _, after = text.partition("\n| ")
    rest = after.split("\n\n", 1)[1]
    return f"{before}\n{render_table(result)}\n\n{rest}"


def main() -> None:
    """Write docs/benchmarks.md and the table of docs/reliability.md."""
    results = read_results()
    PAGE.write_text(render_page(results))
    if "faults" in results:
        RELIABILITY.write_text(replace_table(RELIABILITY.read_text(), results["faults"]))
    print(f"{PAGE} holds {len(results)} results")


if __name__ == "__main__":
    main()
