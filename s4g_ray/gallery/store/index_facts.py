"""Define IndexFacts: the kind and the size of a version's index, and where it is held."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from s4g_ray.errors import RunError


@dataclass(frozen=True)
class IndexFacts:
    """The entry `index_facts` of a version."""

    kind: str
    # held by actors of a Ray cluster that all readers share; otherwise by each reader
    is_sharded: bool
    num_shards: int
    shard_gb: float  # memory of a shard, with its process where it has one of its own
    memory_gb: float  # of vectors, ids and structures, over all shards
    planned_tiles: int  # that kind and sizes were chosen for
    effort: int | None  # nprobe or ef_search; None for exact kinds
    recall: float | None  # recall@10 of a sample of the tiles; None for exact kinds

    def summary(self) -> dict[str, Any]:
        """Return the entry `index` of gallery.json."""
        names = ("kind", "is_sharded", "num_shards", "shard_gb")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_info(cls, folder: str, info: Mapping[str, Any]) -> Self:
        """Read the entry of a version's manifest. Raises RunError for other entries."""
        try:
            return cls(**info["index_facts"])
        except (KeyError, TypeError) as error:
            raise RunError(f"{folder}: its manifest lacks entries; build the gallery again") from (
                error
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON has them."""
        return dataclasses.asdict(self)
