"""`s4g evaluate`: a run, an export or a file of weights against a data set, its own or another (zero-shot)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow.compute as pc
from rich.table import Table

from s4g_ray import object_store, storage
from s4g_ray.autoscaling import await_room
from s4g_ray.checkpoint import save_checkpoint, stamp_of
from s4g_ray.checks import check_resources, check_test_split
from s4g_ray.commits import claim_folder
from s4g_ray.config import RunConfig, override_config
from s4g_ray.dataset import GeoDataset, View, open_dataset
from s4g_ray.embedding import embed
from s4g_ray.encoder import Encoder, Numerics, load_encoder
from s4g_ray.encoder_pool import EncoderPool
from s4g_ray.errors import InputError
from s4g_ray.evaluation import PROTOCOLS, Protocol
from s4g_ray.export import Source, open_source
from s4g_ray.job import check_kept
from s4g_ray.placement import Node
from s4g_ray.places import format_metres
from s4g_ray.progress import Reporter
from s4g_ray.scoring import Metrics, Score, score_tables
from s4g_ray.session import ray_session

MARKER = "evaluation.json"  # says that a folder of --out is an evaluation's


@dataclass(frozen=True)
class Evaluation:
    """What an encoder scores on a split, with one field of view."""

    dataset: str
    split: str
    fov_deg: float
    heading: str
    score: Score
    made_with: dict[str, Any]  # source, weights, sizes, precision, data set's fingerprint
    bad_images: tuple[str, ...] = ()  # left out, with reasons

    def as_dict(self, protocols: Sequence[Protocol] = PROTOCOLS) -> dict[str, Any]:
        """Plain values, for JSON."""
        chosen: dict[str, Any] = {p: self.score.metrics[p] for p in protocols}
        regions = {name: {p: metrics[p] for p in protocols} for name, metrics in self.score.regions.items()}
        where = {"dataset": self.dataset, "split": self.split, "fov_deg": self.fov_deg, "heading": self.heading}
        left_out = {"bad_images": list(self.bad_images)}
        return {**where, **chosen, "regions": regions, **left_out, "made_with": self.made_with}


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
    reporter: Reporter | None = None,
) -> list[Evaluation]:
    """Evaluate a run (its last checkpoint, or that of `epoch`), an export or weights on a data set's split.

    One evaluation for each field of view in degrees; the gallery is embedded once. `config` and `overrides`
    go before what the source says. `out` keeps embeddings and result.json; without it, they lie in a temporary
    folder of this machine (a cluster of several needs `out` on storage that all of them reach). After an
    interruption the same call with `out` goes on with the tables that are published there. Raises InputError
    for bad input, RunError for non-finite embeddings and when the job dies.
    """
    reporter = reporter or Reporter()
    opened = open_source(source, storage.absolute(dataset_uri), config=config, epoch=epoch)
    base = override_config(opened.config, overrides)
    object_store.apply(base.storage)
    dataset = open_dataset(base.data.uri)
    base = _with_data(base, test_split=_choose_split(dataset, split, base.data.test_split))
    heading = heading or base.data.query_heading
    configs = [_with_data(base, query_fov_deg=fov, query_heading=heading) for fov in fovs or [base.data.query_fov_deg]]
    check_test_split(configs[0], dataset)
    data, numerics = base.data, opened.numerics_for(base)
    made_with = {"split": data.test_split, "seed": base.seed, **asdict(numerics)}
    reporter.line(
        f"{base.model.name}, queries {data.query_size[0]}x{data.query_size[1]}, references"
        f" {data.reference_size[0]}x{data.reference_size[1]}, {numerics.precision}, split {data.test_split}"
    )
    with _work_folder(out, made_with) as folder:
        encoder = load_encoder(base.model, opened.checkpoint) if opened.checkpoint else Encoder.build(base.model)
        with ray_session(base) as nodes:
            await_room(base.ray, partial(_check_nodes, base, out), nodes, reporter)
            with EncoderPool(base) as pool:
                job = _Job(opened, numerics, dataset, encoder, folder, pool, reporter)
                job.embed(configs[0], "references", "references")
                found = [job.evaluate(config) for config in configs]
        if out is not None:
            storage.write_json(storage.join(folder, "result.json"), [result.as_dict() for result in found])
    return found


def _check_nodes(config: RunConfig, out: str | None, nodes: Sequence[Node]) -> None:
    """Raises InputError for several nodes without a folder that all of them reach, and NoRoomError."""
    if out is None and len(nodes) > 1:  # one of them alone may have CPUs, and not be the driver's
        raise InputError(f"the cluster has {len(nodes)} nodes; give --out s3://... or a folder that all of them reach")
    check_resources(config, nodes, training=False)


def _choose_split(dataset: GeoDataset, wanted: str | None, configured: str) -> str:
    """The split asked for, else the configured one where the data set has it, else its only other one."""
    held = [name for name in ("test", "val", "train") if dataset.queries.count_rows(filter=pc.field("split") == name)]
    if wanted is None:
        wanted = configured if configured in held else next((s for s in held if s != "train"), configured)
    if wanted not in held:
        raise InputError(f"{dataset.uri} has no queries of split {wanted!r}; it has {', '.join(held) or 'none'}")
    return wanted


def _with_data(config: RunConfig, **values: Any) -> RunConfig:
    """A configuration with other values in section `data`, validated."""
    return override_config(config, [f"data.{key}={value}" for key, value in values.items()])


@contextmanager
def _work_folder(out: str | None, made_with: dict[str, Any]) -> Iterator[str]:
    """A temporary folder; or `out`: new, or that of an interrupted evaluation made with the same values."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="s4g-evaluate-") as folder:
            yield folder
        return
    folder = storage.absolute(out)
    check_kept("--out", folder)
    if storage.exists(storage.join(folder, "result.json")):
        raise InputError(f"{out} holds a finished evaluation; remove it or choose another folder")
    claim_folder(folder, MARKER, made_with, "an evaluation")
    yield folder


class _Job:
    """An encoder's checkpoint and where its tables go."""

    def __init__(
        self,
        source: Source,
        numerics: Numerics,
        dataset: GeoDataset,
        encoder: Encoder,
        folder: str,
        pool: EncoderPool,
        reporter: Reporter,
    ) -> None:
        self.dataset, self.encoder, self.folder, self.reporter = dataset, encoder, folder, reporter
        self.pool = pool
        self.source, self.numerics = source, numerics
        self.bad_images: dict[str, tuple[str, ...]] = {}
        self.checkpoint = source.checkpoint or storage.join(folder, "checkpoint")
        if source.checkpoint is None:
            save_checkpoint(self.checkpoint, encoder, None, epoch=0, step=0)

    def embed(self, config: RunConfig, view: View, name: str) -> str:
        """Embed one view of the test split; returns the URI of the table."""
        uri, split = storage.join(self.folder, name), config.data.test_split
        stamp = stamp_of(config, self.encoder, self.checkpoint, self.dataset.fingerprint)
        if storage.is_published(uri):
            manifest = storage.open_published(uri, "embeddings", stamp)
            self.bad_images[name] = tuple(manifest.info["bad_images"])
            self.reporter.line(f"{name} are embedded already")
            return uri
        with self.reporter.stage(f"embedding {name} of {split}") as update:
            report = embed(
                self.pool, config, self.dataset, self.checkpoint, uri, splits=[split], numerics=self.numerics,
                views=[view], stamp=stamp, on_progress=update,
            )  # fmt: skip
        self.bad_images[name] = report.bad_images
        for line in report.lines(name):
            self.reporter.line(line)
        return uri

    def evaluate(self, config: RunConfig) -> Evaluation:
        """Embed the queries as one field of view shows them, and score them."""
        data = config.data
        name = f"queries-fov={data.query_fov_deg:g}-{data.query_heading}"
        uri = self.embed(config, "queries", name)
        with self.reporter.stage("scoring"):
            found = score_tables(
                self.dataset, data.test_split, uri, storage.join(self.folder, "references"),
                stamp=stamp_of(config, self.encoder, self.checkpoint, self.dataset.fingerprint),
                radii_m=config.evaluation.radii_m,
            )  # fmt: skip
        info = storage.open_published(self.checkpoint, "checkpoint").info
        made_with = {
            "source": self.source.uri, "model": config.model.name, "epoch": info["epoch"],
            "weights_sha256": info["weights_sha256"], "query_size": list(data.query_size),
            "reference_size": list(data.reference_size), **asdict(self.numerics), "seed": config.seed,
            "dataset_fingerprint": self.dataset.fingerprint,
        }  # fmt: skip
        where = self.dataset.name, data.test_split, data.query_fov_deg, data.query_heading
        return Evaluation(*where, found, made_with, self.bad_images["references"] + self.bad_images[name])


COUNTS = ("queries", "queries_without_reference", "references")
REGION_COLUMNS = {
    "recall@1": "R@1", "recall@5": "R@5", "recall@10": "R@10", "hit_rate": "hit rate",
    "median_error_m": "median error", "queries": "queries",
}  # fmt: skip


def evaluation_tables(results: Sequence[Evaluation], protocols: Sequence[Protocol] = PROTOCOLS) -> list[Table]:
    """The metrics, a column for each field of view and protocol (those that agree share one); then the regions."""
    first = results[0].score.metrics[protocols[0]]
    columns = [
        (f"{result.fov_deg:g}° {result.heading}\n{label}" if len(results) > 1 else label, row)
        for result in results
        for label, row in _columns(result.score.metrics, protocols)
    ]
    left_out = len(results[0].bad_images)
    title = f"{results[0].dataset}, split {results[0].split}" + (f" ({left_out} images left out)" if left_out else "")
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for label, _ in columns:
        table.add_column(label, justify="right")
    for key in first:
        table.add_row(key, *(_cell(key, row.get(key)) for _, row in columns), end_section=key == "median_error_m")
    return [table, *(_region_table(result, protocols) for result in results if result.score.regions)]


def _region_table(result: Evaluation, protocols: Sequence[Protocol]) -> Table:
    """A row for each region, or for each region and protocol where these differ."""
    regions = {name: _columns(metrics, protocols) for name, metrics in result.score.regions.items()}
    agree = all(len(rows) == 1 for rows in regions.values())
    table = Table(title=f"by region, {result.fov_deg:g}° {result.heading}", title_justify="left")
    table.add_column("")
    keys = [key for key in REGION_COLUMNS if key in result.score.metrics[protocols[0]]]
    for key in keys:
        table.add_column(REGION_COLUMNS[key], justify="right")
    for name, rows in regions.items():
        for label, row in rows:
            table.add_row(name if agree else f"{name}, {label}", *(_cell(key, row.get(key)) for key in keys))
    return table


def _columns(metrics: dict[Protocol, Metrics], protocols: Sequence[Protocol]) -> list[tuple[str, Metrics]]:
    if len({tuple(metrics[p].items()) for p in protocols}) == 1:
        return [(" = ".join(protocols), metrics[protocols[0]])]
    return [(p, metrics[p]) for p in protocols]


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in COUNTS:
        return f"{value:,.0f}"
    return format_metres(value) if key == "median_error_m" else f"{value:.2%}"
