"""`s4g embed`: embed a data set's images into an embedding table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.architecture.size_check import fit_model_to_sizes
from s4g_ray.encoder.checkpoint import checkpoint_stamp, save_checkpoint
from s4g_ray.encoder.embedding.report import EmbeddingReport
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.source import open_source
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.errors import InputError
from s4g_ray.pipeline.preflight import check_headings, check_resources
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import is_published, open_published
from s4g_ray.storage.ownership.lease import owning
from s4g_ray.storage.part_commits import WORK, claim_folder

SPLITS = ("train", "val", "test")
MARKER = "embedding.json"  # the values that a folder was begun with


def embed_collection(
    source: str,
    dataset_uri: str,
    target: str,
    *,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    splits: Sequence[str] = SPLITS,
    epoch: int | None = None,
    steal: bool = False,
    reporter: Reporter | None = None,
) -> Record:
    """Publish embeddings of both views of `splits` at `target`; return the table's description.

    The encoder is that of a run (its last checkpoint, or that of `epoch`), an export or weights;
    `config` and `overrides` override the source's own configuration. The test split includes the
    gallery. After an interruption the same call resumes from the committed parts; a finished table
    is left as it is. steal: take the folder over from a living process, as Lease.acquire. Raises
    InputError for bad input, such as a target begun with other values, and
    the errors of embedding_job.embed.
    """
    reporter = reporter or Reporter()
    target = files.absolute(target)
    check_kept("TARGET", target)
    opened = open_source(source, files.absolute(dataset_uri), config=config, epoch=epoch)
    base = override_config(opened.config, overrides)
    s3_settings.apply(base.storage)
    dataset = open_dataset(base.data.uri, base.data.image_options)
    numerics = opened.numerics_for(base.train)
    views = _views_of(base, dataset, splits)
    base = base.model_copy(update={"model": fit_model_to_sizes(base.model, base.data)})
    encoder = opened.build_encoder(base.model, reporter.line)
    made_with = {
        **_describe_encoder(base, encoder),
        "source": opened.uri,
        "dataset": dataset.fingerprint,
        "splits": list(splits),
        **asdict(numerics),
    }
    with owning(target, reporter, steal=steal, interrupts=True):
        claim_folder(target, MARKER, made_with, "an embedding job")
        if is_published(target):
            reporter.line(f"{target} is finished already")
            return _describe_table(target, made_with)
        checkpoint = opened.checkpoint or _save_weights(target, encoder)
        job = partial(
            embed,
            config=base,
            dataset=dataset,
            checkpoint=checkpoint,
            target=target,
            splits=splits,
            numerics=numerics,
            stamp=checkpoint_stamp(base, encoder, checkpoint, dataset.fingerprint),
            views=views,
        )
        report = _run_on_cluster(base, job, f"embedding {', '.join(splits)}", reporter)
        for line in report.lines("image"):
            reporter.line(line)
    return _describe_table(target, made_with)


def _save_weights(target: str, encoder: Encoder) -> str:
    """Write weights that have no checkpoint as one, for the actors; return its URI."""
    checkpoint = files.join(target, WORK, "checkpoint")
    save_checkpoint(checkpoint, encoder, None, epoch=0, step=0)
    return checkpoint


def _run_on_cluster(
    config: RunConfig,
    job: Callable[..., EmbeddingReport],
    stage: str,
    reporter: Reporter,
) -> EmbeddingReport:
    """Run job(pool, on_progress=...) once the cluster has room for embedding actors."""
    fits = partial(check_resources, config, training=False)
    with ray_session(config.ray, config.storage) as nodes:
        await_room(config.ray, fits, nodes, reporter)
        pool = EncoderPool(config.model, config.placed_embedding, config.ray.start_timeout_s)
        with pool, reporter.stage(stage) as update:
            return job(pool, on_progress=update)


def _describe_encoder(config: RunConfig, encoder: Encoder) -> Record:
    return {
        "model": config.model.name,
        "weights_sha256": files.fingerprint(encode_weights(encoder)),
        "preprocessing": encoder.preprocessing(config.data),
        "dtype": config.embedding.dtype,
        "seed": config.seed,
    }


def _views_of(config: RunConfig, dataset: GeoDataset, splits: Sequence[str]) -> list[View]:
    """Return the views that have rows in the splits.

    Raises InputError where neither view has any, for unknown splits and for missing headings.
    """
    for split in splits:
        if split not in SPLITS:
            raise InputError(f"split {split!r} is none of {', '.join(SPLITS)}")
        check_headings(config, dataset, split)
    splits_of: dict[View, list[str]] = {"queries": list(splits), "references": list(splits)}
    if config.data.test_split in splits:
        splits_of["references"].append("gallery")
    views = [view for view in VIEWS if len(dataset.columns(view, splits_of[view], ["id"])[0])]
    if not views:
        raise InputError(f"{dataset.uri} holds no image of split {', '.join(splits)}")
    return views


def _describe_table(target: str, made_with: Record) -> Record:
    manifest = open_published(target, "embeddings")
    counts: Record = dict.fromkeys(VIEWS, 0)
    for part in manifest.parts:
        view, _, _ = part.name.partition("/")
        counts[view] += part.rows
    return {
        "uri": target,
        **counts,
        "bad_images": manifest.info["bad_images"],
        "made_with": made_with,
    }
