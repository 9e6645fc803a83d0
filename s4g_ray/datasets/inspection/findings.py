"""Findings of an inspection, and how they are shown: a table, or plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Level = Literal["ok", "note", "fault"]
STYLES: dict[Level, str] = {"ok": "green", "note": "yellow", "fault": "bold red"}
NUM_EXAMPLES = 10


@dataclass(frozen=True)
class Finding:
    """One thing found: a sentence with its figures, lines below it, and the figures as plain values."""

    level: Level
    topic: str
    text: str
    examples: tuple[str, ...] = ()  # the first ten; or a line a region
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """All that was found in a data set."""

    uri: str
    name: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is a fault."""
        return all(finding.level != "fault" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain types and finite numbers, for JSON."""
        found = [{**vars(finding), "examples": list(finding.examples)} for finding in self.findings]
        return {"uri": self.uri, "name": self.name, "ok": self.ok, "findings": found}


def findings_table(inspection: Inspection) -> Table:
    """A row for each finding, its examples indented below."""
    table = Table(title=Text(f"{inspection.name}: {inspection.uri}"), title_justify="left")
    table.add_column("level", no_wrap=True)
    table.add_column("topic", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for finding in inspection.findings:
        parts: list[RenderableType] = [
            Text(finding.text),
            *(Padding(Text(line), (0, 0, 0, 2)) for line in finding.examples),
        ]
        table.add_row(Text(finding.level, STYLES[finding.level]), finding.topic, Group(*parts))
    return table


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: 1 query, 2 queries."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def first_lines(lines: Iterable[str]) -> tuple[str, ...]:
    """The first ten: no more are made."""
    return tuple(islice(lines, NUM_EXAMPLES))
