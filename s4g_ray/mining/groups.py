"""Group the queries of a mining job, and compute the job's key.

Pure functions: no Ray, no files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.places import Places
from s4g_ray.mining.candidates import References

# of a graph's Parquet, at least: 2.1 to 3.4 for the id of a place among 10^5 to 10^8, and 2 to 3
# for its score
BYTES_PER_NEIGHBOR = 4.0


def places_per_part(part_mb: float, k: int) -> int:
    """Return how many places with k neighbors fill a part of a graph of `part_mb` megabytes."""
    return max(1, math.ceil(part_mb * 1e6 / (BYTES_PER_NEIGHBOR * k)))


def plan_groups(sizes: Sequence[int], wanted: int) -> list[list[int]]:
    """Group consecutive parts: sizes[part] -> lists of part numbers.

    Each group holds at least `wanted`, but for the last. Parts of size 0 are left out.
    """
    groups: list[list[int]] = []
    filled = wanted
    for part, size in enumerate(sizes):
        if not size:
            continue
        if filled >= wanted:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size
    return groups


def compute_job_key(
    settings: dict[str, Any],
    query_ids: Ints,
    references: References,
    exclusions: Exclusions | None,
    places: Places | None = None,
) -> str:
    """Return a fingerprint of all values that determine the parts of a job.

    settings: the values that are not arrays. places: those whose coordinates divide the job.
    """
    arrays: list[np.ndarray[Any, Any]] = [query_ids, references.ids, references.places]
    if exclusions is not None:
        located = exclusions.places
        semi_positives = exclusions.semi_positives
        arrays += [located.ids, located.lat, located.lon]
        arrays += [semi_positives.first, semi_positives.second]
        settings = {**settings, "radius_m": exclusions.radius_m}
    if places is not None:
        arrays += [places.ids, places.lat, places.lon]
    lengths = {"lengths": [len(array) for array in arrays]}
    digest = hashlib.sha256(json.dumps({**settings, **lengths}, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)  # no copy: 8 bytes a place each
    return digest.hexdigest()
