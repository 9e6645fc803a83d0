"""Describe an embedding job to its actors, and what they have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from s4g_ray import __version__
from s4g_ray.config.data_schema import DataConfig
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp

if TYPE_CHECKING:  # torch takes seconds to import
    from s4g_ray.encoder.precision import Numerics


@dataclass(frozen=True)
class EncodingJob:
    """The settings of an embedding job that an actor needs."""

    token: str  # of this attempt
    key: str  # fingerprint of the settings that determine the content of all parts
    checkpoint: str
    weights_sha256: str
    numerics: Numerics
    target: str
    batch_size: int
    dtype: str
    data: DataConfig  # with the data set's location
    fingerprint: str  # of the data set
    splits: Mapping[View, tuple[str, ...]]  # of the image table of each view
    seed: int
    resumes: bool  # an interrupted job has left commits


@dataclass(frozen=True)
class Written:
    """The file of a block or a part, and the images that are missing in it.

    part: None where no image could be decoded.
    """

    part: Part | None
    bad_ids: tuple[int, ...] = ()
    bad: tuple[str, ...] = ()  # why each image could not be decoded

    @classmethod
    def from_row(cls, value: Any) -> Self:
        """Restore it from the dictionary that dataclasses.asdict made of it."""
        part = Part(**value["part"]) if value["part"] is not None else None
        return cls(part, tuple(value["bad_ids"]), tuple(value["bad"]))

    @property
    def num_rows(self) -> int:
        """Return the number of embeddings."""
        return 0 if self.part is None else self.part.rows


@dataclass(frozen=True)
class BlockResult:
    """A written block, the actor that encoded it, and its time there."""

    written: Written
    images: int  # of the block, with those that could not be decoded
    actor: str
    started: float  # seconds since the epoch: with the weights loaded
    finished: float
    reused: bool = False  # committed by an interrupted job


def rows_key(job_key: str, view: View, table: ImageTable) -> str:
    """Return a fingerprint of the inputs of some rows: the job's, images, and their locations."""
    ranges = [table.offsets.tolist(), table.lengths.tolist()]
    rows = json.dumps([view, len(table), list(table.uris), *ranges])
    return files.fingerprint(
        job_key.encode(),
        rows.encode(),
        table.ids.tobytes(),
        table.place_ids.tobytes(),
        table.headings.tobytes(),
    )


def job_key(config: RunConfig, numerics: Numerics, stamp: Stamp) -> str:
    """Return a fingerprint of the settings that determine the content of all parts."""
    settings = {
        "release": __version__,
        "stamp": asdict(stamp),
        "numerics": asdict(numerics),
        "seed": config.seed,
        "on_bad_image": config.data.on_bad_image,
    }
    return files.fingerprint(json.dumps(settings, sort_keys=True).encode())
