"""Report on the build of a version: its size, its recall, the search effort, and why it is so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from s4g_ray.amounts import count_noun


@dataclass(frozen=True)
class IndexReport:
    """Report on the build of a version in service.

    recall: recall@k of a uniform sample of queries against exact search over the same embeddings;
    None without a sample. recall_low, recall_high: its 95 % confidence interval. effort: nprobe or
    ef_search of a search; None for exact kinds. mean_effort: what the sampled queries took,
    repeated searches of those that lacked results included.
    """

    version: int
    kind: str
    num_vectors: int
    num_shards: int
    memory_gb: float  # of all shards' files
    k: int
    engine: str  # of exact search
    bits: int = 0  # of RaBitQ
    reason: str = ""  # of kind and number of shards
    recall: float | None = None
    recall_low: float | None = None
    recall_high: float | None = None
    recall_by_region: Mapping[str, float] = field(default_factory=dict)
    effort: int | None = None
    mean_effort: float | None = None
    highest_effort: int | None = None
    read_s: float = 0.0
    build_s: float = 0.0
    probe_s: float = 0.0

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Self:
        """Return the report that the manifest of a version holds; an older one lacks fields."""
        return cls(**{one.name: info[one.name] for one in fields(cls) if one.name in info})

    def summary(self) -> dict[str, Any]:
        """Return the fields that the manifest of a graph mined with this index keeps."""
        return {
            "index": self.kind,
            "bits": self.bits,
            "references": self.num_vectors,
            "shards": self.num_shards,
            "index_reason": self.reason,
            "index_gb": self.memory_gb,
            "recall": self.recall,
            "recall_low": self.recall_low,
            "recall_high": self.recall_high,
            "recall_by_region": dict(self.recall_by_region),
            "effort": self.effort,
            "mean_effort": self.mean_effort,
            "highest_effort": self.highest_effort,
            "engine": self.engine,
            "index_s": self.read_s + self.build_s + self.probe_s,
        }

    def describe(self) -> str:
        """Return the report as a line: kind, size, recall with its interval, the worst region."""
        references = count_noun(self.num_vectors, "reference")
        text = f"{self.kind} of {references} on {count_noun(self.num_shards, 'shard')}"
        if self.recall is None:
            return text
        text += f", recall@{self.k} {self.recall:.3f}"
        if self.recall_low is not None and self.recall_low < 1:
            text += f" ({self.recall_low:.3f} to {self.recall_high:.3f})"
        if self.recall_by_region:
            lowest = min(self.recall_by_region, key=lambda name: self.recall_by_region[name])
            text += f", lowest in {lowest}: {self.recall_by_region[lowest]:.3f}"
        if self.mean_effort is not None and self.effort:
            text += f", effort {self.effort} (mean {self.mean_effort:.4g})"
        return text
