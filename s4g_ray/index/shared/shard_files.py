"""Change a published version of shards into another one, in this process, a shard at a time.

Takes the memory of one shard and no cluster. Readers of the version before are not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints, is_among
from s4g_ray.errors import RunError, StoreError
from s4g_ray.index.index_file import read_ids
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage import files
from s4g_ray.storage.manifest import (
    Manifest,
    Part,
    open_part,
    open_published,
    publish,
    read_part,
    write_part,
)


@dataclass(frozen=True)
class ShardChange:
    """Ids to remove, and vectors[n, D] with coordinates[n, 2] (lat, lon) to add or replace by ids.

    ids and removed ascend.
    """

    removed: Ints
    ids: Ints
    vectors: NDArray[Any]
    coordinates: Floats64


def change_shards(
    source: str, target: str, change: ShardChange, on_progress: Callable[[int, int], None]
) -> Mapping[str, Any]:
    """Publish at `target` the version of `source` with a change; return the manifest's info.

    New ids are dealt to the shards in turns, to the smallest first. Exact kinds then answer as an
    index that was built of all vectors; approximate ones keep their cells. Raises RunError for
    files that are missing or altered, and where no vector would be left.
    """
    manifest = open_published(source, "index")
    home = _find_homes(source, manifest, change)
    parts = []
    for number in range(len(manifest.parts)):
        own = home == number
        parts.append(_change_shard(source, target, manifest, number, change, own))
        on_progress(number + 1, len(manifest.parts))
    num_vectors = sum(part.rows for part in parts)
    if not num_vectors:
        raise RunError(f"no vector of {source} would be left; an index holds one or more")
    info = {
        **manifest.info,
        "num_vectors": num_vectors,
        "memory_gb": sum(part.num_bytes for part in parts) / 1e9,
        "ids_sha256": None,
    }
    publish(target, "index", parts, manifest.stamp, info)
    return info


def _find_homes(source: str, manifest: Manifest, change: ShardChange) -> Ints:
    """Return the shard of each of change.ids[n]: the one that holds it; new ones take turns."""
    home = np.full(len(change.ids), -1)
    sizes = []
    for number, part in enumerate(manifest.parts):
        held = np.sort(_read_ids(source, part))
        home[is_among(change.ids, held)] = number
        sizes.append(part.rows - int(is_among(change.removed, held).sum()))
    new = np.flatnonzero(home < 0)
    home[new] = np.argsort(sizes, kind="stable")[np.arange(len(new)) % len(sizes)]
    return home


def _read_ids(source: str, part: Part) -> Ints:
    """Read the ids of a shard's file. Raises RunError for one that is missing or damaged."""
    try:
        open_part(source, part).close()
        return read_ids(source, part)
    except StoreError:
        raise
    except (RunError, ValueError) as error:
        raise _damaged(source, part) from error


def _damaged(source: str, part: Part) -> RunError:
    return RunError(
        f"{files.join(source, part.name)}, a shard of the index, is missing, cut short or altered;"
        " restore this file, or build the index again in another folder"
    )


def _change_shard(
    source: str,
    target: str,
    manifest: Manifest,
    number: int,
    change: ShardChange,
    own: NDArray[np.bool_],
) -> Part:
    """Write one shard of the new version. own[n]: which of change.ids it is to hold."""
    part = manifest.parts[number]
    try:
        index = VectorIndex.load_part(source, part, manifest.info, engine=manifest.info["engine"])
    except StoreError:
        raise
    except RunError as error:
        raise _damaged(source, part) from error
    num_removed = index.remove(change.removed)
    if not num_removed and not own.any():
        return write_part(target, part.name, read_part(source, part), part.rows)
    if own.any():
        index.replace(change.vectors[own], change.ids[own], change.coordinates[own])
    return index.save_part(target, part.name)
