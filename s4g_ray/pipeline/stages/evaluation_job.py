"""Evaluate an encoder on a Ray cluster: embed both views of a split, and score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from s4g_ray.config.data_schema import format_fov
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import View
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement import Node
from s4g_ray.distributed.session import ray_session
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.architecture.size_check import fit_model_to_sizes
from s4g_ray.encoder.checkpoint import checkpoint_stamp, save_checkpoint
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.encoder.source import EncoderSource
from s4g_ray.errors import InputError
from s4g_ray.evaluation.query_results import QueryResults
from s4g_ray.evaluation.scores import search_tables
from s4g_ray.evaluation.tables import Evaluation
from s4g_ray.pipeline.preflight import check_resources
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published, open_published
from s4g_ray.storage.part_commits import claim_folder

MARKER = "evaluation.json"  # the values that a folder of --out was begun with
QueryTables = list[tuple[QueryResults, dict[str, Any]]]


def evaluate_on_cluster(
    source: EncoderSource,
    dataset: GeoDataset,
    configs: Sequence[RunConfig],
    folder: str,
    *,
    is_kept: bool,
    num_top: int,
    reporter: Reporter,
) -> tuple[list[Evaluation], QueryTables]:
    """Evaluate with each configuration, which differ in the field of view; tables lie in `folder`.

    is_kept: the folder is one of --out: new, or begun by an evaluation with the same values.
    num_top: how many references are kept for each query in the tables of queries; 0: no tables.
    """
    base = _fit_model(configs)
    numerics = source.numerics_for(base.train)
    if is_kept:
        made_with = {"split": base.data.test_split, "seed": base.seed, **asdict(numerics)}
        claim_folder(folder, MARKER, made_with, "an evaluation")
    reporter.line(_describe(base, numerics))
    encoder = source.build_encoder(base.model, reporter.line)
    with ray_session(base.ray, base.storage) as nodes:
        await_room(base.ray, partial(_check_nodes, base, is_kept), nodes, reporter)
        with EncoderPool(base.model, base.placed_embedding, base.ray.start_timeout_s) as pool:
            job = EvaluationJob(source, numerics, dataset, encoder, folder, pool, reporter, num_top)
            job.embed(configs[0], "references", "references")
            found = [job.evaluate(config) for config in configs]
    return found, job.query_results


def _fit_model(configs: Sequence[RunConfig]) -> RunConfig:
    """Return the first configuration with a model that takes the image sizes of all."""
    model = configs[0].model
    for config in configs:
        model = fit_model_to_sizes(model, config.data)
    return configs[0].model_copy(update={"model": model})


def _describe(config: RunConfig, numerics: Numerics) -> str:
    """Return a line about what is evaluated: model, image sizes, precision and split."""
    data = config.data
    return (
        f"{config.model.name}, queries {data.query_size[0]}x{data.query_size[1]}, references"
        f" {data.reference_size[0]}x{data.reference_size[1]}, {numerics.precision}, split"
        f" {data.test_split}"
    )


def _check_nodes(config: RunConfig, is_kept: bool, nodes: Sequence[Node]) -> None:
    """Raise InputError for several nodes without --out, and NoRoomError without room for actors."""
    # even where one node alone has CPUs: it need not be the driver's
    if not is_kept and len(nodes) > 1:
        raise InputError(
            f"the cluster has {len(nodes)} nodes; give --out s3://... or a folder that all of them"
            " reach"
        )
    check_resources(config, nodes, training=False)


class EvaluationJob:
    """Embeds and scores with one encoder; tables lie in `folder`."""

    def __init__(
        self,
        source: EncoderSource,
        numerics: Numerics,
        dataset: GeoDataset,
        encoder: Encoder,
        folder: str,
        pool: EncoderPool,
        reporter: Reporter,
        num_top: int = 0,
    ) -> None:
        """num_top: how many references are kept for each query in query_results; 0: none."""
        self.source = source
        self.numerics = numerics
        self.dataset = dataset
        self.encoder = encoder
        self.folder = folder
        self.pool = pool
        self.reporter = reporter
        self.num_top = num_top
        self.bad_images: dict[str, tuple[str, ...]] = {}
        # of each evaluation, with the values that tell it from the others
        self.query_results: QueryTables = []
        self.checkpoint = source.checkpoint or files.join(folder, "checkpoint")
        if source.checkpoint is None:
            save_checkpoint(self.checkpoint, encoder, None, epoch=0, step=0)

    def embed(self, config: RunConfig, view: View, name: str) -> str:
        """Embed one view of the test split; return the URI of the table."""
        uri = files.join(self.folder, name)
        split = config.data.test_split
        stamp = checkpoint_stamp(config, self.encoder, self.checkpoint, self.dataset.fingerprint)
        if is_published(uri):
            manifest = open_published(uri, "embeddings", stamp)
            self.bad_images[name] = tuple(manifest.info["bad_images"])
            self.reporter.line(f"{_name_images(config, view)[1]} are embedded already")
            return uri
        title = f"embedding {_name_images(config, view)[1]} of {split}"
        with self.reporter.stage(title) as update:
            report = embed(
                self.pool,
                config,
                self.dataset,
                self.checkpoint,
                uri,
                splits=[split],
                numerics=self.numerics,
                views=[view],
                stamp=stamp,
                on_progress=update,
            )
        self.bad_images[name] = report.bad_images
        for line in report.lines(*_name_images(config, view)):
            self.reporter.line(line)
        return uri

    def evaluate(self, config: RunConfig) -> Evaluation:
        """Embed the queries in one field of view, and score them."""
        data = config.data
        low, high = data.fov_range
        name = f"queries-fov={format_fov(data.query_fov_deg)}-{data.query_heading}"
        uri = self.embed(config, "queries", name)
        stamp = checkpoint_stamp(config, self.encoder, self.checkpoint, self.dataset.fingerprint)
        with self.reporter.stage("scoring"):
            search = search_tables(
                self.dataset,
                data.test_split,
                uri,
                files.join(self.folder, "references"),
                stamp=stamp,
                radii_m=config.evaluation.radii_m,
                num_top=self.num_top,
                sdm_ranks=config.evaluation.sdm_ranks,
            )
            found = search.score()
            if self.num_top:
                results = QueryResults.from_search(self.dataset, data.test_split, search)
                fov = low if low == high else format_fov((low, high))
                view = {"fov_deg": fov, "heading": data.query_heading}
                self.query_results.append((results, view))
        info = open_published(self.checkpoint, "checkpoint").info
        made_with = {
            "source": self.source.uri,
            "model": config.model.name,
            "epoch": info["epoch"],
            "weights_sha256": info["weights_sha256"],
            "query_size": list(data.query_size),
            "reference_size": list(data.reference_size),
            **asdict(self.numerics),
            "seed": config.seed,
            "dataset_fingerprint": self.dataset.fingerprint,
        }
        return Evaluation(
            self.dataset.name,
            data.test_split,
            low if low == high else (low, high),
            data.query_heading,
            found,
            made_with,
            self.bad_images["references"] + self.bad_images[name],
        )


def _name_images(config: RunConfig, view: View) -> tuple[str, str]:
    """Return what one image of a view is called, and several: `queries (180°, random)`."""
    if view == "references":
        return "reference", "references"
    seen = f"({format_fov(config.data.query_fov_deg)}°, {config.data.query_heading})"
    return f"query {seen}", f"queries {seen}"
