"""Look for a sample of images below the folder that is named for them anew."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from s4g_ray.arrays import space_rows
from s4g_ray.data.format.image_paths import are_whole, resolve
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
        relative = paths.filter(pc.invert(are_whole(paths)))
        num_relative += len(relative)
        rows = space_rows(len(relative), NUM_SAMPLED)
        sample.extend(relative.take(pa.array(rows)).to_pylist())
    if not sample:
        raise InputError(
            f"{owner}: all paths of images are absolute, and {root} changes none of them; {remedy}"
        )
    wanted = [resolve(root, path) for path in dict.fromkeys(sample)]
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="look") as pool:
        is_there = list(pool.map(files.exists, wanted))
    if not all(is_there):
        raise InputError(
            f"{is_there.count(False)} of {len(wanted)} images that were looked for are not there,"
            f" as {wanted[is_there.index(False)]}; give the folder that the paths of {owner} start"
            f" from (there: {sample[0]})"
        )
    return num_relative
