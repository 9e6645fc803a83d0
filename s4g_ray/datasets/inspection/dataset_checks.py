"""What `s4g check` tells of a data set: findings with their figures, each ok, a note or a fault."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Ints, group
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import VIEWS
from s4g_ray.data.schema import gallery_splits
from s4g_ray.data.sphere import EARTH_RADIUS_M, format_metres, metres_between
from s4g_ray.datasets.inspection.findings import (
    NUM_EXAMPLES,
    Finding,
    Inspection,
    Level,
    findings_table,
    first_lines,
    plural,
)
from s4g_ray.datasets.inspection.inventory import (
    HELD_OUT,
    SPLIT_NAMES,
    Inventory,
    decode_images,
    extent,
    missing_files,
    nearest_of_place,
    num_distinct,
    queries_near_train,
)
from s4g_ray.errors import InputError
from s4g_ray.progress import Update, ignore

__all__ = ["Finding", "Inspection", "findings_table", "inspect_dataset"]

REGIONS_SHOWN = range(2, 13)  # how many regions are told one by one
FAR_FROM_PLACE_M = 1000.0  # a query further from its place's references than this is worth a look


def _pairs(**splits: int) -> dict[str, int]:
    return {f"{view} {split}": rows for view in VIEWS for split, rows in splits.items()}


# View and splits -> rows, by the data set's name.
PUBLISHED: dict[str, dict[str, int]] = {
    "cvusa": _pairs(train=35_532, test=8_884),  # Zhai et al., CVPR 2017
    "cvact": _pairs(train=35_532, val=8_884, test=92_802),  # Liu and Li, CVPR 2019
    # Zhu et al., CVPR 2021: 105,214 queries; same area: every tile of the four cities is in the test gallery.
    # The corrected labels (Lentsch et al., CVPR 2023) move positions, not rows.
    "vigor_same": {
        "queries train": 52_609,
        "queries test": 52_605,
        "references test+gallery": 90_618,
    },
    "vigor_cross": {"queries train": 51_520, "queries test": 53_694},
    # Zheng et al., ACM MM 2020: 701 training buildings of 54 drone images; 250 of the satellite tiles are distractors
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


def inspect_dataset(
    uri: str,
    *,
    decode: bool = False,
    leak_radius_m: float = 25.0,
    num_threads: int = 16,
    on_progress: Update = ignore,
) -> Inspection:
    """Check a data set's rows and image files; with `decode`, read and decode every image too.

    `on_progress` counts folders while they are listed, then images while they are decoded. Raises InputError
    for what open_dataset refuses, and for a radius or a number of threads that cannot be.
    """
    if not 0 <= leak_radius_m <= math.pi * EARTH_RADIUS_M:
        raise InputError(
            f"leak_radius_m={leak_radius_m} is not within 0..{math.pi * EARTH_RADIUS_M:.0f} metres"
        )
    if num_threads < 1:
        raise InputError(f"num_threads={num_threads} is below 1; give at least one thread")
    dataset = open_dataset(uri)
    rows = Inventory.read(dataset)
    counts = _count(rows, np.arange(len(rows.ids)))
    missing = missing_files(rows.paths, num_threads=num_threads, on_progress=on_progress)
    findings = [
        _schema(dataset, rows),
        _counts(rows, counts),
        *_published(dataset.name, counts),
        *_matches(rows),
        _extents(rows),
        *_distances_to_place(rows),
        _missing(rows, missing),
        *(_decoded(rows, missing, num_threads, on_progress) if decode else []),
        *_duplicates(rows),
        *_leakage(rows, leak_radius_m),
    ]
    return Inspection(dataset.uri, dataset.name, tuple(findings))


def _by_region(rows: Inventory) -> dict[str, Ints]:
    if len(rows.region_names) not in REGIONS_SHOWN:
        return {}
    return {
        name: np.flatnonzero(rows.regions == rows.region_names.index(name))
        for name in sorted(rows.region_names)
    }


# Schema, counts and matches.


def _schema(dataset: GeoDataset, rows: Inventory) -> Finding:
    filled = {
        "coordinates": int(np.isfinite(rows.lat).sum()),
        "region": int((rows.regions >= 0).sum()),
        "byte ranges": int((rows.offsets >= 0).sum()),
        "heading": dataset.queries.count_rows(filter=pc.field("heading_deg").is_valid()),
        "semi-positives": dataset.queries.count_rows(
            filter=pc.list_value_length(pc.field("semi_positives")) > 0
        ),
    }
    totals = {view: len(rows.rows(view)) for view in VIEWS}
    told = ", ".join(f"{name} ({plural(count, 'row')})" for name, count in filled.items() if count)
    empty = ", ".join(name for name, count in filled.items() if not count)
    text = f"{plural(totals['queries'], 'query', 'queries')}, {plural(totals['references'], 'reference')}"
    text += f"; filled: {told or 'no optional column'}" + (f"; empty: {empty}" if empty else "")
    return Finding("ok", "schema", text, values={"rows": totals, "filled": filled})


def _count(rows: Inventory, chosen: Ints) -> dict[str, dict[str, int]]:
    """Rows by view and split."""
    counts = {}
    for view in ("queries", "references"):
        of_view = chosen[rows.is_query[chosen] == (view == "queries")]
        by_split = np.bincount(rows.splits[of_view], minlength=len(SPLIT_NAMES)).tolist()
        counts[view] = {
            split: count for split, count in zip(SPLIT_NAMES, by_split, strict=True) if count
        }
    return counts


def _counts(rows: Inventory, counts: Mapping[str, Mapping[str, int]]) -> Finding:
    def told(counts: Mapping[str, Mapping[str, int]]) -> str:
        views = {
            view: ", ".join(f"{split} {n:,}" for split, n in of.items()) or "none"
            for view, of in counts.items()
        }
        return "; ".join(f"{view}: {splits}" for view, splits in views.items())

    regions = {name: _count(rows, chosen) for name, chosen in _by_region(rows).items()}
    lines = tuple(f"{name}: {told(of_region)}" for name, of_region in regions.items())
    return Finding("ok", "counts", told(counts), lines, {**counts, "regions": regions})


def _published(name: str, counts: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    wanted = PUBLISHED.get(name.removesuffix("_corrected"), {})
    values = {}
    for what, published in wanted.items():
        view, splits = what.split()
        found = sum(counts[view].get(split, 0) for split in splits.split("+"))
        values[what] = {"published": published, "found": found}
    different = [
        f"{what} {v['found']:,}, published {v['published']:,} ({v['found'] - v['published']:+,})"
        for what, v in values.items()
        if v["found"] != v["published"]
    ]
    if different:
        text = f"not as published for {name}: is it a subset, or were files missing?"
        return [Finding("note", "counts", text, tuple(different), values)]
    return [Finding("ok", "counts", f"as published for {name}", values=values)] if wanted else []


def _matches(rows: Inventory) -> list[Finding]:
    queries, references = rows.rows("queries", "train"), rows.rows("references", "train")
    per_place = np.unique(rows.place_ids[queries], return_counts=True)[1]
    mean, most = (float(per_place.mean()), int(per_place.max())) if len(queries) else (0.0, 0)
    text = (
        f"{plural(len(per_place), 'train place')} with {mean:.4g} queries each (at most {most:,})"
    )
    values: dict[str, Any] = {
        "train_places": len(per_place),
        "mean_queries": mean,
        "max_queries": most,
    }
    findings = [Finding("ok", "places", text, values=values)]
    unused = references[~np.isin(rows.place_ids[references], rows.place_ids[queries])]
    if len(unused):
        text = f"{plural(len(unused), 'train reference')} of places without a train query: gallery negatives at most"
        findings.append(
            Finding(
                "note",
                "places",
                text,
                first_lines(map(rows.label, unused)),
                {"unused": len(unused)},
            )
        )
    for split in HELD_OUT:
        held_out = rows.rows("queries", split)
        gallery = rows.place_ids[rows.rows("references", *gallery_splits(split))]
        lost = held_out[~np.isin(rows.place_ids[held_out], gallery)]
        if len(lost):
            text = f"{len(lost):,} of {plural(len(held_out), f'{split} query', f'{split} queries')}"
            text += f" without a reference of the place in {split} or gallery: evaluation leaves them out"
            values = {"split": split, "unmatched": len(lost), "queries": len(held_out)}
            findings.append(
                Finding("note", "places", text, first_lines(map(rows.label, lost)), values)
            )
    return findings


# Coordinates.


def _told_extent(box: Mapping[str, float]) -> str:
    high, wide = (
        f"{km:,.0f}" if km >= 100 else f"{km:.3g}"
        for km in (box["km_north_south"], box["km_east_west"])
    )
    over = ", over the antimeridian" if box["west"] > box["east"] else ""
    edges = f"lat {box['south']:.7g}..{box['north']:.7g}, lon {box['west']:.7g}..{box['east']:.7g}"
    return f"{edges} ({high} km north-south, {wide} km east-west{over})"


def _extents(rows: Inventory) -> Finding:
    without = {view: int(np.isnan(rows.lat[rows.rows(view)]).sum()) for view in VIEWS}
    partly = any(0 < count < len(rows.rows(view)) for view, count in without.items())
    values: dict[str, Any] = {"without": without}
    located = rows.located(np.arange(len(rows.ids)))
    if not len(located):
        return Finding("ok", "coordinates", "no row has coordinates", values=values)
    values |= {"extent": extent(rows.lat[located], rows.lon[located]), "regions": {}}
    for name, chosen in _by_region(rows).items():
        if len(inside := rows.located(chosen)):
            values["regions"][name] = extent(rows.lat[inside], rows.lon[inside])
    text = f"{_told_extent(values['extent'])}; without coordinates: {without['queries']:,} queries"
    text += f", {without['references']:,} references"
    lines = tuple(f"{name}: {_told_extent(box)}" for name, box in values["regions"].items())
    return Finding("note" if partly else "ok", "coordinates", text, lines, values)


def _distances_to_place(rows: Inventory) -> list[Finding]:
    queries, nearest = nearest_of_place(rows)
    if not len(queries):
        return []
    metres = metres_between(
        rows.lat[queries], rows.lon[queries], rows.lat[nearest], rows.lon[nearest]
    )
    median, most = float(np.median(metres)), float(metres.max())
    values: dict[str, Any] = {
        "median_m": median,
        "max_m": most,
        "far": int((metres > FAR_FROM_PLACE_M).sum()),
    }
    text = f"a query lies {format_metres(median)} (median), at most {format_metres(most)}, from the nearest reference"
    text += " of its place"
    if not values["far"]:
        return [Finding("ok", "coordinates", text, values=values)]
    order = np.argsort(-metres, kind="stable")[: values["far"]]
    text += f"; {plural(values['far'], 'query', 'queries')} over {FAR_FROM_PLACE_M:,.0f} m"
    text += f", the farthest {rows.label(queries[order[0]])}"
    lines = (
        f"{rows.label(queries[i])}: {metres[i]:,.0f} m from reference id {rows.ids[nearest[i]]}"
        for i in order
    )
    return [Finding("note", "coordinates", text, first_lines(lines), values)]


# Images.


def _missing(rows: Inventory, missing: Mapping[int, str]) -> Finding:
    values = {"files": len(rows.paths), "missing": len(missing)}
    if not missing:
        return Finding(
            "ok", "images", f"{plural(len(rows.paths), 'image file')}, none missing", values=values
        )
    lacking = np.flatnonzero(np.isin(rows.files, list(missing)))
    text = f"{len(missing):,} of {plural(len(rows.paths), 'image file')} missing, of {plural(len(lacking), 'row')}"
    lines = (
        f"{rows.label_with_uri(row)}: {missing[int(rows.files[row])]}" for row in lacking.tolist()
    )
    return Finding("fault", "images", text, first_lines(lines), {**values, "rows": len(lacking)})


def _decoded(
    rows: Inventory, missing: Mapping[int, str], num_threads: int, on_progress: Update
) -> list[Finding]:
    first = np.unique(rows.images, return_index=True)[1]
    first = first[~np.isin(rows.files[first], list(missing))]
    decoded = decode_images(rows, first, num_threads=num_threads, on_progress=on_progress)
    values = {"images": len(first), "undecodable": len(decoded.reasons)}
    told = plural(len(first), "image")
    if decoded.reasons:
        text = f"{len(decoded.reasons):,} of {told} cannot be decoded"
        lines = (
            f"{rows.label_with_uri(int(first[number]))}: {reason}"
            for number, reason in decoded.reasons.items()
        )
        finding = Finding("fault", "images", text, first_lines(lines), values)
    else:
        finding = Finding("ok", "images", f"{told} decoded, none undecodable", values=values)
    number_of = np.full(int(rows.images.max(initial=-1)) + 1, -1)
    number_of[rows.images[first]] = np.where(decoded.shapes[:, 0] > 0, np.arange(len(first)), -1)
    numbers = number_of[rows.images]  # of each row's image; -1: missing or undecodable
    return [
        finding,
        _sizes(rows, numbers, decoded.shapes),
        *_same_content(rows, numbers, decoded.digests),
    ]


def _sizes(rows: Inventory, numbers: Ints, shapes: Ints) -> Finding:
    values: dict[str, Any] = {}
    told = []
    for view in VIEWS:
        of_view = np.unique(numbers[rows.rows(view)])
        height, width = shapes[of_view[of_view >= 0]].T
        sizes, counts = np.unique(height << 32 | width, return_counts=True)
        top = np.argsort(-counts, kind="stable")[:5]
        values[view] = {f"{sizes[i] >> 32}x{sizes[i] & 0xFFFFFFFF}": int(counts[i]) for i in top}
        more = f" and {len(sizes) - 5:,} more" if len(sizes) > 5 else ""
        told.append(
            f"{view} {', '.join(f'{size} ({n:,})' for size, n in values[view].items()) or 'none'}{more}"
        )
    return Finding("ok", "images", f"height x width: {'; '.join(told)}", values=values)


# Duplicates and leakage.


def _grouped_lines(
    rows: Inventory, chosen: Ints, groups: Ints, *, uris: bool = True
) -> tuple[str, ...]:
    """A line for each of the first groups: its first two rows."""
    label = rows.label_with_uri if uris else rows.label
    lines = []
    for first in np.sort(np.unique(groups, return_index=True)[1])[:NUM_EXAMPLES]:
        members = chosen[groups == groups[first]]
        more = f" and {len(members) - 2:,} more" if len(members) > 2 else ""
        lines.append(" = ".join(map(label, members[:2])) + more)
    return tuple(lines)


def _same_content(rows: Inventory, numbers: Ints, digests: NDArray[np.bytes_]) -> list[Finding]:
    known = np.flatnonzero(numbers >= 0)
    groups = np.unique(digests[numbers[known]], return_inverse=True)[1]
    copied = num_distinct(groups, rows.images[known]) > 1
    known, groups = known[copied], groups[copied]
    if not len(known):
        return [Finding("ok", "duplicates", "no two images have the same content")]
    train, held_out = (
        groups[np.isin(known, rows.rows(None, *splits))] for splits in (("train",), HELD_OUT)
    )
    values = {
        "images": len(np.unique(rows.images[known])),
        "contents": len(np.unique(groups)),
        "of_several_places": len(
            np.unique(groups[num_distinct(groups, rows.place_ids[known]) > 1])
        ),
        "in_train_and_held_out": len(np.intersect1d(train, held_out)),
    }
    text = f"{values['images']:,} images have the same bytes as another: {plural(values['contents'], 'content')}"
    text += f", {values['of_several_places']:,} under several places"
    text += f", {values['in_train_and_held_out']:,} both in train and in val or test"
    return [Finding("note", "duplicates", text, _grouped_lines(rows, known, groups), values)]


def _duplicates(rows: Inventory) -> list[Finding]:
    findings = []
    within = group(rows.images, rows.is_query, rows.splits)
    repeated = np.bincount(within)[within] > 1 if len(within) else np.zeros(0, dtype=bool)
    several = num_distinct(within, rows.place_ids) > 1
    levels: tuple[tuple[Level, str, Bools], ...] = (
        ("fault", "different places", several),
        ("note", "one place", repeated & ~several),
    )
    for level, of, mask in levels:
        if mask.any():
            chosen, number = np.flatnonzero(mask), len(np.unique(within[mask]))
            text = f"{plural(number, 'image')} in several rows of {of}, within a view and split: {len(chosen):,} rows"
            lines = _grouped_lines(rows, chosen, within[chosen])
            findings.append(
                Finding(level, "duplicates", text, lines, {"images": number, "rows": len(chosen)})
            )
    for view in VIEWS:
        chosen = rows.rows(view)
        images = rows.images[chosen]
        spread = num_distinct(images, rows.splits[chosen]) > 1
        if spread.any():
            number = len(np.unique(images[spread]))
            why = (
                "a tile may serve training and the test gallery"
                if view == "references"
                else "is that meant?"
            )
            text = f"{plural(number, 'image')} of {view} in several splits: {why}"
            lines = _grouped_lines(rows, chosen[spread], images[spread], uris=False)
            findings.append(
                Finding("note", "duplicates", text, lines, {"view": view, "images": number})
            )
    findings += _same_position(rows)
    return findings or [
        Finding("ok", "duplicates", "no image and no reference's position stands twice")
    ]


def _same_position(rows: Inventory) -> list[Finding]:
    chosen = rows.located(rows.rows("references"))
    groups = group(rows.splits[chosen], rows.lat[chosen], rows.lon[chosen])
    shared = num_distinct(groups, rows.place_ids[chosen]) > 1
    if not shared.any():
        return []
    positions = len(np.unique(groups[shared]))
    text = f"{plural(int(shared.sum()), 'reference')} of different places at exactly the same"
    text += f" {plural(positions, 'position')} within a split"
    lines = _grouped_lines(rows, chosen[shared], groups[shared], uris=False)
    return [
        Finding(
            "note",
            "duplicates",
            text,
            lines,
            {"references": int(shared.sum()), "positions": positions},
        )
    ]


def _leakage(rows: Inventory, radius_m: float) -> list[Finding]:
    findings = []
    for split in HELD_OUT:
        if len(rows.rows("queries", split)):
            findings += [_near_train(rows, split, radius_m), _shared_places(rows, split)]
    return findings or [
        Finding("ok", "leakage", "no val or test queries, so none that training could have seen")
    ]


def _near_train(rows: Inventory, split: str, radius_m: float) -> Finding:
    queries, train = rows.rows("queries", split), rows.rows("queries", "train")
    without = {
        of: len(some) - len(rows.located(some)) for of, some in ((split, queries), ("train", train))
    }
    near, nearest, metres = queries_near_train(rows, split, radius_m)
    values: dict[str, Any] = {
        "split": split,
        "radius_m": float(radius_m),
        "queries": len(queries),
        "near": len(near),
    }
    values |= {"share": len(near) / len(queries), "without_coordinates": without}
    if len(train) and (without[split] == len(queries) or without["train"] == len(train)):
        text = f"not checked for nearness: all {split} queries or all train queries are without coordinates"
        return Finding("note", "leakage", text, values=values)
    text = f"{len(near):,} of {len(queries):,} {split} queries ({values['share']:.1%}) within {radius_m:g} m of a train"
    text += f" query; without coordinates: {without[split]:,} {split} and {without['train']:,} train queries"
    order = np.argsort(metres, kind="stable")
    lines = (
        f"{rows.label(near[i])}: {metres[i]:.1f} m from train {rows.label(nearest[i])}"
        for i in order
    )
    return Finding("note" if len(near) else "ok", "leakage", text, first_lines(lines), values)


def _shared_places(rows: Inventory, split: str) -> Finding:
    held_out = np.unique(rows.place_ids[rows.rows("queries", split)])
    shared = np.intersect1d(held_out, rows.place_ids[rows.rows("queries", "train")])
    values = {"split": split, "places": len(held_out), "shared": len(shared)}
    text = f"{len(shared):,} of {plural(len(held_out), f'{split} place')} also with train queries"
    more = f" and {len(shared) - NUM_EXAMPLES:,} more" if len(shared) > NUM_EXAMPLES else ""
    lines = (
        (f"place_ids {', '.join(map(str, shared[:NUM_EXAMPLES]))}{more}",) if len(shared) else ()
    )
    return Finding("note" if len(shared) else "ok", "leakage", text, lines, values)
