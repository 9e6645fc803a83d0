"""Look for a sample of images below the folder that is named for them anew."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.arrays import Ints, space_rows
from s4g_ray.data.format.image_paths import UP, are_whole, resolve
from s4g_ray.errors import InputError
from s4g_ray.storage import files

NUM_SAMPLED = 64  # images of a column that are looked for
NUM_THREADS = 16


def check_images_root(owner: str, root: str, *columns: pa.ChunkedArray, remedy: str) -> int:
    """Return how many paths of columns start from the folder of images; look for a sample of them.

    owner: the data set or gallery with these paths. Raises InputError with `remedy` where all are
    absolute, and where images of the sample are not below `root`.
    """
    num_relative = 0
    sample: list[str] = []
    for paths in columns:
        num_relative += pc.sum(pc.invert(are_whole(paths))).as_py() or 0
        sample.extend(paths.take(pa.array(choose_sample(paths))).to_pylist())
    if not sample:
        raise InputError(
            f"{owner}: all paths of images are absolute, and {root} changes none of them; {remedy}"
        )
    sample = list(dict.fromkeys(sample))
    wanted = [resolve(root, path) for path in sample]
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="look") as pool:
        is_there = list(pool.map(files.exists, wanted))
    if not all(is_there):
        first = is_there.index(False)
        raise InputError(
            f"{is_there.count(False)} of {len(wanted)} images that were looked for are not there,"
            f" as {wanted[first]}; give the folder that the paths of {owner} start from (there:"
            f" {sample[first]}); where they no longer lie together, {remedy}"
        )
    return num_relative


def choose_sample(paths: pa.ChunkedArray) -> Ints:
    """Return rows of relative paths[N], spread over those below the folder and each beside it.

    Of more than NUM_SAMPLED folders beside it, so many.
    """
    relative = np.flatnonzero(pc.invert(are_whole(paths)).to_numpy())
    kept = paths.take(pa.array(relative))
    tops = pc.struct_field(pc.extract_regex(kept, rf"^(?P<top>{re.escape(UP)}[^/]*)/"), "top")
    groups = pc.fill_null(tops, "").combine_chunks().dictionary_encode()
    num_groups = len(groups.dictionary)
    chosen = space_rows(num_groups, NUM_SAMPLED)
    rows: list[Ints] = [np.empty(0, np.int64)]
    for code in chosen.tolist():
        members = relative[groups.indices.to_numpy() == code]
        rows.append(members[space_rows(len(members), NUM_SAMPLED // len(chosen))])
    return np.sort(np.concatenate(rows))
