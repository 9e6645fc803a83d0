"""Find val and test queries that training could have seen: near a train query, or of its place."""

from __future__ import annotations

from typing import Any

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.datasets.inspection.findings import NUM_EXAMPLES, Finding, take_first
from s4g_ray.datasets.inspection.inventory import HELD_OUT, Inventory, find_queries_near_train


def find_leakage(inventory: Inventory, radius_m: float) -> list[Finding]:
    """Find queries of val and test within a radius of a train query, and places they share."""
    findings = []
    for split in HELD_OUT:
        if len(inventory.rows("queries", split)):
            findings.append(_find_near_train(inventory, split, radius_m))
            findings.append(_find_shared_places(inventory, split))
    if not findings:
        text = "no val or test queries, so none that training could have seen"
        findings.append(Finding("ok", "leakage", text))
    return findings


def _find_near_train(inventory: Inventory, split: str, radius_m: float) -> Finding:
    queries = inventory.rows("queries", split)
    train = inventory.rows("queries", "train")
    without = {
        split: len(queries) - len(inventory.located(queries)),
        "train": len(train) - len(inventory.located(train)),
    }
    near, nearest, metres = find_queries_near_train(inventory, split, radius_m)
    share = len(near) / len(queries)
    values: dict[str, Any] = {
        "split": split,
        "radius_m": float(radius_m),
        "queries": len(queries),
        "near": len(near),
        "share": share,
        "without_coordinates": without,
    }
    if len(train) and (without[split] == len(queries) or without["train"] == len(train)):
        text = (
            f"nearness not checked: all {split} queries or all train queries are without"
            " coordinates"
        )
        return Finding("note", "leakage", text, values=values)
    text = (
        f"{len(near):,} of {len(queries):,} {split} queries ({share:.1%}) within {radius_m:g} m of"
        f" a train query; without coordinates: {without[split]:,} {split} and"
        f" {without['train']:,} train queries"
    )
    lines = (
        f"{inventory.label(near[row])}: {metres[row]:.1f} m from train"
        f" {inventory.label(nearest[row])}"
        for row in np.argsort(metres, kind="stable")
    )
    return Finding("note" if len(near) else "ok", "leakage", text, take_first(lines), values)


def _find_shared_places(inventory: Inventory, split: str) -> Finding:
    held_out = np.unique(inventory.place_ids[inventory.rows("queries", split)])
    train = inventory.place_ids[inventory.rows("queries", "train")]
    shared = np.intersect1d(held_out, train)
    values = {"split": split, "places": len(held_out), "shared": len(shared)}
    places = count_noun(len(held_out), f"{split} place")
    text = f"{len(shared):,} of {places} also with train queries"
    if not len(shared):
        return Finding("ok", "leakage", text, values=values)
    line = f"place_ids {', '.join(map(str, shared[:NUM_EXAMPLES]))}"
    if len(shared) > NUM_EXAMPLES:
        line += f" and {len(shared) - NUM_EXAMPLES:,} more"
    return Finding("note", "leakage", text, (line,), values)
