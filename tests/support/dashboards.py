"""Read the queries of the Grafana dashboard, and the metrics and labels that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from promql_parser import AggregateExpr, Expr, VectorSelector, parse, walk

from s4g_ray.pipeline.prometheus import METRICS

DASHBOARD = Path(__file__).parents[2] / "cluster" / "monitoring" / "dashboard.json"
OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}  # exported only where there is a GPU


def exported_name(name: str) -> str:
    """Return the Prometheus name of a metric: `ray_NAME`, of a counter `ray_NAME_total`."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    return dict(json.loads(DASHBOARD.read_text()))


def dashboard_queries() -> list[str]:
    """Return all PromQL expressions of the dashboard: those of its panels and of its variables."""
    made = dashboard()
    queries = [target["expr"] for panel in made["panels"] for target in panel.get("targets", [])]
    listed = [
        re.fullmatch(r"label_values\((.*), \w+\)", v.get("definition", ""))
        for v in made["templating"]["list"]
    ]
    return queries + [match[1] for match in listed if match]


def metric_names(expr: str) -> set[str]:
    """Return the metrics that a PromQL expression reads.

    Raises ValueError for an invalid expression.
    """
    return {node.name for node in _nodes(expr) if isinstance(node, VectorSelector) and node.name}


def label_names(expr: str) -> set[str]:
    """Return the labels by which a PromQL expression selects and groups.

    Raises ValueError for an invalid expression.
    """
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
