"""Find the rows of an embedding table that are mined, before Ray is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.exclusions import Exclusions, check_radius
from s4g_ray.data.image_table import View
from s4g_ray.data.places import Places
from s4g_ray.data.tables.embedding_table import read_heads
from s4g_ray.data.train_split import find_exclusions, first_positions
from s4g_ray.errors import InputError
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published


@dataclass(frozen=True)
class EmbeddedTable:
    """A published embedding table."""

    uri: str
    parts: Sequence[Part]
    stamp: Stamp

    def heads(self, view: View) -> tuple[Ints, Ints]:
        """Read ids (ascending) and places of a view. Raises InputError where there are none."""
        parts = [part for part in self.parts if part.name.startswith(f"{view}/")]
        if not parts:
            raise InputError(
                f"{self.uri} holds no {view}: neighbors are the references that queries find, so it"
                " needs both views"
            )
        heads = list(read_heads((self.uri, part) for part in parts))
        ids = np.concatenate([head.ids for head in heads])
        places = np.concatenate([head.place_ids for head in heads])
        order = np.argsort(ids)
        return ids[order], places[order]


@dataclass(frozen=True)
class MinedRows:
    """The rows of a table that are mined; ids ascend."""

    query_ids: Ints
    reference_ids: Ints
    reference_places: Ints
    exclusions: Exclusions | None
    places: Places | None = None  # of queries and references, where a data set gives them

    @classmethod
    def from_table(cls, table: EmbeddedTable) -> Self:
        """Take all rows. Raises InputError where a view is missing."""
        query_ids, _ = table.heads("queries")
        reference_ids, reference_places = table.heads("references")
        return cls(query_ids, reference_ids, reference_places, None)

    def restrict(self, config: RunConfig, dataset: GeoDataset) -> Self:
        """Return the rows of a data set's train split, with the exclusions of that split."""
        split = config.data.train_split
        queries, query_places = dataset.columns("queries", [split], ["id", "place_id"])
        ids, places, lat, lon = dataset.columns(
            "references", [split], ["id", "place_id", "lat", "lon"]
        )
        if not (rows_of(self.query_ids, queries) >= 0).any():
            raise InputError(
                f"the table holds no query of split {split}; embed it, or set data.train_split"
            )
        embedded = rows_of(self.reference_ids, ids) >= 0  # bad images are left out
        everywhere = first_positions(places, lat, lon)
        exclusions = find_exclusions(config, dataset, everywhere, queries, query_places)
        if exclusions is not None:
            check_radius(everywhere, exclusions.radius_m)
        return type(self)(queries, ids[embedded], places[embedded], exclusions, everywhere)


def open_table(uri: str) -> EmbeddedTable:
    """Open a published embedding table. Raises InputError for a folder that holds none."""
    if not is_published(uri):
        raise InputError(f"{uri} holds no published embedding table; make one with `s4g embed`")
    manifest = open_published(uri, "embeddings")
    if manifest.stamp is None:
        raise InputError(f"{uri} has no stamp of its data set; make it with `s4g embed`")
    return EmbeddedTable(uri, manifest.parts, manifest.stamp)


def find_rows(config: RunConfig, table: EmbeddedTable, dataset_uri: str | None) -> MinedRows:
    """Return the rows that are mined.

    Raises InputError for a data set that is not the table's, and for more neighbors than places.
    """
    found = MinedRows.from_table(table)
    if dataset_uri is not None:
        dataset = open_dataset(dataset_uri, config.data.image_options, remedy="correct --dataset")
        if dataset.fingerprint != table.stamp.dataset:
            raise InputError(
                f"{table.uri} was not made from {dataset.uri}: their fingerprints differ"
            )
        found = found.restrict(config, dataset)
    elif config.sampling.exclude_radius_m > 0 or config.mining.scope == "cells":
        key = "mining.scope=cells"
        if config.sampling.exclude_radius_m > 0:
            key = "sampling.exclude_radius_m"
        raise InputError(f"{key} needs the places' coordinates; name their data set with --dataset")
    k = config.sampling.neighbor_pool_size
    num_places = len(np.unique(found.reference_places))
    if k > num_places - 1:
        raise InputError(
            f"sampling.neighbor_pool_size={k} is too large for the {num_places} places of the"
            f" references; at most {num_places - 1} is possible"
        )
    return found
