"""Publish a version that differs from the newest one by some vectors: added, replaced or removed.

Shards that hold none of them keep their index in memory and copy its file; the others change a copy
that they read from their file. Searches of the version before are answered meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s4g_ray.arrays import Bools, Floats64, Ints
from s4g_ray.errors import RunError
from s4g_ray.index.plan import IndexPlan
from s4g_ray.index.sharded.build import put_in_service
from s4g_ray.index.sharded.report import IndexReport
from s4g_ray.index.sharded.requests import Change, Staged
from s4g_ray.index.sharded.shard_group import ShardGroup
from s4g_ray.index.sharded.versions import version_folder
from s4g_ray.index.vector_checks import whole_ids
from s4g_ray.storage.manifest import latest_version, open_published

EXCESS = 1.3  # of memory over what was reserved


class VersionUpdate:
    """The change of the newest version into a new one."""

    def __init__(self, folder: str, shards: ShardGroup, version: int) -> None:
        """Read the newest version. Raises RunError for none, and when `version` is no later one."""
        base = latest_version(folder, "v")
        if base is None:
            raise RunError(f"{folder} holds no version to change; build one first")
        if version <= base:
            raise RunError(
                f"version {version} is not after {base}, the newest of {folder}; give a higher"
                " number"
            )
        self._folder = folder
        self._shards = shards
        self._version = version
        self._base = base
        self._manifest = open_published(version_folder(folder, base), "index")

    def add(self, vectors: NDArray[Any], ids: Ints, coordinates: Floats64 | None) -> IndexReport:
        """Add vectors under new ids; the shards with the fewest vectors take turns."""
        ids = _check_change(ids, vectors, coordinates)
        there = np.any(self._find(ids), axis=0)
        if there.any():
            raise RunError(
                f"{there.sum()} of {len(ids)} ids to add are in version {self._base} already,"
                f" {ids[there][0]} among them; replace them"
            )
        sizes = [part.rows for part in self._manifest.parts]
        turns = np.argsort(sizes, kind="stable")[np.arange(len(ids)) % len(sizes)]
        owned = [turns == shard for shard in range(len(sizes))]
        return self._change("add", owned, ids, vectors, coordinates)

    def replace(
        self, vectors: NDArray[Any], ids: Ints, coordinates: Floats64 | None
    ) -> IndexReport:
        """Replace the vectors of ids, each on the shard that holds it."""
        ids = _check_change(ids, vectors, coordinates)
        return self._change("replace", self._find_all(ids), ids, vectors, coordinates)

    def remove(self, ids: Ints) -> IndexReport:
        """Remove ids."""
        ids = _check_change(ids, None, None)
        return self._change("remove", self._find_all(ids), ids, None, None)

    def _find(self, ids: Ints) -> list[Bools]:
        """Return, for each shard, which of ids[n] it holds. Raises RunError for repeated ids."""
        if not len(ids) or len(np.unique(ids)) != len(ids):
            raise RunError(
                f"{len(ids)} ids hold {len(np.unique(ids))} different ones; give each once, and at"
                " least one"
            )
        found: list[Bools] = self._shards.broadcast("find_ids", self._base, ids)
        return found

    def _find_all(self, ids: Ints) -> list[Bools]:
        owned = self._find(ids)
        missing = ~np.any(owned, axis=0)
        if missing.any():
            raise RunError(
                f"{missing.sum()} of {len(ids)} ids are not in version {self._base},"
                f" {ids[missing][0]} among them; add them, or leave them out"
            )
        return owned

    def _change(
        self,
        action: str,
        owned: Sequence[Bools],
        ids: Ints,
        vectors: NDArray[Any] | None,
        coordinates: Floats64 | None,
    ) -> IndexReport:
        """Stage the change on all shards, each with the rows that it owns; put it in service."""
        changes: list[Change | None] = []
        for rows in owned:
            change = None
            if rows.any():
                own_vectors = None if vectors is None else vectors[rows]
                own_coordinates = None if coordinates is None else coordinates[rows]
                change = Change(action, ids[rows], own_vectors, own_coordinates)
            changes.append(change)
        before = IndexReport.from_info(self._manifest.info)
        num_added = {"add": len(ids), "replace": 0, "remove": -len(ids)}[action]
        num_vectors = before.num_vectors + num_added
        if num_vectors < 1:
            raise RunError(f"all {len(ids)} vectors would be removed; an index holds one or more")
        plan = IndexPlan(**self._manifest.info["plan"])
        memory_gb = plan.shared_gb
        memory_gb += (plan.memory_gb - plan.shared_gb) * num_vectors / plan.num_vectors
        plan = dataclasses.replace(plan, num_vectors=num_vectors, memory_gb=memory_gb, swaps=True)
        check_reserved(plan, self._shards.memory_gb)
        staged: list[Staged] = self._shards.each(
            "stage_change", [(self._base, self._version, change) for change in changes]
        )
        report = dataclasses.replace(
            before,
            version=self._version,
            num_vectors=num_vectors,
            memory_gb=sum(shard.part.num_bytes for shard in staged) / 1e9,
            recall=None,
            recall_low=None,
            recall_high=None,
            recall_by_region={},
            mean_effort=None,
            highest_effort=None,
            read_s=max(shard.read_s for shard in staged),
            build_s=max(shard.build_s for shard in staged),
            probe_s=0.0,
        )
        stamp = self._manifest.stamp
        put_in_service(self._shards, self._folder, report, plan, staged, stamp)
        return report


def check_reserved(plan: IndexPlan, reserved_gb: float) -> None:
    """Raise RunError for a version that needs far more memory than Ray keeps for its shards.

    reserved_gb: for each shard; 0: none is kept.
    """
    if reserved_gb and plan.peak_gb > EXCESS * reserved_gb:
        raise RunError(
            f"a version of {plan.num_vectors:,} vectors needs up to {plan.peak_gb:.3g} GB a shard,"
            f" but {reserved_gb:.3g} GB were reserved for each; start the service again with"
            f" num_vectors={plan.num_vectors}, and build the version"
        )


def _check_change(ids: Ints, *values: NDArray[Any] | None) -> Ints:
    """Return the ids of a change as int64.

    Raises RunError where they are no whole numbers, or vectors or coordinates are not one for each.
    """
    try:
        ids = whole_ids(ids)
    except ValueError as error:
        raise RunError(str(error)) from error
    for given in values:
        if given is not None and len(given) != len(ids):
            raise RunError(f"{len(given)} rows are given for {len(ids)} ids; give one for each")
    return ids
