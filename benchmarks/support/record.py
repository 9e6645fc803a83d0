"""Results of benchmarks: measured apart from each other, kept as JSON, rendered into docs/benchmarks.md.

python -m benchmarks.record        # write docs/benchmarks.md anew from benchmarks/results/*.json
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

from benchmarks.support.machine import machine

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
RELIABILITY = PAGE.with_name("reliability.md")
PREFACE = """# Benchmarks

Written by `make bench` from benchmarks/results/*.json; `.venv/bin/python -m benchmarks NAME` runs one of them again.
The machine's name, its versions and the configuration stand below each table. What is compared in a row was measured
in one run: rely on those ratios. Absolute times of different runs differ, as the machine is shared. "Published" is
the form of the published algorithm, written anew in benchmarks/ from its description, with its known mistakes of units
corrected, on as many threads.
"""
Cell = str | int | float


class Measured(NamedTuple):
    """What a call gave, its wall time, and its peak memory beyond what was in use before it."""

    value: Any
    seconds: float
    extra_gb: float


def _rss_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


class Meter:
    """Measures the calls of a process; the memory in use is sampled every 5 ms."""

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Measured:
        """Call a function once."""
        before, stop = _rss_gb(), threading.Event()
        seen = [before]

        def watch() -> None:
            while not stop.wait(0.005):
                seen[0] = max(seen[0], _rss_gb())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        started = time.perf_counter()
        value = function(*args, **kwargs)
        seconds = time.perf_counter() - started
        stop.set()
        thread.join()
        return Measured(value, seconds, max(seen[0], _rss_gb()) - before)


def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module-level function in a process of its own, so that nothing of another's is in its memory."""
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
    """Keep a table as benchmarks/results/NAME.json with machine, versions and date; print it.

    rates: what other benchmarks reckon with, as plain numbers.
    """
    result = {
        "title": title,
        "text": text,
        "command": command,
        "columns": list(columns),
        "rows": [list(r) for r in rows],
        "config": dict(config),
        "rates": dict(rates or {}),
        "order": order,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(render(result), flush=True)


def render(result: Mapping[str, Any]) -> str:
    """A result as Markdown: what was asked, on what, and the table."""
    machine_line = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    settings = ", ".join(f"{k}={v}" for k, v in result["config"].items()) or "none"
    lines = [
        f"## {result['title']}",
        "",
        f"`{result['command']}`: {result['text']}",
        "",
        table(result),
        "",
        f"Configuration: {settings}. {result['date']}; {machine_line}.",
    ]
    return "\n".join(lines) + "\n"


def table(result: Mapping[str, Any]) -> str:
    """The rows of a result as Markdown."""
    rows = [
        " | ".join(f"{c:,}" if isinstance(c, int) else str(c) for c in row)
        for row in result["rows"]
    ]
    head = [f"| {' | '.join(result['columns'])} |", "|" + "---|" * len(result["columns"])]
    return "\n".join([*head, *(f"| {row} |" for row in rows)])


def read_results() -> dict[str, dict[str, Any]]:
    """What is recorded, by name, in order."""
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: (item[1]["order"], item[0])))


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/benchmarks.md, from all results."""
    return "\n".join([PREFACE, *(render(result) for result in results.values())])


def with_table(text: str, result: Mapping[str, Any]) -> str:
    """A page with its first table replaced by that of a result."""
    before, _, after = text.partition("\n| ")
    rest = after.split("\n\n", 1)[1]
    return f"{before}\n{table(result)}\n\n{rest}"


def main() -> None:
    results = read_results()
    PAGE.write_text(page(results))
    if "faults" in results:
        RELIABILITY.write_text(with_table(RELIABILITY.read_text(), results["faults"]))
    print(f"{PAGE} holds {len(results)} results")


if __name__ == "__main__":
    main()
