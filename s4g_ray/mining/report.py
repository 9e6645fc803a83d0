"""Count the work of a mining job, and report it: Counts add up to a MiningReport."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.mining.candidates import REASONS, RECALL_RANKS, Kept


@dataclass(frozen=True)
class Counts:
    """Counts of a part of the work. They add up."""

    queries: int = 0
    kept: int = 0  # neighbors of queries, before the queries of a place are merged
    above: int = 0  # of those: scored above the best reference of their query's place
    dropped: tuple[int, ...] = (0,) * len(REASONS)
    # queries whose best own reference is in the first 1, 5, 10
    recalled: tuple[int, ...] = (0,) * len(RECALL_RANKS)
    places: int = 0
    neighbors: int = 0
    short: int = 0  # places with fewer than k neighbors
    compared: int = 0  # neighbors of places that were looked up in the previous graph
    shared: int = 0  # of those: neighbors that the place has in the previous graph too
    carried: int = 0  # places whose row is that of an earlier graph

    @classmethod
    def from_queries(cls, kept: Kept) -> Self:
        """Count what the queries of a group keep."""
        is_recalled = [(kept.own_rank > 0) & (kept.own_rank <= rank) for rank in RECALL_RANKS]
        return cls(
            queries=len(kept.num),
            kept=int(kept.num.sum()),
            above=int(kept.above.sum()),
            dropped=tuple(int(count) for count in kept.dropped.sum(axis=0)),
            recalled=tuple(int(queries.sum()) for queries in is_recalled),
        )

    @classmethod
    def from_graph(cls, graph: NeighborGraph, compared: int = 0, shared: int = 0) -> Self:
        """Count the places and neighbors of a part of the graph."""
        num_neighbors = (graph.neighbors >= 0).sum(axis=1)
        return cls(
            places=len(num_neighbors),
            neighbors=int(num_neighbors.sum()),
            short=int((num_neighbors < graph.neighbors.shape[1]).sum()),
            compared=compared,
            shared=shared,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read counts that were written as the JSON of asdict, where tuples are lists."""
        values: dict[str, Any] = {}
        for name, count in value.items():
            values[name] = tuple(count) if isinstance(count, list) else count
        return cls(**values)

    def __add__(self, other: Counts) -> Counts:
        totals: dict[str, Any] = {}
        for field in fields(self):
            a = getattr(self, field.name)
            b = getattr(other, field.name)
            if isinstance(a, tuple):
                totals[field.name] = tuple(x + y for x, y in zip(a, b, strict=True))
            else:
                totals[field.name] = a + b
        return replace(self, **totals)


# the settings behind the reasons of candidates.REASONS that a user can loosen
SETTINGS = {
    "near": "sampling.exclude_radius_m",
    "max_score": "mining.max_score",
    "relative_margin": "mining.relative_margin",
    "range_min": "mining.range_min",
}


@dataclass(frozen=True)
class MiningReport:
    """The results of a mining job.

    coverage: share of the P x k slots that are filled. short: places with fewer than k neighbors.
    dropped: candidates by the filter that dropped them. above_positive: share of the queries'
    negatives that score above the best reference of their own place. overlap: share of the
    neighbors that the place has in the previous graph too, on a sample of 20,000 places where
    there are more; None without a previous graph. train_recall: share of queries whose best own
    reference is among the first so many references; among equal scores it counts as the last.
    without_embedding: queries whose image was left out of the embedding table. carried: places
    that no query mined, whose rows are those of an earlier graph; they count in nothing else.
    """

    places: int
    queries: int
    neighbors: int
    coverage: float
    short: int
    dropped: dict[str, int]
    above_positive: float
    overlap: float | None
    train_recall: dict[int, float]
    without_embedding: int
    seconds: float
    reused_parts: int
    carried: int

    @classmethod
    def from_counts(
        cls,
        counts: Counts,
        k: int,
        *,
        has_previous: bool,
        without_embedding: int,
        seconds: float,
        reused_parts: int,
    ) -> Self:
        """Compute the report of a job from the sum of its counts."""
        train_recall: dict[int, float] = {}
        for rank, recalled in zip(RECALL_RANKS, counts.recalled, strict=True):
            train_recall[rank] = recalled / max(counts.queries, 1)
        return cls(
            places=counts.places,
            queries=counts.queries,
            neighbors=counts.neighbors,
            coverage=counts.neighbors / max(counts.places * k, 1),
            short=counts.short,
            dropped=dict(zip(REASONS, counts.dropped, strict=True)),
            above_positive=counts.above / max(counts.kept, 1),
            overlap=counts.shared / max(counts.compared, 1) if has_previous else None,
            train_recall=train_recall,
            without_embedding=without_embedding,
            seconds=seconds,
            reused_parts=reused_parts,
            carried=counts.carried,
        )

    @property
    def warning(self) -> str | None:
        """A line about a graph without any neighbor: what to loosen; None where there are some."""
        if self.neighbors:
            return None
        reason = max(SETTINGS, key=lambda name: self.dropped[name])
        if not self.dropped[reason]:
            return "warning: no place has a neighbor: there are no references of other places"
        return (
            f"warning: no place has a neighbor: {SETTINGS[reason]} dropped"
            f" {self.dropped[reason]:,} candidates; loosen it"
        )

    def metrics(self) -> dict[str, float]:
        """Return the report as flat keys for metrics.jsonl: dropped_own ..., train_recall@1 ...

        There is no key `overlap` without a previous graph.
        """
        values = asdict(self)
        dropped = values.pop("dropped")
        train_recall = values.pop("train_recall")
        overlap = values.pop("overlap")
        for reason, count in dropped.items():
            values[f"dropped_{reason}"] = count
        for rank, share in train_recall.items():
            values[f"train_recall@{rank}"] = share
        if overlap is not None:
            values["overlap"] = overlap
        return values
