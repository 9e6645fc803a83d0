"""Count the rows, places and parameters of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.data.schema import SPLITS, gallery_splits
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.encoder.encoder import Encoder


@dataclass(frozen=True)
class RunSizes:
    """The counts that disk, memory and hours of a run follow from.

    rows: images by view and split. references: those of places with pairs; gallery_references and
    gallery_places: of gallery negatives, 0 without them. parameters: of the encoder, over all
    backbones. dim: D of an embedding.
    """

    rows: Mapping[View, Mapping[str, int]]
    queries: int
    references: int
    pairs: int
    places: int
    gallery_references: int
    gallery_places: int
    parameters: int
    dim: int

    @classmethod
    def read(cls, dataset: GeoDataset, split: TrainSplit, encoder: Encoder) -> Self:
        """Count what a run takes from a data set."""
        rows: dict[View, dict[str, int]] = {}
        for view in VIEWS:
            counts = dataset.count_splits(view)
            rows[view] = {name: counts.get(name, 0) for name in SPLITS["references"]}
        gallery = split.gallery
        return cls(
            rows,
            len(split.query_ids),
            len(split.reference_ids),
            len(split.pairs),
            len(split.places),
            0 if gallery is None else len(gallery),
            0 if gallery is None else len(gallery.places),
            sum(value.numel() for value in encoder.parameters()),
            encoder.dim,
        )

    def images(self, splits: Sequence[str], test_split: str) -> dict[View, int]:
        """Return the images of some splits by view; the test split includes the gallery."""
        wanted = set(splits)
        galleries = wanted | {"gallery"} if test_split in wanted else wanted
        return {
            "queries": sum(self.rows["queries"].get(name, 0) for name in wanted),
            "references": sum(self.rows["references"].get(name, 0) for name in galleries),
        }

    def mined_images(self, config: RunConfig) -> dict[View, int]:
        """Return the images that a full mining round embeds, by view."""
        splits = {config.data.train_split}
        if config.sampling.gallery_negatives:
            splits |= set(config.sampling.gallery_splits)
        return self.images(sorted(splits), config.data.test_split)

    def scored_images(self, config: RunConfig) -> dict[View, int]:
        """Return the images that an evaluation embeds, by view."""
        data = config.data
        splits = [data.test_split]
        if data.val_split is not None:
            splits.append(data.val_split)
        return self.images(splits, data.test_split)

    def scored_pairs(self, config: RunConfig) -> int:
        """Return the number of scores of an evaluation: queries times references."""
        data = config.data
        total = 0
        for split in (data.test_split, data.val_split):
            if split is not None:
                gallery = sum(
                    self.rows["references"].get(name, 0) for name in gallery_splits(split)
                )
                total += self.rows["queries"].get(split, 0) * gallery
        return total
