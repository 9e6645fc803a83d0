"""What a mining job decides and counts: its groups of queries, the places that they share, its report. No Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.mining.candidates import References
from s4g_ray.storage import files

SEARCHER_CPUS = 0.25  # logical, of a task that asks the index: it waits for it most of the time


def plan_groups(num_queries: Sequence[int], part_queries: int) -> list[list[int]]:
    """num_queries of each part of a table -> runs of consecutive parts, each of at most `part_queries` or one part.

    Parts without queries are left out.
    """
    groups: list[list[int]] = []
    size = part_queries
    for part, count in enumerate(num_queries):
        if not count:
            continue
        if not groups or size + count > part_queries:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += count
    return groups


def count_groups(places: Sequence[Ints]) -> tuple[Ints, Ints]:
    """The places of the queries of each group -> places[P], ascending, and in how many groups each of them stands."""
    found, num_groups = np.unique(
        np.concatenate([np.unique(group) for group in places]), return_counts=True
    )
    return found, num_groups.astype(np.int64)


def cut_ranges(places: Ints, rows: Ints, rows_at_once: int) -> list[tuple[int, int]]:
    """places[S], ascending, and rows of each -> first and last place of ranges of about `rows_at_once` rows."""
    number = (np.cumsum(rows) - rows) // rows_at_once
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    ends = np.append(starts[1:], len(places)) - 1 if len(starts) else starts
    return [(int(places[a]), int(places[b])) for a, b in zip(starts, ends, strict=True)]


def job_key(
    settings: dict[str, Any], query_ids: Ints, references: References, exclusions: Exclusions | None
) -> str:
    """A fingerprint of all that determines the parts of a job; `settings` is what is not an array."""
    arrays = [query_ids, references.ids, references.places]
    if exclusions is not None:
        places, semi = exclusions.places, exclusions.semi_positives
        arrays += [places.ids, semi.first, semi.second]
        settings = {**settings, "radius_m": exclusions.radius_m}
        settings["coordinates"] = files.fingerprint(places.lat.tobytes(), places.lon.tobytes())
    lengths = {"lengths": [len(array) for array in arrays]}
    text = json.dumps({**settings, **lengths}, sort_keys=True)
    return files.fingerprint(text.encode(), *(array.tobytes() for array in arrays))
