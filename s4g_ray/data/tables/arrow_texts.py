"""Read columns of strings from Arrow tables into TextColumns, without a Python string for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.data.format.image_paths import UP, are_whole, resolve
from s4g_ray.data.tables.text_column import TextColumn, shrink

# Strings are kept once each, with a code for each row, where a row has one of at most so many, as a
# share of the rows.
_CODED_SHARE = 0.25
_SAMPLE = 10_000  # rows


def sort_by_id(table: pa.Table) -> pa.Table:
    """Sort a table by its column `id`; return it as it is where its ids ascend already."""
    ids = table["id"].to_numpy()
    if (ids[1:] >= ids[:-1]).all():
        return table
    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type):  # its 2 GB a column may not hold all paths in one chunk
            column = table[field.name].cast(pa.large_string())
            table = table.set_column(number, field.name, column)
    return table.sort_by("id")


def read_paths(column: pa.ChunkedArray, folder: str) -> TextColumn:
    """Read paths or URIs [N] as image_paths.resolve(folder, path) gives them, without nulls."""
    is_whole = are_whole(column)
    is_above = pc.starts_with(column, UP)
    start = f"{folder.rstrip('/')}/"
    num_whole = pc.sum(is_whole).as_py() or 0
    if num_whole == 0 and not pc.any(is_above).as_py():
        return read_texts(column, start)
    if num_whole < len(column):
        column = pc.if_else(is_whole, column, _join_paths(start, column, is_above))
    return read_texts(column)


def _join_paths(start: str, column: pa.ChunkedArray, is_above: Any) -> pa.ChunkedArray:
    """Join relative paths to a folder, and resolve the `../` at the start of those marked so."""
    between = pa.scalar("", column.type)
    joined = pc.binary_join_element_wise(pa.scalar(start, column.type), column, between)
    if pc.any(is_above).as_py():
        rest = pc.utf8_slice_codeunits(column, len(UP))
        is_higher = pc.and_(is_above, pc.starts_with(rest, UP))
        higher = _join_paths(f"{resolve(start, '..').rstrip('/')}/", rest, is_higher)
        joined = pc.if_else(is_above, higher, joined)
    return joined


def read_texts(column: pa.ChunkedArray, start: str = "") -> TextColumn:
    """Read strings [N] without nulls, each with `start` put before it.

    What all strings begin with is kept once, and so is each string where many rows repeat a few.
    """
    texts = column.cast(pa.large_string()).combine_chunks()
    codes = None
    if _repeats(texts):
        encoded = texts.dictionary_encode()
        if len(encoded.dictionary) <= _CODED_SHARE * len(texts):
            texts = encoded.dictionary
            codes = encoded.indices.to_numpy()
    limits = pc.min_max(texts).as_py()  # what these two begin with, all others do
    shared = _find_common_start(limits["min"] or "", limits["max"] or "")
    if shared:
        texts = pc.utf8_slice_codeunits(texts, len(shared))
    _, bounds_buffer, heap_buffer = texts.buffers()
    bounds = np.zeros(1, dtype=np.int64)
    if len(texts):
        bounds = np.frombuffer(bounds_buffer, dtype=np.int64)[texts.offset :][: len(texts) + 1]
    heap = np.zeros(0, dtype=np.uint8)
    if bounds[-1] > bounds[0]:
        heap = np.frombuffer(heap_buffer, dtype=np.uint8)[bounds[0] : bounds[-1]]
    return TextColumn(start + shared, heap, shrink(bounds - bounds[0]), codes)


def _find_common_start(one: str, other: str) -> str:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return one[:length]


def _repeats(texts: pa.LargeStringArray) -> bool:
    """Check whether rows repeat a few strings, from a range of rows in the middle."""
    sample = texts.slice(max(0, (len(texts) - _SAMPLE) // 2), _SAMPLE)
    return len(sample.unique()) <= _CODED_SHARE * len(sample)
