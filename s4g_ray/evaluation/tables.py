"""Evaluation, and its tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.sphere import format_metres
from s4g_ray.evaluation.metrics import PROTOCOLS
from s4g_ray.evaluation.scores import Metrics, Score


@dataclass(frozen=True)
class Evaluation:
    """What an encoder scores on a split, with one field of view."""

    dataset: str
    split: str
    fov_deg: float
    heading: str
    score: Score
    made_with: dict[str, Any]  # source, weights, sizes, precision, data set's fingerprint
    bad_images: tuple[str, ...] = ()  # left out, with reasons

    def as_dict(self, protocols: Sequence[ProtocolName] = PROTOCOLS) -> dict[str, Any]:
        """Plain values, for JSON."""
        chosen: dict[str, Any] = {p: self.score.metrics[p] for p in protocols}
        regions = {
            name: {p: metrics[p] for p in protocols} for name, metrics in self.score.regions.items()
        }
        where = {
            "dataset": self.dataset,
            "split": self.split,
            "fov_deg": self.fov_deg,
            "heading": self.heading,
        }
        left_out = {"bad_images": list(self.bad_images)}
        return {**where, **chosen, "regions": regions, **left_out, "made_with": self.made_with}


COUNTS = ("queries", "queries_without_reference", "references")
REGION_COLUMNS = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "hit_rate": "hit rate",
    "median_error_m": "median error",
    "queries": "queries",
}


def evaluation_tables(
    results: Sequence[Evaluation], protocols: Sequence[ProtocolName] = PROTOCOLS
) -> list[Table]:
    """The metrics, a column for each field of view and protocol (those that agree share one); then the regions."""
    first = results[0].score.metrics[protocols[0]]
    columns = [
        (f"{result.fov_deg:g}° {result.heading}\n{label}" if len(results) > 1 else label, row)
        for result in results
        for label, row in _columns(result.score.metrics, protocols)
    ]
    left_out = len(results[0].bad_images)
    title = f"{results[0].dataset}, split {results[0].split}" + (
        f" ({left_out} images left out)" if left_out else ""
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for label, _ in columns:
        table.add_column(label, justify="right")
    for key in first:
        table.add_row(
            key,
            *(_cell(key, row.get(key)) for _, row in columns),
            end_section=key == "median_error_m",
        )
    return [
        table,
        *(_region_table(result, protocols) for result in results if result.score.regions),
    ]


def _region_table(result: Evaluation, protocols: Sequence[ProtocolName]) -> Table:
    """A row for each region, or for each region and protocol where these differ."""
    regions = {name: _columns(metrics, protocols) for name, metrics in result.score.regions.items()}
    agree = all(len(rows) == 1 for rows in regions.values())
    table = Table(title=f"by region, {result.fov_deg:g}° {result.heading}", title_justify="left")
    table.add_column("")
    keys = [key for key in REGION_COLUMNS if key in result.score.metrics[protocols[0]]]
    for key in keys:
        table.add_column(REGION_COLUMNS[key], justify="right")
    for name, rows in regions.items():
        for label, row in rows:
            table.add_row(
                name if agree else f"{name}, {label}", *(_cell(key, row.get(key)) for key in keys)
            )
    return table


def _columns(
    metrics: dict[ProtocolName, Metrics], protocols: Sequence[ProtocolName]
) -> list[tuple[str, Metrics]]:
    if len({tuple(metrics[p].items()) for p in protocols}) == 1:
        return [(" = ".join(protocols), metrics[protocols[0]])]
    return [(p, metrics[p]) for p in protocols]


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in COUNTS:
        return f"{value:,.0f}"
    return format_metres(value) if key == "median_error_m" else f"{value:.2%}"
