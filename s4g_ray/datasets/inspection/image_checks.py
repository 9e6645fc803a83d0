"""Check images: missing and undecodable files, sizes, and images that occur more than once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Bools, Ints, group, space_rows
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.datasets.inspection.findings import (
    NUM_EXAMPLES,
    Finding,
    Level,
    take_first,
)
from s4g_ray.datasets.inspection.image_files import DecodedImages
from s4g_ray.datasets.inspection.inventory import HELD_OUT, Inventory, count_distinct

NUM_SAMPLED = 64  # images of a view that are decoded where not all are
NUM_SIZES = 5  # image sizes that are listed of a view


def describe_missing_files(inventory: Inventory, missing: Mapping[int, str]) -> Finding:
    """Describe the image files that are missing (numbers of files, with the reason)."""
    total = count_noun(len(inventory.paths), "image file")
    values = {"files": len(inventory.paths), "missing": len(missing)}
    if not missing:
        return Finding("ok", "images", f"{total}, none missing", values=values)
    rows = np.flatnonzero(np.isin(inventory.files, list(missing)))
    text = f"{len(missing):,} of {total} missing, of {count_noun(len(rows), 'row')}"
    lines = (
        f"{inventory.label_with_uri(row)}: {missing[int(inventory.files[row])]}"
        for row in rows.tolist()
    )
    return Finding("fault", "images", text, take_first(lines), {**values, "rows": len(rows)})


def inspect_content(inventory: Inventory, rows: Ints, decoded: DecodedImages) -> list[Finding]:
    """Describe the decoded images of rows[M]: undecodable ones, sizes, and equal contents."""
    num_images = int(inventory.images.max(initial=-1)) + 1
    decoded_number = np.full(num_images, -1)  # of each image
    has_pixels = decoded.shapes[:, 0] > 0
    decoded_number[inventory.images[rows]] = np.where(has_pixels, np.arange(len(rows)), -1)
    numbers = decoded_number[inventory.images]  # of each row's image; -1: missing or undecodable
    return [
        describe_decoding(inventory, rows, decoded),
        *find_plain_images(inventory, rows, decoded),
        _describe_sizes(inventory, numbers, decoded.shapes),
        _find_equal_content(inventory, numbers, decoded.digests),
    ]


def choose_sample(inventory: Inventory, rows: Ints) -> Ints:
    """Return NUM_SAMPLED of the rows of each view, spread over them."""
    chosen = []
    for view in VIEWS:
        of_view = rows[inventory.is_query[rows] == (view == "queries")]
        chosen.append(of_view[space_rows(len(of_view), NUM_SAMPLED)])
    return np.concatenate(chosen)


def find_plain_images(inventory: Inventory, rows: Ints, decoded: DecodedImages) -> list[Finding]:
    """Find the images of rows[M] whose pixels have one colour: no imagery, or another range."""
    plain = np.flatnonzero(decoded.is_plain)
    if not len(plain):
        return []
    text = (
        f"{len(plain):,} of {count_noun(len(rows), 'image')} show one colour alone: no data there,"
        " or values of another range (`s4g convert stretch`)"
    )
    lines = (inventory.label_with_uri(int(rows[number])) for number in plain)
    values = {"images": len(rows), "plain": len(plain)}
    return [Finding("note", "images", text, take_first(lines), values)]


def describe_decoding(
    inventory: Inventory, rows: Ints, decoded: DecodedImages, kind: str = "image"
) -> Finding:
    """Describe which of the images of rows[M] cannot be decoded, and why."""
    total = count_noun(len(rows), kind)
    values = {"images": len(rows), "undecodable": len(decoded.reasons)}
    if not decoded.reasons:
        return Finding("ok", "images", f"{total} decoded, none undecodable", values=values)
    text = f"{len(decoded.reasons):,} of {total} cannot be decoded"
    lines = (
        f"{inventory.label_with_uri(int(rows[number]))}: {reason}"
        for number, reason in decoded.reasons.items()
    )
    return Finding("fault", "images", text, take_first(lines), values)


def _describe_sizes(inventory: Inventory, numbers: Ints, shapes: Ints) -> Finding:
    values: dict[str, Any] = {}
    parts = []
    for view in VIEWS:
        of_view = np.unique(numbers[inventory.rows(view)])
        height, width = shapes[of_view[of_view >= 0]].T
        sizes, counts = np.unique(height << 32 | width, return_counts=True)
        frequent = np.argsort(-counts, kind="stable")[:NUM_SIZES]
        values[view] = {}
        for position in frequent:
            size = f"{sizes[position] >> 32}x{sizes[position] & 0xFFFFFFFF}"
            values[view][size] = int(counts[position])
        shown = ", ".join(f"{size} ({count:,})" for size, count in values[view].items())
        part = f"{view} {shown or 'none'}"
        if len(sizes) > NUM_SIZES:
            part += f" and {len(sizes) - NUM_SIZES:,} more"
        parts.append(part)
    return Finding("ok", "images", f"height x width: {'; '.join(parts)}", values=values)


def _find_equal_content(
    inventory: Inventory, numbers: Ints, digests: NDArray[np.bytes_]
) -> Finding:
    """Find distinct images with the same bytes; numbers[N] are those of each row in digests."""
    rows = np.flatnonzero(numbers >= 0)
    groups = np.unique(digests[numbers[rows]], return_inverse=True)[1]
    is_copied = count_distinct(groups, inventory.images[rows]) > 1
    rows = rows[is_copied]
    groups = groups[is_copied]
    if not len(rows):
        return Finding("ok", "duplicates", "no two images have the same content")
    train = groups[np.isin(rows, inventory.rows(None, "train"))]
    held_out = groups[np.isin(rows, inventory.rows(None, *HELD_OUT))]
    is_of_several_places = count_distinct(groups, inventory.place_ids[rows]) > 1
    values = {
        "images": len(np.unique(inventory.images[rows])),
        "contents": len(np.unique(groups)),
        "of_several_places": len(np.unique(groups[is_of_several_places])),
        "in_train_and_held_out": len(np.intersect1d(train, held_out)),
    }
    text = (
        f"{values['images']:,} images have the same bytes as another:"
        f" {count_noun(values['contents'], 'content')}"
        f", {values['of_several_places']:,} under several places"
        f", {values['in_train_and_held_out']:,} both in train and in val or test"
    )
    return Finding("note", "duplicates", text, _group_lines(inventory, rows, groups), values)


def find_repeated_images(inventory: Inventory) -> list[Finding]:
    """Find images in several rows or splits, and references of several places at one position."""
    findings = _find_images_in_several_rows(inventory)
    for view in VIEWS:
        findings.extend(_find_images_in_several_splits(inventory, view))
    findings.extend(_find_equal_positions(inventory))
    if not findings:
        text = "no image and no reference's position occurs twice"
        findings.append(Finding("ok", "duplicates", text))
    return findings


def _find_images_in_several_rows(inventory: Inventory) -> list[Finding]:
    groups = group(inventory.images, inventory.is_query, inventory.splits)
    if not len(groups):
        return []
    is_repeated = np.bincount(groups)[groups] > 1
    has_several_places = count_distinct(groups, inventory.place_ids) > 1
    levels: tuple[tuple[Level, str, Bools], ...] = (
        ("fault", "different places", has_several_places),
        ("note", "one place", is_repeated & ~has_several_places),
    )
    findings = []
    for level, places, mask in levels:
        rows = np.flatnonzero(mask)
        if not len(rows):
            continue
        num_images = len(np.unique(groups[rows]))
        text = (
            f"{count_noun(num_images, 'image')} in several rows of {places}, within a view and"
            f" split: {len(rows):,} rows"
        )
        lines = _group_lines(inventory, rows, groups[rows])
        values = {"images": num_images, "rows": len(rows)}
        findings.append(Finding(level, "duplicates", text, lines, values))
    return findings


def _find_images_in_several_splits(inventory: Inventory, view: View) -> list[Finding]:
    rows = inventory.rows(view)
    images = inventory.images[rows]
    is_spread = count_distinct(images, inventory.splits[rows]) > 1
    if not is_spread.any():
        return []
    num_images = len(np.unique(images[is_spread]))
    if view == "references":
        comment = "a tile may serve training and the test gallery"
    else:
        comment = "is that intended?"
    text = f"{count_noun(num_images, 'image')} of {view} in several splits: {comment}"
    lines = _group_lines(inventory, rows[is_spread], images[is_spread], with_uris=False)
    return [Finding("note", "duplicates", text, lines, {"view": view, "images": num_images})]


def _find_equal_positions(inventory: Inventory) -> list[Finding]:
    rows = inventory.located(inventory.rows("references"))
    groups = group(inventory.splits[rows], inventory.lat[rows], inventory.lon[rows])
    is_shared = count_distinct(groups, inventory.place_ids[rows]) > 1
    num_references = int(is_shared.sum())
    if not num_references:
        return []
    num_positions = len(np.unique(groups[is_shared]))
    text = (
        f"{count_noun(num_references, 'reference')} of different places at exactly the same"
        f" {count_noun(num_positions, 'position')} within a split"
    )
    lines = _group_lines(inventory, rows[is_shared], groups[is_shared], with_uris=False)
    values = {"references": num_references, "positions": num_positions}
    return [Finding("note", "duplicates", text, lines, values)]


def _group_lines(
    inventory: Inventory, rows: Ints, groups: Ints, *, with_uris: bool = True
) -> tuple[str, ...]:
    """Return a line for each of the first groups, with its first two rows."""
    label = inventory.label_with_uri if with_uris else inventory.label
    first = np.sort(np.unique(groups, return_index=True)[1])
    lines = []
    for position in first[:NUM_EXAMPLES]:
        members = rows[groups == groups[position]]
        line = " = ".join(map(label, members[:2]))
        if len(members) > 2:
            line += f" and {len(members) - 2:,} more"
        lines.append(line)
    return tuple(lines)
