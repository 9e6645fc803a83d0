"""Open the model of a gallery, and embed its new tiles: in this process, or on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import pyarrow as pa
import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import open_dataset, write_dataset
from s4g_ray.data.schema import SCHEMAS
from s4g_ray.distributed.placement import Node, actor_need, check_room
from s4g_ray.encoder.architecture.size_check import fit_model_to_sizes
from s4g_ray.encoder.checkpoint import Checkpoint, publish_checkpoint
from s4g_ray.encoder.embedding.report import EmbeddingReport
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.export import describe_model
from s4g_ray.encoder.precision import Numerics
from s4g_ray.encoder.source import DESCRIPTION, EncoderSource
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.errors import InputError, RunError
from s4g_ray.gallery.store.header import MODEL, GalleryHeader
from s4g_ray.progress import Report, Reporter, Update
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Stamp, is_published, open_published
from s4g_ray.storage.ownership.lease import BEAT_S, Lease
from s4g_ray.storage.part_commits import WORK

# images that are embedded in this process: starting Ray and its actors takes 10 s of processor time
HERE = 4096
SPLIT = "gallery"


@dataclass(frozen=True)
class GalleryModel:
    """The encoder of a gallery, and the checkpoint that embedding jobs read it from."""

    config: RunConfig
    checkpoint: str
    numerics: Numerics
    step: int
    weights_sha256: str
    preprocessing: str
    dim: int

    @classmethod
    def from_source(
        cls, opened: EncoderSource, config: RunConfig, gallery: str, report: Report
    ) -> Self:
        """Take the model of a run, an export or weights; write nothing.

        report: as EncoderSource.build_encoder takes it.
        """
        config = config.model_copy(update={"model": fit_model_to_sizes(config.model, config.data)})
        encoder = opened.build_encoder(config.model, report)
        step = 0 if opened.checkpoint is None else Checkpoint.read(opened.checkpoint).step
        return cls(
            config=config,
            checkpoint=files.join(gallery, MODEL),
            numerics=opened.numerics_for(config.train),
            step=step,
            weights_sha256=files.fingerprint(encode_weights(encoder)),
            preprocessing=encoder.preprocessing(config.data),
            dim=encoder.dim,
        )

    @classmethod
    def from_gallery(cls, gallery: str, header: GalleryHeader, config: RunConfig) -> Self:
        """Take the model of a gallery. config: that of its model.json, with overrides.

        Raises InputError for other weights or another preprocessing than the gallery was made with.
        """
        checkpoint = files.join(gallery, MODEL)
        try:
            info = Checkpoint.read(checkpoint).info
        except RunError as error:
            raise InputError(
                f"{checkpoint} holds no model of this gallery ({error}); build it again"
            ) from error
        encoder = Encoder.build(config.model, weights=False)
        found = cls(
            config=config,
            checkpoint=checkpoint,
            numerics=Numerics(**header.numerics),
            step=int(info["step"]),
            weights_sha256=str(info["weights_sha256"]),
            preprocessing=encoder.preprocessing(config.data),
            dim=encoder.dim,
        )
        found.require_same(gallery, header.model)
        return found

    def describe(self) -> dict[str, Any]:
        """Return the entry `model` of gallery.json."""
        return {
            "architecture": self.config.model.name,
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing,
            "step": self.step,
        }

    def require_same(self, gallery: str, made_with: dict[str, Any]) -> None:
        """Raise InputError, with both values, where a gallery was made with another model."""
        for name, value in self.describe().items():
            if name != "step" and made_with.get(name) != value:
                raise InputError(
                    f"{gallery} was made with {name} {made_with.get(name)!r}, but the model given"
                    f" has {value!r}: their embeddings cannot be compared; use the gallery's own"
                    " model, or build another gallery"
                )

    def save(self, opened: EncoderSource) -> None:
        """Write the folder `model`: an export that is a published checkpoint too."""
        if is_published(self.checkpoint) and files.exists(files.join(self.checkpoint, DESCRIPTION)):
            return
        encoder = opened.build_encoder(self.config.model)
        publish_checkpoint(
            self.checkpoint,
            encoder.state_dict(),
            None,
            dim=encoder.dim,
            epoch=0,
            step=self.step,
        )
        description = describe_model(self.config, encoder, self.weights_sha256)
        files.write_json(files.join(self.checkpoint, DESCRIPTION), description)

    def stamp(self, fingerprint: str, dtype: str) -> Stamp:
        """Return the stamp of embeddings of a data set."""
        return Stamp(
            step=self.step,
            weights_sha256=self.weights_sha256,
            preprocessing=self.preprocessing,
            dataset=fingerprint,
            dim=self.dim,
            dtype=dtype,
        )


def embed_tiles(
    model: GalleryModel,
    gallery: str,
    folder: str,
    target: str,
    table: pa.Table,
    dtype: str,
    reporter: Reporter,
    lease: Lease,
) -> EmbeddingReport:
    """Embed the images of a table of tiles into the embedding table `target`.

    folder: of the version, for what is needed meanwhile. Up to HERE images are embedded in this
    process, more by actors on a Ray cluster. Resumes an interrupted job. Raises the errors of
    embedding_job.embed, and OwnershipLostError for a lost lease.
    """
    # imports Ray, which takes seconds; galleries that answer do not need it
    from s4g_ray.encoder.embedding_job import embed

    lease.check()
    embedding = model.config.embedding.model_copy(update={"dtype": dtype})
    config = model.config.model_copy(update={"embedding": embedding})
    dataset_uri = files.join(folder, WORK, "dataset")
    files.remove(dataset_uri)
    _write_dataset(dataset_uri, gallery, table)
    data = config.data.model_copy(update={"uri": dataset_uri, "images_root": None})
    dataset = open_dataset(dataset_uri, data.image_options)
    config = config.model_copy(update={"data": data})
    stamp = model.stamp(dataset.fingerprint, dtype)
    finished = _find_finished(target, stamp)
    if finished is not None:
        return finished
    job = partial(
        embed,
        config=config,
        dataset=dataset,
        checkpoint=model.checkpoint,
        target=target,
        splits=[SPLIT],
        views=["references"],
        numerics=model.numerics,
        stamp=stamp,
    )
    title = "embedding tiles"
    lacks_gpu = bool(config.placed_embedding.gpus_per_actor) and not torch.cuda.is_available()
    if len(table) <= HERE and not lacks_gpu:
        with reporter.stage(title) as update:
            return job(None, on_progress=_checking(lease, update))
    from s4g_ray.distributed.autoscaling import await_room
    from s4g_ray.distributed.session import ray_session
    from s4g_ray.encoder.actors import EncoderPool

    with ray_session(config.ray, config.storage) as nodes:
        await_room(config.ray, partial(_check_room, config), nodes, reporter)
        pool = EncoderPool(config.model, config.placed_embedding, config.ray.start_timeout_s)
        with pool, reporter.stage(title) as update:
            return job(pool, on_progress=_checking(lease, update))


def _checking(lease: Lease, update: Update) -> Update:
    """Return an update that checks the lease too, every few seconds."""

    def on_progress(done: int, total: int) -> None:
        lease.check(every_s=BEAT_S)
        update(done, total)

    return on_progress


def _find_finished(target: str, stamp: Stamp) -> EmbeddingReport | None:
    """Return the report of a table that an interrupted update has published already."""
    if not is_published(target):
        return None
    manifest = open_published(target, "embeddings")
    if manifest.stamp != stamp:
        return None
    num_images = sum(part.rows for part in manifest.parts)
    return EmbeddingReport(
        images=num_images,
        seconds=0.0,
        warm_images_per_s=0.0,
        bad_images=tuple(manifest.info["bad_images"]),
        reused_parts=len(manifest.parts),
        reused_images=num_images,
    )


def _check_room(config: RunConfig, nodes: Sequence[Node]) -> None:
    """Raise NoRoomError where the embedding actors do not fit the nodes."""
    check_room([actor_need(config.placed_embedding)], [[]], nodes)


def _write_dataset(uri: str, gallery: str, table: pa.Table) -> None:
    """Write the tiles as a data set of references alone, for an embedding job."""
    uris = [files.join(gallery, name) for name in table["uri"].to_pylist()]
    names = ["id", "place_id", "offset", "length", "lat", "lon"]
    columns = {name: table[name] for name in names}
    columns["uri"] = pa.array(uris, pa.string())
    columns["split"] = pa.array([SPLIT] * len(table))
    write_dataset(
        uri, pa.table(columns), SCHEMAS["queries"].empty_table(), name="tiles of a gallery"
    )
