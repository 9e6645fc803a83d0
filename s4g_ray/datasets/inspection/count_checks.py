"""Check the rows of a data set: filled columns, counts, and places with one view only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Ints
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.data.schema import gallery_splits
from s4g_ray.datasets.inspection.findings import Finding, take_first
from s4g_ray.datasets.inspection.inventory import HELD_OUT, SPLIT_NAMES, Inventory

REGIONS_SHOWN = range(2, 13)  # numbers of regions that are described one by one


def _counts_of_both_views(**splits: int) -> dict[str, int]:
    return {f"{view} {split}": rows for view in VIEWS for split, rows in splits.items()}


# Rows by view and splits, by the data set's name.
PUBLISHED: dict[str, dict[str, int]] = {
    "cvusa": _counts_of_both_views(train=35_532, test=8_884),  # Zhai et al., CVPR 2017
    # Liu and Li, CVPR 2019
    "cvact": _counts_of_both_views(train=35_532, val=8_884, test=92_802),
    # Zhu et al., CVPR 2021: 105,214 queries; same area: every tile of the four cities is in the
    # test gallery. The corrected labels (Lentsch et al., CVPR 2023) move positions, not rows.
    "vigor_same": {
        "queries train": 52_609,
        "queries test": 52_605,
        "references test+gallery": 90_618,
    },
    "vigor_cross": {"queries train": 51_520, "queries test": 53_694},
    # Zheng et al., ACM MM 2020: 701 training buildings of 54 drone images; 250 of the satellite
    # tiles are distractors
    "university1652_drone_to_satellite": {
        "queries train": 701 * 54,
        "queries test": 37_855,
        "references train": 701,
        "references test": 701,
        "references gallery": 250,
    },
    "university1652_satellite_to_drone": {
        "queries train": 701,
        "queries test": 701,
        "references train": 701 * 54,
        "references test+gallery": 51_355,
    },
}


def rows_by_region(inventory: Inventory) -> dict[str, Ints]:
    """Return the row numbers of each region; empty when their number is not in REGIONS_SHOWN."""
    if len(inventory.region_names) not in REGIONS_SHOWN:
        return {}
    return {
        name: np.flatnonzero(inventory.regions == inventory.region_names.index(name))
        for name in sorted(inventory.region_names)
    }


def describe_columns(dataset: GeoDataset, inventory: Inventory) -> Finding:
    """Count the rows in which each optional column is filled."""
    headings = dataset.queries.count_rows(filter=pc.field("heading_deg").is_valid())
    semi_positives = dataset.queries.count_rows(
        filter=pc.list_value_length(pc.field("semi_positives")) > 0
    )
    filled = {
        "coordinates": int(np.isfinite(inventory.lat).sum()),
        "region": int((inventory.regions >= 0).sum()),
        "byte ranges": int((inventory.offsets >= 0).sum()),
        "heading": headings,
        "semi-positives": semi_positives,
    }
    totals = {view: len(inventory.rows(view)) for view in VIEWS}
    queries = count_noun(totals["queries"], "query", "queries")
    references = count_noun(totals["references"], "reference")
    shown = ", ".join(
        f"{name} ({count_noun(count, 'row')})" for name, count in filled.items() if count
    )
    empty = ", ".join(name for name, count in filled.items() if not count)
    text = f"{queries}, {references}; filled: {shown or 'no optional column'}"
    if empty:
        text += f"; empty: {empty}"
    return Finding("ok", "schema", text, values={"rows": totals, "filled": filled})


def count_rows(inventory: Inventory, rows: Ints) -> dict[str, dict[str, int]]:
    """Count rows by view and split, without splits that have none."""
    counts = {}
    for view in ("queries", "references"):
        of_view = rows[inventory.is_query[rows] == (view == "queries")]
        by_split = np.bincount(inventory.splits[of_view], minlength=len(SPLIT_NAMES)).tolist()
        named = zip(SPLIT_NAMES, by_split, strict=True)
        counts[view] = {split: count for split, count in named if count}
    return counts


def describe_counts(inventory: Inventory, counts: Mapping[str, Mapping[str, int]]) -> Finding:
    """Describe the counts of count_rows, and those of each region."""
    regions = {
        name: count_rows(inventory, rows) for name, rows in rows_by_region(inventory).items()
    }
    lines = tuple(f"{name}: {_format_counts(of_region)}" for name, of_region in regions.items())
    return Finding("ok", "counts", _format_counts(counts), lines, {**counts, "regions": regions})


def _format_counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    parts = []
    for view, by_split in counts.items():
        splits = ", ".join(f"{split} {count:,}" for split, count in by_split.items())
        parts.append(f"{view}: {splits or 'none'}")
    return "; ".join(parts)


def compare_published_counts(name: str, counts: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    """Compare the counts with the published ones, when the data set's name is known."""
    wanted = PUBLISHED.get(name.removesuffix("_corrected"), {})
    if not wanted:
        return []
    values = {}
    different = []
    for key, published in wanted.items():
        view, splits = key.split()
        found = sum(counts[view].get(split, 0) for split in splits.split("+"))
        values[key] = {"published": published, "found": found}
        if found != published:
            difference = found - published
            different.append(f"{key} {found:,}, published {published:,} ({difference:+,})")
    if different:
        text = f"not as published for {name}: is it a subset, or were files missing?"
        return [Finding("note", "counts", text, tuple(different), values)]
    return [Finding("ok", "counts", f"as published for {name}", values=values)]


def match_places(inventory: Inventory) -> list[Finding]:
    """Count the train places, and find places that have rows of one view only."""
    queries = inventory.rows("queries", "train")
    references = inventory.rows("references", "train")
    findings = [_describe_train_places(inventory, queries)]
    unused = references[~np.isin(inventory.place_ids[references], inventory.place_ids[queries])]
    if len(unused):
        count = count_noun(len(unused), "train reference")
        text = f"{count} of places without a train query: used as gallery negatives only"
        findings.append(Finding("note", "places", text, values={"unused": len(unused)}))
    for split in HELD_OUT:
        findings.extend(_find_unmatched_queries(inventory, split))
    return findings


def _describe_train_places(inventory: Inventory, queries: Ints) -> Finding:
    per_place = np.unique(inventory.place_ids[queries], return_counts=True)[1]
    mean = float(per_place.mean()) if len(queries) else 0.0
    largest = int(per_place.max()) if len(queries) else 0
    places = count_noun(len(per_place), "train place")
    text = f"{places} with {mean:.4g} queries each (at most {largest:,})"
    values: dict[str, Any] = {
        "train_places": len(per_place),
        "mean_queries": mean,
        "max_queries": largest,
    }
    return Finding("ok", "places", text, values=values)


def _find_unmatched_queries(inventory: Inventory, split: str) -> list[Finding]:
    queries = inventory.rows("queries", split)
    gallery = inventory.place_ids[inventory.rows("references", *gallery_splits(split))]
    unmatched = queries[~np.isin(inventory.place_ids[queries], gallery)]
    if not len(unmatched):
        return []
    total = count_noun(len(queries), f"{split} query", f"{split} queries")
    text = (
        f"{len(unmatched):,} of {total} without a reference of the place in {split} or gallery:"
        " evaluation leaves them out"
    )
    values = {"split": split, "unmatched": len(unmatched), "queries": len(queries)}
    return [Finding("note", "places", text, take_first(map(inventory.label, unmatched)), values)]
