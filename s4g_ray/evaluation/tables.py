"""Define Evaluation, the result of an evaluation, and show it as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from s4g_ray.amounts import count_noun
from s4g_ray.config.data_schema import FieldOfView, format_fov
from s4g_ray.data.schema import ProtocolName
from s4g_ray.data.sphere import format_metres
from s4g_ray.evaluation.metrics import PROTOCOLS
from s4g_ray.evaluation.scores import Metrics, Score

COUNTS = ("queries", "queries_without_reference", "references")
REGION_COLUMNS = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "hit_rate": "hit rate",
    "median_error_m": "median error",
    "queries": "queries",
}


@dataclass(frozen=True)
class Evaluation:
    """The score of an encoder on a split, with one field of view."""

    dataset: str
    split: str
    fov_deg: FieldOfView
    heading: str
    score: Score
    made_with: dict[str, Any]  # source, weights, sizes, precision, data set's fingerprint
    bad_images: tuple[str, ...] = ()  # left out, with reasons

    def as_dict(self, protocols: Sequence[ProtocolName] = PROTOCOLS) -> dict[str, Any]:
        """Return plain values, for JSON."""
        regions = {}
        for name, metrics in self.score.regions.items():
            regions[name] = {protocol: metrics[protocol] for protocol in protocols}
        values: dict[str, Any] = {
            "dataset": self.dataset,
            "split": self.split,
            "fov_deg": self.fov_deg,
            "heading": self.heading,
        }
        for protocol in protocols:
            values[protocol] = self.score.metrics[protocol]
        values["regions"] = regions
        values["bad_images"] = list(self.bad_images)
        values["made_with"] = self.made_with
        return values


def evaluation_tables(
    results: Sequence[Evaluation], protocols: Sequence[ProtocolName] = PROTOCOLS
) -> list[Table]:
    """Build one table of all results, then one of regions for each result that has regions.

    The first has a column for each field of view and protocol; protocols that agree share one.
    """
    columns = []
    for result in results:
        for label, metrics in _list_columns(result.score.metrics, protocols):
            if len(results) > 1:
                label = f"{format_fov(result.fov_deg)}° {result.heading}\n{label}"
            columns.append((label, metrics))
    title = f"{results[0].dataset}, split {results[0].split}"
    if results[0].bad_images:
        title += f" ({count_noun(len(results[0].bad_images), 'image')} left out)"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for label, _ in columns:
        table.add_column(Text(label), justify="right")
    for key in results[0].score.metrics[protocols[0]]:
        cells = [_format_cell(key, metrics.get(key)) for _, metrics in columns]
        table.add_row(key, *cells, end_section=key == "median_error_m")
    with_regions = [result for result in results if result.score.regions]
    return [table, *(_build_region_table(result, protocols) for result in with_regions)]


def _build_region_table(result: Evaluation, protocols: Sequence[ProtocolName]) -> Table:
    """Build a row for each region, or for each region and protocol where protocols differ."""
    regions = {
        name: _list_columns(metrics, protocols) for name, metrics in result.score.regions.items()
    }
    agree = all(len(rows) == 1 for rows in regions.values())
    title = Text(f"by region, {format_fov(result.fov_deg)}° {result.heading}")
    table = Table(title=title, title_justify="left")
    table.add_column("")
    keys = [key for key in REGION_COLUMNS if key in result.score.metrics[protocols[0]]]
    for key in keys:
        table.add_column(REGION_COLUMNS[key], justify="right")
    for name, rows in regions.items():
        for label, metrics in rows:
            cells = [_format_cell(key, metrics.get(key)) for key in keys]
            # Text: a name may hold what rich reads as markup
            table.add_row(Text(name if agree else f"{name}, {label}"), *cells)
    return table


def _list_columns(
    metrics: dict[ProtocolName, Metrics], protocols: Sequence[ProtocolName]
) -> list[tuple[str, Metrics]]:
    """Return the label and metrics of each protocol, or of all together where they agree."""
    distinct = {tuple(metrics[protocol].items()) for protocol in protocols}
    if len(distinct) == 1:
        return [(" = ".join(protocols), metrics[protocols[0]])]
    return [(protocol, metrics[protocol]) for protocol in protocols]


def _format_cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in COUNTS:
        return f"{value:,.0f}"
    if key == "median_error_m" or key.startswith("dis@"):
        return format_metres(value)
    return f"{value:.2%}"
