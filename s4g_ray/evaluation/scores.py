"""Score a split of a data set in both protocols, as a whole and by region."""

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
    """Metrics by protocol, of all queries and of the queries of each region.

    A region's queries are searched in the whole gallery.
    """

    metrics: dict[ProtocolName, Metrics]
    regions: dict[str, dict[ProtocolName, Metrics]]

    def summary(self, protocol: ProtocolName) -> str:
        """Format the main metrics of a protocol in one line."""
        metrics = self.metrics[protocol]
        shown = [f"R@{k} {metrics[f'recall@{k}']:.1%}" for k in (1, 5, 10)]
        if "hit_rate" in metrics:
            shown.append(f"hit rate {metrics['hit_rate']:.1%}")
        if "median_error_m" in metrics:
            shown.append(f"median error {format_metres(metrics['median_error_m'])}")
        return "  ".join(shown)

    def for_protocol(
        self, protocol: ProtocolName
    ) -> dict[str, float | str | dict[str, Metrics] | Metrics]:
        """Return the metrics of a protocol, flat, for the run's log.

        Besides them `protocol`, `regions`, and under the other protocol's name its metrics that
        differ.
        """
        other: ProtocolName = "paper" if protocol == "strict" else "strict"
        metrics = self.metrics[protocol]
        differing = {
            key: value for key, value in self.metrics[other].items() if metrics.get(key) != value
        }
        regions = {name: by_protocol[protocol] for name, by_protocol in self.regions.items()}
        return {**metrics, "protocol": protocol, "regions": regions, other: differing}


def score_tables(
    dataset: GeoDataset,
    split: str,
    queries: str,
    references: str,
    *,
    stamp: Stamp,
    radii_m: Sequence[float],
) -> Score:
    """Score a split from the published embedding tables of its queries and of its references.

    Raises RunError when a table is unpublished, altered, or the queries are not made from `stamp`.
    """
    embedded_queries, query_rows = read_embedded_rows(
        queries, "queries", dataset.table("queries", [split]), stamp=stamp
    )
    embedded_references, gallery = read_embedded_rows(
        references, "references", dataset.table("references", gallery_splits(split))
    )
    embeddings = (embedded_queries.vectors, embedded_references.vectors)
    return score(dataset, split, query_rows, gallery, embeddings, radii_m=radii_m)


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
    semi_positives = None
    if semi_by_id:
        none: Ints = np.zeros(0, np.int64)
        semi_positives = [semi_by_id.get(int(query), none) for query in queries.ids]
    found = retrieve_both(
        *embeddings,
        queries.place_ids,
        gallery.place_ids,
        semi_positives=semi_positives,
        query_latlon=np.stack([queries.lat, queries.lon], axis=1),
        reference_latlon=np.stack([gallery.lat, gallery.lon], axis=1),
        radii_m=radii_m,
        distractors=_find_distractors(dataset, queries, gallery),
    )
    metrics = {protocol: found[protocol].metrics(protocol) for protocol in PROTOCOLS}
    names = np.array(list(queries.regions), dtype=str)
    regions: dict[str, dict[ProtocolName, Metrics]] = {}
    if len(np.unique(names)) < 2:
        return Score(metrics, regions)
    for name in np.unique(names[names != ""]):
        rows = names == name
        if all((rows & (found[protocol].ranks[0] > 0)).any() for protocol in PROTOCOLS):
            regions[str(name)] = {
                protocol: found[protocol].metrics(protocol, rows=rows) for protocol in PROTOCOLS
            }
    return Score(metrics, regions)


def _find_distractors(dataset: GeoDataset, queries: ImageTable, gallery: ImageTable) -> Bools:
    """Find the rows of the gallery of split `gallery` whose place no query shows."""
    declared = np.isin(gallery.ids, dataset.table("references", ["gallery"]).ids)
    return np.asarray(declared & ~np.isin(gallery.place_ids, queries.place_ids))
