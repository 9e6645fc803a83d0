"""MiningReport: what a mining job found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.mining.candidates import REASONS, RECALL_RANKS, Kept


@dataclass(frozen=True)
class Counts:
    """What was counted in some of the work; counts add up."""

    queries: int = 0
    kept: int = 0  # neighbors of queries, before the queries of a place are merged
    above: int = 0  # of those: scored above the best reference of their query's place
    dropped: tuple[int, ...] = (0,) * len(REASONS)
    recalled: tuple[int, ...] = (0,) * len(
        RECALL_RANKS
    )  # queries whose best own reference is in the first 1, 5, 10
    places: int = 0
    neighbors: int = 0
    short: int = 0  # places with fewer than k neighbors
    compared: int = 0  # neighbors of places that were looked up in the previous graph
    shared: int = 0  # of those: the place's in the previous graph too

    @classmethod
    def of_queries(cls, kept: Kept) -> Self:
        """Of the queries of a group."""
        ranks = [(kept.own_rank > 0) & (kept.own_rank <= rank) for rank in RECALL_RANKS]
        return cls(
            queries=len(kept.num),
            kept=int(kept.num.sum()),
            above=int(kept.above.sum()),
            dropped=tuple(int(count) for count in kept.dropped.sum(axis=0)),
            recalled=tuple(int(found.sum()) for found in ranks),
        )

    @classmethod
    def of_graph(cls, graph: NeighborGraph, compared: int = 0, shared: int = 0) -> Self:
        """Of a part of the graph."""
        num = (graph.neighbors >= 0).sum(axis=1)
        short = int((num < graph.neighbors.shape[1]).sum())
        return cls(
            places=len(num), neighbors=int(num.sum()), short=short, compared=compared, shared=shared
        )

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Self:
        """From what JSON makes of asdict."""
        values: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in value.items()
        }
        return cls(**values)

    def __add__(self, other: Counts) -> Counts:
        def total(name: str) -> Any:
            a, b = getattr(self, name), getattr(other, name)
            return (
                tuple(x + y for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a + b
            )

        return replace(self, **{field.name: total(field.name) for field in fields(self)})


@dataclass(frozen=True)
class MiningReport:
    """What a mining job found.

    coverage: share of the P x k slots that are filled. short: places with fewer than k neighbors. dropped:
    candidates by the filter that dropped them. above_positive: share of the queries' negatives that score above
    the best reference of their own place. overlap: share of the neighbors that the previous graph has for the same
    place too, on a sample of 20,000 places where there are more; None without one. train_recall: share of queries
    whose best own reference is among the first so many references, the last among equal scores. without_embedding:
    queries whose image was left out when embedding.
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
        """From the sum of all counts."""
        return cls(
            places=counts.places,
            queries=counts.queries,
            neighbors=counts.neighbors,
            coverage=counts.neighbors / max(counts.places * k, 1),
            short=counts.short,
            dropped=dict(zip(REASONS, counts.dropped, strict=True)),
            above_positive=counts.above / max(counts.kept, 1),
            overlap=counts.shared / max(counts.compared, 1) if has_previous else None,
            train_recall={
                rank: n / max(counts.queries, 1)
                for rank, n in zip(RECALL_RANKS, counts.recalled, strict=True)
            },
            without_embedding=without_embedding,
            seconds=seconds,
            reused_parts=reused_parts,
        )

    def metrics(self) -> dict[str, float]:
        """Flat, for metrics.jsonl: dropped_own ..., train_recall@1 ...; no overlap where there is none."""
        values = asdict(self)
        dropped, recall, overlap = (
            values.pop("dropped"),
            values.pop("train_recall"),
            values.pop("overlap"),
        )
        values |= {f"dropped_{reason}": count for reason, count in dropped.items()}
        values |= {f"train_recall@{rank}": share for rank, share in recall.items()}
        return values if overlap is None else {**values, "overlap": overlap}
