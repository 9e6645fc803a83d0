"""Which rows an embedding table holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.image_table import View
from s4g_ray.encoder.embedding.table_plan import plan_view, splits_of_views
from tests.conftest import tables, tiny_config

SPLITS = ["train"] * 4 + ["test"] * 2 + ["gallery"] * 2


def write_splits(folder: Path) -> GeoDataset:
    references, queries = tables(8)
    column = references.column_names.index("split")
    references = references.set_column(column, "split", pa.array(SPLITS))
    queries = queries.set_column(column, "split", pa.array(SPLITS)).slice(0, 6)
    return write_dataset(str(folder), references, queries, name="splits")


def ids_of(
    dataset: GeoDataset,
    view: View,
    splits: list[str],
    gallery_splits: tuple[str, ...],
    only: list[int] | None,
) -> list[int]:
    """The ids that a plan chooses, from the row numbers in the table of its splits."""
    config = tiny_config("r", "d", sampling={"gallery_splits": gallery_splits})
    own = splits_of_views(splits, [view], "test")[view]
    places = None if only is None else np.array(only, dtype=np.int64)
    parts = plan_view(dataset, view, own, config, 8, only_places=places)
    table = dataset.table(view, own)
    return [
        id_ for part in parts for block in part.blocks for id_ in table.ids[block.rows].tolist()
    ]


def test_the_test_split_includes_the_gallery_of_references(tmp_path: Path) -> None:
    dataset = write_splits(tmp_path / "d")
    assert ids_of(dataset, "references", ["test"], ("train",), None) == [4, 5, 6, 7]
    assert ids_of(dataset, "queries", ["test"], ("train",), None) == [4, 5]
    assert ids_of(dataset, "references", ["train"], ("train",), None) == [0, 1, 2, 3]


def test_only_some_places_of_the_mined_splits_and_all_of_the_others(tmp_path: Path) -> None:
    dataset = write_splits(tmp_path / "d")
    some = [101, 103, 106, 999]
    assert ids_of(dataset, "queries", ["train"], ("train",), some) == [1, 3]
    assert ids_of(dataset, "queries", ["train", "test"], ("train",), some) == [1, 3, 4, 5]
    mined = ("train", "gallery")
    assert ids_of(dataset, "references", ["train", "gallery"], mined, some) == [1, 3, 6]
    # an evaluation needs the whole gallery
    assert ids_of(dataset, "references", ["train", "test"], mined, some) == [1, 3, 4, 5, 6, 7]
    assert ids_of(dataset, "references", ["train"], ("train",), []) == []
