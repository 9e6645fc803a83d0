"""Define Summary: what was cut from imagery, what was dropped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from s4g_ray.amounts import count_noun, format_bytes
from s4g_ray.datasets.imagery.cutting.tile_shards import CutBlock
from s4g_ray.datasets.packing.packed_tables import SHARDS
from s4g_ray.storage import files
from s4g_ray.storage.manifest import open_published

KIND = "image shards"


@dataclass(frozen=True)
class Summary:
    """The counts of a region."""

    cells: int
    tiles: int
    tiles_by_size: dict[str, int]  # by size_m
    dropped: dict[str, int]  # cells by reason
    ground_km2: float  # of the union of the tiles' squares
    bytes: int  # of the shards
    shards: int
    reused_shards: int  # written by an earlier call, which was interrupted
    pixels: int
    stretch: str
    native_resolution_m: float

    @classmethod
    def from_blocks(
        cls,
        outcomes: Sequence[CutBlock],
        *,
        ground_km2: float,
        pixels: int,
        stretch: str,
        native_resolution_m: float,
    ) -> Self:
        """Add up the outcomes of blocks."""
        shards = [outcome.shard for outcome in outcomes if outcome.shard is not None]
        dropped: Counter[str] = Counter()
        by_size: Counter[str] = Counter()
        for outcome in outcomes:
            dropped.update(outcome.dropped)
            by_size[f"{outcome.size_m:g}"] += outcome.shard.rows if outcome.shard else 0
        return cls(
            cells=sum(outcome.num_cells for outcome in outcomes),
            tiles=sum(shard.rows for shard in shards),
            tiles_by_size=dict(by_size),
            dropped=dict(sorted(dropped.items())),
            ground_km2=ground_km2,
            bytes=sum(shard.num_bytes for shard in shards),
            shards=len(shards),
            reused_shards=sum(outcome.is_reused and bool(outcome.shard) for outcome in outcomes),
            pixels=pixels,
            stretch=stretch,
            native_resolution_m=native_resolution_m,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain types."""
        return asdict(self)

    def describe(self) -> list[str]:
        """Return the counts as lines for a terminal."""
        sizes = ", ".join(f"{count:,} of {size} m" for size, count in self.tiles_by_size.items())
        lines = [
            f"{count_noun(self.cells, 'cell')}, {count_noun(self.tiles, 'tile')} ({sizes},"
            f" {self.pixels} x {self.pixels} pixels), {self.ground_km2:,.4g} km2 of ground",
            f"{count_noun(self.shards, 'shard')}, {format_bytes(self.bytes)}; imagery of"
            f" {self.native_resolution_m:.3g} m, stretch {self.stretch}",
        ]
        finer = [size for size in self.tiles_by_size if float(size) < self.native_resolution_m]
        if finer:
            lines.append(
                f"tiles of {' and '.join(finer)} m are smaller than a pixel of the imagery and show"
                " little more than its color"
            )
        if self.reused_shards:
            lines.append(f"shards that an earlier call wrote: {self.reused_shards:,}")
        lines += [
            f"dropped: {count_noun(count, 'cell')}: {reason}"
            for reason, count in self.dropped.items()
        ]
        return lines


def read_summary(uri: str) -> Summary:
    """Read the summary of a region that `convert imagery` has cut. Raises RunError for others."""
    manifest = open_published(files.join(uri, SHARDS), KIND)
    return Summary(**manifest.info["summary"])
