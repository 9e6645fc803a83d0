"""What the Grafana dashboard asks of Prometheus: its queries, and the metrics and labels that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from promql_parser import AggregateExpr, Expr, VectorSelector, parse, walk

from s4g_ray.pipeline.prometheus import METRICS

DASHBOARD = Path(__file__).parents[2] / "cluster" / "monitoring" / "dashboard.json"
OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}  # which Ray exports where a GPU is


def exported_name(name: str) -> str:
    """The name of a metric of METRICS in Prometheus: `ray_` before it and, of a counter, `_total` behind it."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return dict(json.loads(DASHBOARD.read_text()))


def dashboard_queries() -> list[str]:
    """Every PromQL expression of the dashboard: of its panels, and the series that its variables list."""
    made = dashboard()
    queries = [target["expr"] for panel in made["panels"] for target in panel.get("targets", [])]
    listed = [
        re.fullmatch(r"label_values\((.*), \w+\)", v.get("definition", ""))
        for v in made["templating"]["list"]
    ]
    return queries + [match[1] for match in listed if match]


def metric_names(expr: str) -> set[str]:
    """The metrics that a PromQL expression reads. Raises ValueError when it is none."""
    return {node.name for node in _nodes(expr) if isinstance(node, VectorSelector) and node.name}


def label_names(expr: str) -> set[str]:
    """The labels that a PromQL expression selects and groups by. Raises ValueError when it is none."""
    names: set[str] = set()
    for node in _nodes(expr):
        if isinstance(node, VectorSelector):
            names.update(matcher.name for matcher in node.matchers.matchers)
        elif isinstance(node, AggregateExpr) and node.modifier:
            names.update(node.modifier.labels)
    return names


def _nodes(expr: str) -> list[Expr]:
    found: list[Expr] = []
    walk(parse(expr), found.append)
    return found
