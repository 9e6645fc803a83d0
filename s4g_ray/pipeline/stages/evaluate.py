"""`s4g evaluate`: a run, an export or weights on a data set, its own or another (zero-shot)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow.compute as pc

from s4g_ray.config.data_schema import format_fov
from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import View
from s4g_ray.distributed.autoscaling import await_room
from s4g_ray.distributed.placement import Node
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.architecture.size_check import fit_model_to_sizes
from s4g_ray.encoder.checkpoint import checkpoint_stamp, save_checkpoint
from s4g_ray.encoder.embedding_job import embed
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.precision import Numerics
from s4g_ray.encoder.source import EncoderSource, open_source
from s4g_ray.errors import InputError
from s4g_ray.evaluation.query_results import QueryResults, check_results_uri, write_results
from s4g_ray.evaluation.scores import search_tables
from s4g_ray.evaluation.tables import Evaluation
from s4g_ray.pipeline.preflight import check_resources, check_test_split
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import is_published, open_published
from s4g_ray.storage.ownership.lease import owning
from s4g_ray.storage.part_commits import claim_folder

MARKER = "evaluation.json"  # the values that a folder of --out was begun with


def evaluate(
    source: str,
    dataset_uri: str,
    *,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    split: str | None = None,
    epoch: int | None = None,
    fovs: Sequence[float] = (),
    heading: str | None = None,
    out: str | None = None,
    queries_out: str | None = None,
    top: int = 10,
    steal: bool = False,
    reporter: Reporter | None = None,
) -> list[Evaluation]:
    """Evaluate a run, an export or weights on a split of a data set; one result a field of view.

    Of a run, the last checkpoint is taken, or that of `epoch`. `config` and `overrides` override
    the source's own configuration. fovs: fields of view in degrees; the gallery is embedded once
    for all. `out` keeps embeddings and result.json; without it, they lie in a temporary folder of
    this machine (a cluster of several nodes needs `out` on storage that all of them reach). After
    an interruption the same call with `out` resumes from the tables that are published there.
    steal: take `out` over from a living process, as Lease.acquire. queries_out: a .parquet or .csv
    file for the results of each query, with its first `top` references. Raises InputError for bad
    input, RunError for non-finite embeddings and when the job dies.
    """
    reporter = reporter or Reporter()
    if queries_out is not None:
        queries_out = _check_queries_out(queries_out, top)
    opened = open_source(source, files.absolute(dataset_uri), config=config, epoch=epoch)
    base = override_config(opened.config, overrides)
    s3_settings.apply(base.storage)
    dataset = open_dataset(base.data.uri, base.data.image_options)
    base = _with_data(base, test_split=_choose_split(dataset, split, base.data.test_split))
    base = _with_data(base, query_heading=heading or base.data.query_heading)
    configs = [_with_fov(base, fov) for fov in fovs] or [base]
    check_test_split(configs[0], dataset)
    base = _fit_model(base, configs)
    numerics = opened.numerics_for(base.train)
    num_top = top if queries_out is not None else 0
    made_with = {"split": base.data.test_split, "seed": base.seed, **asdict(numerics)}
    reporter.line(_describe(base, numerics))
    with _work_folder(out, made_with, reporter, steal=steal) as folder:
        encoder = opened.build_encoder(base.model, reporter.line)
        with ray_session(base.ray, base.storage) as nodes:
            await_room(base.ray, partial(_check_nodes, base, out), nodes, reporter)
            with EncoderPool(base.model, base.placed_embedding, base.ray.start_timeout_s) as pool:
                job = EvaluationJob(
                    opened, numerics, dataset, encoder, folder, pool, reporter, num_top
                )
                job.embed(configs[0], "references", "references")
                found = [job.evaluate(config) for config in configs]
        if out is not None:
            results = [result.as_dict() for result in found]
            files.write_json(files.join(folder, "result.json"), results)
        if queries_out is not None:
            write_results(queries_out, job.query_results)
            reporter.line(f"wrote the results of each query to {queries_out}")
    return found


def _check_queries_out(uri: str, top: int) -> str:
    """Return the file's absolute URI. Raises InputError for a file or `top` that cannot be."""
    if top < 1:
        raise InputError(f"--top {top} is below 1; give the number of references a query")
    check_kept("--queries-out", uri)
    uri = files.absolute(uri)
    check_results_uri(uri)
    return uri


def _fit_model(base: RunConfig, configs: Sequence[RunConfig]) -> RunConfig:
    """Return the configuration with a model that takes the image sizes of all of `configs`."""
    model = base.model
    for config in configs:
        model = fit_model_to_sizes(model, config.data)
    return base.model_copy(update={"model": model})


def _describe(config: RunConfig, numerics: Numerics) -> str:
    """Return a line about what is evaluated: model, image sizes, precision and split."""
    data = config.data
    return (
        f"{config.model.name}, queries {data.query_size[0]}x{data.query_size[1]}, references"
        f" {data.reference_size[0]}x{data.reference_size[1]}, {numerics.precision}, split"
        f" {data.test_split}"
    )


def _check_nodes(config: RunConfig, out: str | None, nodes: Sequence[Node]) -> None:
    """Raise InputError for several nodes without `out`, and NoRoomError without room for actors."""
    # even where one node alone has CPUs: it need not be the driver's
    if out is None and len(nodes) > 1:
        raise InputError(
            f"the cluster has {len(nodes)} nodes; give --out s3://... or a folder that all of them"
            " reach"
        )
    check_resources(config, nodes, training=False)


def _choose_split(dataset: GeoDataset, wanted: str | None, configured: str) -> str:
    """Return the split asked for, else the configured one, else another that is not train.

    Raises InputError for a split without queries.
    """
    held = [
        name
        for name in ("test", "val", "train")
        if dataset.queries.count_rows(filter=pc.field("split") == name)
    ]
    if wanted is None:
        wanted = configured
        others = [name for name in held if name != "train"]
        if configured not in held and others:
            wanted = others[0]
    if wanted not in held:
        raise InputError(
            f"{dataset.uri} has no queries of split {wanted!r}; it has {', '.join(held) or 'none'}"
        )
    return wanted


def _with_data(config: RunConfig, **values: Any) -> RunConfig:
    """Return a configuration with other values in section `data`, validated."""
    return override_config(config, [f"data.{key}={value}" for key, value in values.items()])


def _with_fov(config: RunConfig, fov_deg: float) -> RunConfig:
    """Return a configuration with one field of view, shown as in training."""
    fov = config.data.with_fov(fov_deg)
    return _with_data(config, query_fov_deg=list(fov) if isinstance(fov, tuple) else fov)


@contextmanager
def _work_folder(
    out: str | None, made_with: dict[str, Any], reporter: Reporter, *, steal: bool
) -> Iterator[str]:
    """Yield a temporary folder, or `out`: new, or begun by an evaluation with the same values."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="s4g-evaluate-") as folder:
            yield folder
        return
    folder = files.absolute(out)
    check_kept("--out", folder)
    with owning(folder, reporter, steal=steal, interrupts=True):
        if files.exists(files.join(folder, "result.json")):
            raise InputError(
                f"{out} holds a finished evaluation; remove it or choose another folder"
            )
        claim_folder(folder, MARKER, made_with, "an evaluation")
        yield folder


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
        self.query_results: list[tuple[QueryResults, dict[str, Any]]] = []
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
