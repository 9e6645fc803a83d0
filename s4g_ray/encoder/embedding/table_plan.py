"""Plan an embedding table: which rows of which splits, and their parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from s4g_ray.arrays import Ints, is_among
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import View
from s4g_ray.encoder.embedding.part_plan import PlannedPart, plan_parts, rows_of_part
from s4g_ray.storage import files


def splits_of_views(
    splits: Sequence[str], views: Sequence[View], test_split: str
) -> dict[View, tuple[str, ...]]:
    """Return the splits of each view: the test split includes the references of `gallery`."""
    found: dict[View, tuple[str, ...]] = {}
    for view in views:
        own = list(dict.fromkeys(splits))
        if view == "references" and test_split in splits and "gallery" not in own:
            own.append("gallery")
        found[view] = tuple(own)
    return found


def plan_view(
    dataset: GeoDataset,
    view: View,
    splits: Sequence[str],
    config: RunConfig,
    dim: int,
    *,
    only_places: Ints | None,
) -> list[PlannedPart]:
    """Plan the parts of one view for embeddings of D=dim values; only_places as embed takes it."""
    ids, place_ids = dataset.columns(view, splits, ["id", "place_id"])
    rows = None
    if only_places is not None:
        rows = _find_rows(dataset, view, splits, config, ids, only_places)
    part_rows = rows_of_part(config.embedding.part_mb, dim, config.embedding.dtype)
    return plan_parts(
        view,
        ids,
        place_ids,
        rows,
        part_rows=part_rows,
        batch_size=config.embedding.batch_size,
    )


def _find_rows(
    dataset: GeoDataset,
    view: View,
    splits: Sequence[str],
    config: RunConfig,
    ids: Ints,
    only_places: Ints,
) -> Ints:
    """Return the rows of ids[N] that are mined at some places, and those of other splits.

    The gallery is whole where the test split needs it.
    """
    mined = {config.data.train_split, *config.sampling.gallery_splits}
    if config.data.test_split in splits:
        mined.discard("gallery")
    chosen_splits = [split for split in splits if split in mined]
    whole_splits = [split for split in splits if split not in mined]
    found, places = dataset.columns(view, chosen_splits, ["id", "place_id"])
    wanted = [found[is_among(places, only_places)]]
    if whole_splits:
        wanted.extend(dataset.columns(view, whole_splits, ["id"]))
    return np.sort(np.searchsorted(ids, np.concatenate(wanted)))


def fingerprint_places(only_places: Ints | None) -> str | None:
    """Return how a table names the places that it is restricted to; None: to none."""
    return None if only_places is None else files.fingerprint(only_places.tobytes())
