"""Define what `s4g doctor` finds: a state, a value, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

State = Literal["ok", "warning", "error"]
STYLES: dict[State, str] = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. remedy: what to do, empty where nothing is to be done."""

    name: str
    state: State
    value: str
    remedy: str = ""


def summarize(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings as JSON: `ok` is false when one of them is an error."""
    return {
        "ok": all(finding.state != "error" for finding in findings),
        "errors": sum(finding.state == "error" for finding in findings),
        "warnings": sum(finding.state == "warning" for finding in findings),
        "checks": [asdict(finding) for finding in findings],
    }


def findings_table(findings: Sequence[Finding]) -> Table:
    """Make a table: state, name and value, and below a value what to do about it."""
    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    for finding in findings:
        value = Text(finding.value)
        if finding.remedy:
            value.append(f"\n-> {finding.remedy}", style=STYLES[finding.state])
        state = Text(finding.state, style=STYLES[finding.state])
        table.add_row(state, Text(finding.name), value)
    return table
