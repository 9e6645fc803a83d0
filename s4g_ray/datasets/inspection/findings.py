"""Hold the findings of an inspection, and show them as a table or as plain values for JSON."""

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
    """The result of a check: a sentence with its figures, example lines, and the plain figures."""

    level: Level
    topic: str
    text: str
    examples: tuple[str, ...] = ()  # at most NUM_EXAMPLES, or one line a region
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """All findings of a data set."""

    uri: str
    name: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return all(finding.level != "fault" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return plain types and finite numbers, for JSON."""
        found = [{**vars(finding), "examples": list(finding.examples)} for finding in self.findings]
        return {"uri": self.uri, "name": self.name, "ok": self.ok, "findings": found}


def findings_table(inspection: Inspection) -> Table:
    """Make a table with a row for each finding, its examples indented below the sentence."""
    table = Table(title=Text(f"{inspection.name}: {inspection.uri}"), title_justify="left")
    table.add_column("level", no_wrap=True)
    table.add_column("topic", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for finding in inspection.findings:
        parts: list[RenderableType] = [Text(finding.text)]
        parts.extend(Padding(Text(line), (0, 0, 0, 2)) for line in finding.examples)
        table.add_row(Text(finding.level, STYLES[finding.level]), finding.topic, Group(*parts))
    return table


def take_first(lines: Iterable[str]) -> tuple[str, ...]:
    """Return the first NUM_EXAMPLES lines, without making the others."""
    return tuple(islice(lines, NUM_EXAMPLES))
