"""Group the queries of a mining job, find the places that groups share, compute the job's key.

Pure functions: no Ray, no files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.mining.candidates import References
from s4g_ray.storage import files

# logical CPUs of a task that asks the index: it spends nearly all of its time waiting for answers
SEARCHER_CPUS = 0.25


def plan_groups(num_queries: Sequence[int], part_queries: int) -> list[list[int]]:
    """Group consecutive parts of a table: num_queries[part] -> lists of part numbers.

    Each group holds at most `part_queries` queries, or one part. Parts without queries are left
    out.
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
    """Count the groups of each place: query places of each group -> places[P], num_groups[P].

    places[P] is ascending.
    """
    places_of_groups = [np.unique(group) for group in places]
    found, num_groups = np.unique(np.concatenate(places_of_groups), return_counts=True)
    return found, num_groups.astype(np.int64)


def cut_ranges(places: Ints, num_rows: Ints, rows_at_once: int) -> list[tuple[int, int]]:
    """Cut places into ranges of about `rows_at_once` rows: first and last place of each.

    places[S] ascending, num_rows[S] of each place.
    """
    number = (np.cumsum(num_rows) - num_rows) // rows_at_once
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    ends = np.append(starts[1:], len(places)) - 1 if len(starts) else starts
    return [(int(places[a]), int(places[b])) for a, b in zip(starts, ends, strict=True)]


def compute_job_key(
    settings: dict[str, Any], query_ids: Ints, references: References, exclusions: Exclusions | None
) -> str:
    """Return a fingerprint of all values that determine the parts of a job.

    settings: the values that are not arrays.
    """
    arrays = [query_ids, references.ids, references.places]
    if exclusions is not None:
        places = exclusions.places
        semi_positives = exclusions.semi_positives
        arrays += [places.ids, semi_positives.first, semi_positives.second]
        settings = {**settings, "radius_m": exclusions.radius_m}
        settings["coordinates"] = files.fingerprint(places.lat.tobytes(), places.lon.tobytes())
    lengths = {"lengths": [len(array) for array in arrays]}
    text = json.dumps({**settings, **lengths}, sort_keys=True)
    return files.fingerprint(text.encode(), *(array.tobytes() for array in arrays))
