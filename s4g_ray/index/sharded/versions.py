"""Load the version of the index that a shard serves: its part of a published folder. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s4g_ray.amounts import count_noun
from s4g_ray.errors import RunError
from s4g_ray.index.exact_search import Engine
from s4g_ray.index.vector_index import VectorIndex
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Manifest, Part, latest_version, open_published


def version_folder(folder: str, version: int) -> str:
    """Return the folder where a version of the index is published."""
    return files.join(folder, f"v={version:04d}")


@dataclass(frozen=True)
class ShardSetup:
    """Arguments of a shard, the same at each of its starts."""

    folder: str
    number: int
    num_shards: int
    num_threads: int
    use_gpu: bool


@dataclass(frozen=True)
class ServedVersion:
    """The version that a shard holds in memory."""

    version: int
    index: VectorIndex
    num_vectors: int  # over all shards


@dataclass(frozen=True)
class FailedVersion:
    """A published version that a shard cannot load, and why."""

    version: int
    error: RunError


def load_newest(setup: ShardSetup) -> ServedVersion | FailedVersion | None:
    """Load the newest published version; None where there is none."""
    version = latest_version(setup.folder, "v")
    return None if version is None else load_version(setup, version)


def load_version(
    setup: ShardSetup, version: int, index: VectorIndex | None = None
) -> ServedVersion | FailedVersion:
    """Load a published version, from its file unless `index` already holds it."""
    folder = version_folder(setup.folder, version)
    try:
        manifest = open_shards(setup, version)
        info = manifest.info
        if index is None:
            part = manifest.parts[setup.number]
            index = load_part(setup, folder, part, info, info["engine"])
        if info["effort"] is not None:
            index.effort = info["effort"]
        return ServedVersion(version, index, info["num_vectors"])
    except (RunError, OSError) as error:
        return FailedVersion(version, RunError(str(error)))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        manifest_file = files.join(folder, files.MANIFEST)
        message = f"{manifest_file} is not of a version of shards ({error!r}); remove {folder}"
        return FailedVersion(version, RunError(f"{message} and resume"))


def open_shards(setup: ShardSetup, version: int) -> Manifest:
    """Read the manifest of a version.

    Raises RunError for an index without shards, or with another number of them.
    """
    folder = version_folder(setup.folder, version)
    manifest = open_published(folder, "index")
    info = manifest.info
    if "num_shards" not in info:
        raise RunError(f"{folder} holds an index, but no version of shards; remove it and resume")
    if info["num_shards"] != setup.num_shards:
        raise RunError(
            f"{folder} has {count_noun(info['num_shards'], 'shard')}, but"
            f" mining.num_shards={setup.num_shards}; set that to {info['num_shards']}, or"
            f" remove {folder} and resume"
        )
    return manifest


def load_part(
    setup: ShardSetup, folder: str, part: Part, info: Mapping[str, Any], engine: Engine
) -> VectorIndex:
    """Read a shard's file; the index then lies on the GPU where the shard uses one."""
    index = VectorIndex.load_part(folder, part, info, engine=engine, num_threads=setup.num_threads)
    return move_to_device(setup, index)


def move_to_device(setup: ShardSetup, index: VectorIndex) -> VectorIndex:
    """Move the index to the GPU where the shard uses one. Raises RunError for a missing GPU."""
    if setup.use_gpu:
        index.to_gpu()  # device 0: Ray shows an actor only its own GPUs
    return index
