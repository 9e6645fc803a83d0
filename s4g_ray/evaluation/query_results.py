"""Define QueryResults: what a search found for each query, and its table for Parquet and CSV."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from s4g_ray.arrays import Floats64, Ints
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.schema import gallery_splits
from s4g_ray.data.sphere import metres_between
from s4g_ray.data.tables.view_columns import SemiPositives
from s4g_ray.errors import InputError
from s4g_ray.evaluation.metrics import PROTOCOLS
from s4g_ray.evaluation.scores import SplitSearch
from s4g_ray.storage import files

SUFFIXES = (".parquet", ".csv")


@dataclass(frozen=True)
class QueryResults:
    """The first references of Q queries, and where their own ones rank.

    gallery: all references of the split. top[Q, k]: rows of the gallery, best first, -1 where there
    are fewer; own ones stand where `strict` ranks them. scores[Q, k]: cosine. ranks[2, Q]: of the
    best own reference, by PROTOCOLS, 0 where a query has none. own[Q] and own_scores[Q]: the row
    and the score of that reference, -1 and -inf where a query has none.
    """

    dataset: GeoDataset
    queries: ImageTable
    gallery: ImageTable
    top: Ints
    scores: Floats64
    ranks: Ints
    own: Ints
    own_scores: Floats64
    semi_positives: SemiPositives

    @classmethod
    def from_search(cls, dataset: GeoDataset, split: str, search: SplitSearch) -> QueryResults:
        """Return the results of a search that listed references. Raises ValueError for another."""
        found = search.found["strict"]
        if found.listed is None or found.own_best is None or found.own_scores is None:
            raise ValueError("the search listed no references; give search_tables a num_top")
        gallery = dataset.table("references", gallery_splits(split))
        rows = gallery.rows(search.gallery_ids)
        ranks = [search.found[name].ranks[i] for i, name in enumerate(PROTOCOLS)]
        return cls(
            dataset,
            search.queries,
            gallery,
            _choose(rows, found.listed.rows),
            found.listed.scores,
            np.stack(ranks),
            _choose(rows, found.own_best),
            found.own_scores,
            dataset.semi_positives(split),
        )

    def errors_m(self, rank: int = 0) -> Floats64:
        """Return the metres from each query to the reference at a rank, from 0; NaN if unknown."""
        return self._metres_to(self.top[:, rank])

    def _metres_to(self, rows: Ints) -> Floats64:
        metres = metres_between(
            self.queries.lat, self.queries.lon, self.gallery.lat[rows], self.gallery.lon[rows]
        )
        return np.where(rows >= 0, metres, np.nan)

    def is_right(self) -> NDArray[np.bool_]:
        """Return which of top[Q, k] are of the query's own place."""
        own = self.queries.place_ids[:, None] == self.gallery.place_ids[self.top]
        return np.asarray(own & (self.top >= 0))

    def is_semi_positive(self) -> NDArray[np.bool_]:
        """Return which of top[Q, k] are semi-positive: tiles of other places with its ground."""
        places = np.where(self.top >= 0, self.gallery.place_ids[self.top], -1)
        return self.semi_positives.contains(self.queries.ids, places)

    def to_table(self) -> pa.Table:
        """Return a row for each query; lists hold the first references, as many as there are.

        Texts and lists have 64-bit offsets: a list of URIs may hold more than 2 GiB.
        """
        columns: dict[str, Any] = {
            "query_id": self.queries.ids,
            "query_uri": pa.array(list(self.queries.uris), pa.large_string()),
            "query_source_id": pa.array(
                read_source_ids(self.dataset, "queries", self.queries.ids), pa.string()
            ),
            "place_id": self.queries.place_ids,
            "region": pa.array([region or None for region in self.queries.regions], pa.string()),
            "lat": _nullable(self.queries.lat),
            "lon": _nullable(self.queries.lon),
        }
        for name, ranks in zip(("rank", "rank_paper"), self.ranks, strict=True):
            columns[name] = pa.array(ranks, mask=ranks == 0)
        columns["own_score"] = _nullable(self.own_scores)
        columns["own_metres"] = _nullable(self._metres_to(self.own))
        is_there = self.top >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(is_there.sum(axis=1))]))
        rows = self.top[is_there]
        metres = np.stack([self.errors_m(rank) for rank in range(self.top.shape[1])], axis=1)
        listed = {
            "top_ids": pa.array(self.gallery.ids[rows]),
            "top_places": pa.array(self.gallery.place_ids[rows]),
            "top_uris": pa.array(list(self.gallery.uris.take(rows)), pa.large_string()),
            "top_scores": pa.array(self.scores[is_there]),
            "top_metres": _nullable(metres[is_there]),
        }
        for name, values in listed.items():
            columns[name] = pa.LargeListArray.from_arrays(offsets, values)
        return pa.table(columns)


def read_source_ids(dataset: GeoDataset, view: View, ids: Ints) -> list[str | None]:
    """Read the source_id of rows of a view, in the order of ids[n]; None for null."""
    source: pads.Dataset = getattr(dataset, view)
    table = source.to_table(columns=["id", "source_id"], filter=pc.field("id").isin(ids))
    names = dict(zip(table["id"].to_pylist(), table["source_id"].to_pylist(), strict=True))
    return [names[one] for one in ids.tolist()]


def _choose(rows: Ints, positions: Ints) -> Ints:
    """Return rows[positions]; -1 stays -1."""
    if not len(rows):
        return np.full_like(positions, -1)
    return np.where(positions >= 0, rows[positions], -1)


def _nullable(values: Floats64) -> pa.Array:
    """Return an array with null for values that are not finite."""
    return pa.array(values, mask=~np.isfinite(values))


def check_results_uri(uri: str) -> None:
    """Raise InputError for a file of per-query results that cannot be written."""
    if not uri.endswith(SUFFIXES):
        raise InputError(
            f"--queries-out {uri} is neither Parquet nor CSV; let its name end in .parquet or .csv"
        )
    if not files.is_local(uri):
        return
    try:
        is_folder = Path(uri).is_dir()
    except OSError as error:
        raise InputError(f"--queries-out {uri} cannot be written: {error.strerror}") from error
    if is_folder:
        raise InputError(f"--queries-out {uri} is a folder; name a file in it")
    _check_unpublished(uri)
    folder = next(parent for parent in Path(uri).parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--queries-out {uri} cannot be written: {folder} takes no files")


def _check_unpublished(uri: str) -> None:
    """Raise InputError for a file in a folder whose files are listed: it would damage that."""
    folder = uri.rpartition("/")[0]
    while folder and not folder.endswith("/"):
        for name in ("dataset.json", files.MANIFEST):
            if files.exists(files.join(folder, name)):
                raise InputError(
                    f"--queries-out {uri} lies within {folder}, which {name} describes; name a file"
                    " outside of it"
                )
        folder = folder.rpartition("/")[0]


def check_store(uri: str) -> None:
    """Write a file beside the per-query results in their store, before the work, and remove it.

    Does nothing for a local path. Raises WriteError, as files.write_bytes does, and InputError for
    a file within a data set or another published folder.
    """
    if files.is_local(uri):
        return
    trial = f"{uri}.{uuid.uuid4().hex[:8]}.tmp"
    files.write_bytes(trial, b"")
    files.remove(trial)
    _check_unpublished(uri)


def write_results(uri: str, results: Sequence[tuple[QueryResults, dict[str, Any]]]) -> None:
    """Write per-query results as Parquet or CSV, by the name's end; each with columns of its own.

    results: with each the columns that stand first, such as {"fov_deg": 360.0}. In CSV the lists
    become columns: top_ids_1, top_ids_2...
    """
    tables = []
    for found, first in results:
        table = found.to_table()
        for at, (name, value) in enumerate(first.items()):
            table = table.add_column(at, name, pa.array([value] * len(table)))
        tables.append(table)
    table = pa.concat_tables(tables)
    buffer = io.BytesIO()
    if uri.endswith(".csv"):
        pyarrow.csv.write_csv(_spread_lists(table), buffer)
    else:
        pq.write_table(table, buffer)
    files.write_bytes(uri, buffer.getvalue())


def _spread_lists(table: pa.Table) -> pa.Table:
    """Replace each list column by one column for each position, null where a list is shorter."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        if not pa.types.is_large_list(table[name].type):
            columns[name] = table[name]
            continue
        lists = table[name].combine_chunks()
        starts = lists.offsets.to_numpy()[:-1]
        lengths = lists.value_lengths().to_numpy()
        for at in range(int(lengths.max(initial=0))):
            rows = pa.array(starts + at, mask=lengths <= at)
            columns[f"{name}_{at + 1}"] = lists.values.take(rows)
    return pa.table(columns)
