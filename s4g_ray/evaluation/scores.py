"""Scores of an evaluation: the metrics of a data set's split in both protocols, as a whole and region by region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Bools, Floats, Ints
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.schema import ProtocolName, gallery_splits
from s4g_ray.data.sphere import format_metres
from s4g_ray.data.tables.embedding_table import read_embedded_rows
from s4g_ray.evaluation.metrics import PROTOCOLS, retrieve_both
from s4g_ray.storage.manifest import Stamp

Metrics = dict[str, float]


@dataclass(frozen=True)
class Score:
    """metrics by protocol; regions: the same for the queries of each region, against the whole gallery."""

    metrics: dict[ProtocolName, Metrics]
    regions: dict[str, dict[ProtocolName, Metrics]]

    def summary(self, protocol: ProtocolName) -> str:
        """The chief metrics of a protocol in a line."""
        metrics = self.metrics[protocol]
        shown = [f"R@{k} {metrics[f'recall@{k}']:.1%}" for k in (1, 5, 10)]
        shown += [f"hit rate {metrics['hit_rate']:.1%}"] if "hit_rate" in metrics else []
        shown += (
            [f"median error {format_metres(metrics['median_error_m'])}"]
            if "median_error_m" in metrics
            else []
        )
        return "  ".join(shown)

    def of(self, protocol: ProtocolName) -> dict[str, float | str | dict[str, Metrics] | Metrics]:
        """The metrics of a protocol, flat; beside them `regions`, and what `other` protocol gives otherwise."""
        other: ProtocolName = "paper" if protocol == "strict" else "strict"
        regions = {name: metrics[protocol] for name, metrics in self.regions.items()}
        differing = {
            k: v for k, v in self.metrics[other].items() if self.metrics[protocol].get(k) != v
        }
        return {
            **self.metrics[protocol],
            "protocol": protocol,
            "regions": regions,
            other: differing,
        }


def score_tables(
    dataset: GeoDataset,
    split: str,
    queries: str,
    references: str,
    *,
    stamp: Stamp,
    radii_m: Sequence[float],
) -> Score:
    """Score a split from the published embedding tables of its queries and of its references."""
    embedded_q, query_rows = read_embedded_rows(
        queries, "queries", dataset.table("queries", [split]), stamp=stamp
    )
    embedded_r, gallery = read_embedded_rows(
        references, "references", dataset.table("references", gallery_splits(split))
    )
    return score(
        dataset,
        split,
        query_rows,
        gallery,
        (embedded_q.vectors, embedded_r.vectors),
        radii_m=radii_m,
    )


def score(
    dataset: GeoDataset,
    split: str,
    queries: ImageTable,
    gallery: ImageTable,
    embeddings: tuple[Floats, Floats],
    *,
    radii_m: Sequence[float],
) -> Score:
    """Score the embeddings (of queries, of gallery, in their order) of a split.

    Raises RunError for non-finite embeddings, and when no query has a reference in the gallery.
    """
    semi_by_id = dataset.semi_positives(split)
    none: Ints = np.zeros(0, np.int64)
    found = retrieve_both(
        *embeddings,
        queries.place_ids,
        gallery.place_ids,
        semi_positives=[semi_by_id.get(int(i), none) for i in queries.ids] if semi_by_id else None,
        query_latlon=np.stack([queries.lat, queries.lon], axis=1),
        reference_latlon=np.stack([gallery.lat, gallery.lon], axis=1),
        radii_m=radii_m,
        distractors=_distractors(dataset, queries, gallery),
    )
    names = np.array([name or "" for name in queries.regions])
    regions = {}
    for name in np.unique(names[names != ""]) if len(np.unique(names)) > 1 else ():
        counted = {p: (names == name) & (found[p].ranks[0] > 0) for p in PROTOCOLS}
        if all(rows.any() for rows in counted.values()):
            regions[str(name)] = {p: found[p].metrics(p, rows=names == name) for p in PROTOCOLS}
    return Score({p: found[p].metrics(p) for p in PROTOCOLS}, regions)


def _distractors(dataset: GeoDataset, queries: ImageTable, gallery: ImageTable) -> Bools:
    """Which rows of the gallery have the split `gallery` and a place that no query shows."""
    declared = np.isin(gallery.ids, dataset.table("references", ["gallery"]).ids)
    return np.asarray(declared & ~np.isin(gallery.place_ids, queries.place_ids))
