"""Score a split of a data set in both protocols, as a whole and by region."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from s4g_ray.arrays import Floats, Ints
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable
from s4g_ray.data.pairs import Pairs
from s4g_ray.data.schema import ProtocolName, gallery_splits
from s4g_ray.data.sphere import format_metres
from s4g_ray.data.tables.embedding_table import read_embedded_rows, read_embedding_parts
from s4g_ray.data.tables.view_columns import SemiPositives
from s4g_ray.evaluation.gallery_parts import GalleryPart, cut_gallery
from s4g_ray.evaluation.gallery_search import QuerySide
from s4g_ray.evaluation.metrics import PROTOCOLS, Retrieval, pair_semi_positives, retrieve_parts
from s4g_ray.row_lookup import rows_of
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


@dataclass(frozen=True)
class SplitSearch:
    """The retrieval of a split's queries, by protocol.

    gallery_ids[R]: of the gallery's rows, in the order in which it was read; empty where no list
    of references was asked for.
    """

    queries: ImageTable
    found: dict[ProtocolName, Retrieval]
    gallery_ids: Ints

    def score(self) -> Score:
        """Compute the metrics. Raises RunError when no query has a reference in the gallery."""
        found = self.found
        metrics = {protocol: found[protocol].metrics(protocol) for protocol in PROTOCOLS}
        names = np.array(list(self.queries.regions), dtype=str)
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


def score_tables(
    dataset: GeoDataset,
    split: str,
    queries: str,
    references: str,
    *,
    stamp: Stamp,
    radii_m: Sequence[float],
    sdm_ranks: Sequence[int] = (),
) -> Score:
    """Score a split from the published embedding tables of its queries and of its references.

    Raises RunError as search_tables does.
    """
    found = search_tables(
        dataset, split, queries, references, stamp=stamp, radii_m=radii_m, sdm_ranks=sdm_ranks
    )
    return found.score()


def search_tables(
    dataset: GeoDataset,
    split: str,
    queries: str,
    references: str,
    *,
    stamp: Stamp | None = None,
    radii_m: Sequence[float] = (),
    num_top: int = 0,
    sdm_ranks: Sequence[int] = (),
) -> SplitSearch:
    """Search a split's queries by the published embedding tables of them and of its references.

    The references are read part by part, twice; of each, 24 bytes stay in memory, 8 more where
    `num_top` references are listed for each query (all where the gallery has fewer), and 16 more
    for sdm_ranks. Raises RunError when a table is unpublished, altered, or the queries are not made
    from `stamp`.
    """
    embedded, query_rows = read_embedded_rows(
        queries, "queries", dataset.table("queries", [split]), stamp=stamp
    )
    ids, lat, lon = dataset.columns("references", gallery_splits(split), ["id", "lat", "lon"])
    num_top = min(num_top, len(ids))
    distractor_ids = _find_distractors(dataset, query_rows)
    gallery_ids: list[Ints] = []

    def read_parts() -> Iterator[GalleryPart]:
        gallery_ids.clear()  # of an earlier pass
        for table in read_embedding_parts(references, "references"):
            rows = rows_of(ids, table.ids)
            known = rows >= 0  # others are of other splits
            latlon = np.full((len(rows), 2), np.nan)
            latlon[known] = np.stack([lat[rows[known]], lon[rows[known]]], axis=1)
            is_distractor = rows_of(distractor_ids, table.ids) >= 0
            part = GalleryPart(table.vectors, table.place_ids, latlon, is_distractor)
            if num_top:
                gallery_ids.append(table.ids[known])
            yield part.take(known)

    side = _query_side(dataset, split, query_rows, embedded.vectors, radii_m)
    has_distractors = len(distractor_ids) > 0
    found = retrieve_parts(
        side,
        read_parts,
        has_distractors=has_distractors,
        num_top=num_top,
        sdm_ranks=sdm_ranks,
    )
    return SplitSearch(query_rows, found, np.concatenate([np.zeros(0, np.int64), *gallery_ids]))


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
    distractor_ids = _find_distractors(dataset, queries)
    whole = GalleryPart(
        embeddings[1],
        gallery.place_ids,
        np.stack([gallery.lat, gallery.lon], axis=1),
        rows_of(distractor_ids, gallery.ids) >= 0,
    )
    has_distractors = len(distractor_ids) > 0
    side = _query_side(dataset, split, queries, embeddings[0], radii_m)
    found = retrieve_parts(side, cut_gallery(whole), has_distractors=has_distractors)
    return SplitSearch(queries, found, np.zeros(0, np.int64)).score()


def _query_side(
    dataset: GeoDataset,
    split: str,
    queries: ImageTable,
    vectors: Floats,
    radii_m: Sequence[float],
) -> QuerySide:
    """Return the queries of a split with vectors[Q, D], ready to be searched."""
    return QuerySide(
        vectors,
        queries.place_ids,
        semi_positives=_pair_semi_positives(dataset.semi_positives(split), queries),
        latlon=np.stack([queries.lat, queries.lon], axis=1),
        radii_m=radii_m,
    )


def _pair_semi_positives(semi: SemiPositives, queries: ImageTable) -> Pairs | None:
    """Pair rows of queries with their semi-positive places; None without any."""
    ids, places = semi.expand()
    order = np.argsort(queries.ids, kind="stable")
    rows = rows_of(queries.ids[order], ids)
    known = rows >= 0  # others have an image that was skipped
    return pair_semi_positives(order[rows[known]], places[known], queries.place_ids)


def _find_distractors(dataset: GeoDataset, queries: ImageTable) -> Ints:
    """Find the references of split `gallery` whose place no query shows: ids, ascending."""
    ids, places = dataset.columns("references", ["gallery"], ["id", "place_id"])
    return ids[~np.isin(places, queries.place_ids)]
