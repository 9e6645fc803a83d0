"""Check coordinates: extents, and the distances of queries from the references of their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.data.image_table import VIEWS
from s4g_ray.data.sphere import format_metres, metres_between
from s4g_ray.datasets.inspection.count_checks import rows_by_region
from s4g_ray.datasets.inspection.findings import Finding, take_first
from s4g_ray.datasets.inspection.inventory import (
    Inventory,
    compute_extent,
    find_nearest_references,
)

FAR_FROM_PLACE_M = 1000.0  # note a query further than this from its place's references


def describe_extents(inventory: Inventory) -> Finding:
    """Describe the extent of all rows and of each region; a note if coordinates are partly null."""
    without = {view: int(np.isnan(inventory.lat[inventory.rows(view)]).sum()) for view in VIEWS}
    is_partial = any(0 < count < len(inventory.rows(view)) for view, count in without.items())
    values: dict[str, Any] = {"without": without}
    located = inventory.located(np.arange(len(inventory.ids)))
    if not len(located):
        return Finding("ok", "coordinates", "no row has coordinates", values=values)
    values["extent"] = compute_extent(inventory.lat[located], inventory.lon[located])
    values["regions"] = {}
    for name, rows in rows_by_region(inventory).items():
        inside = inventory.located(rows)
        if len(inside):
            extent = compute_extent(inventory.lat[inside], inventory.lon[inside])
            values["regions"][name] = extent
    text = (
        f"{_format_extent(values['extent'])}; without coordinates: {without['queries']:,} queries,"
        f" {without['references']:,} references"
    )
    lines = tuple(f"{name}: {_format_extent(box)}" for name, box in values["regions"].items())
    return Finding("note" if is_partial else "ok", "coordinates", text, lines, values)


def _format_extent(box: Mapping[str, float]) -> str:
    height = _format_km(box["km_north_south"])
    width = _format_km(box["km_east_west"])
    over = ", over the antimeridian" if box["west"] > box["east"] else ""
    edges = f"lat {box['south']:.7g}..{box['north']:.7g}, lon {box['west']:.7g}..{box['east']:.7g}"
    return f"{edges} ({height} km north-south, {width} km east-west{over})"


def _format_km(km: float) -> str:
    return f"{km:,.0f}" if km >= 100 else f"{km:.3g}"


def measure_distances_to_place(inventory: Inventory) -> list[Finding]:
    """Measure each query's distance to the nearest reference of its place.

    A note if one is over FAR_FROM_PLACE_M; nothing if no such pair has coordinates.
    """
    queries, nearest = find_nearest_references(inventory)
    if not len(queries):
        return []
    lat = inventory.lat
    lon = inventory.lon
    metres = metres_between(lat[queries], lon[queries], lat[nearest], lon[nearest])
    median = float(np.median(metres))
    largest = float(metres.max())
    num_far = int((metres > FAR_FROM_PLACE_M).sum())
    values: dict[str, Any] = {"median_m": median, "max_m": largest, "far": num_far}
    text = (
        f"a query lies {format_metres(median)} (median), at most {format_metres(largest)}, from the"
        " nearest reference of its place"
    )
    if not num_far:
        return [Finding("ok", "coordinates", text, values=values)]
    order = np.argsort(-metres, kind="stable")[:num_far]
    text += (
        f"; {count_noun(num_far, 'query', 'queries')} over {FAR_FROM_PLACE_M:,.0f} m, the farthest"
        f" {inventory.label(queries[order[0]])}"
    )
    lines = (
        f"{inventory.label(queries[row])}: {metres[row]:,.0f} m from reference id"
        f" {inventory.ids[nearest[row]]}"
        for row in order
    )
    return [Finding("note", "coordinates", text, take_first(lines), values)]
