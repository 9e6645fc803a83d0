"""`s4g evaluate`: a run, an export or weights on a data set, its own or another (zero-shot)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc

from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.distributed.start_checks import check_session
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.encoder.source import open_source
from s4g_ray.errors import InputError
from s4g_ray.evaluation.query_results import check_results_uri, check_store, write_results
from s4g_ray.evaluation.tables import Evaluation
from s4g_ray.pipeline.preflight import check_test_split
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.ownership.lease import owning


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
    steal: as Lease.acquire. queries_out: a .parquet or .csv file for the results of each query,
    with its first `top` references. Raises InputError for bad input, WriteError for a store that
    takes no file, RunError for non-finite embeddings and when the job dies.
    """
    reporter = reporter or Reporter()
    if queries_out is not None:
        queries_out = _check_queries_out(queries_out, top)
    opened = open_source(source, files.absolute(dataset_uri), config=config, epoch=epoch)
    base = override_config(opened.config, overrides)
    s3_settings.apply(base.storage)
    check_session(base.ray)
    if queries_out is not None:
        check_store(queries_out)
    dataset = open_dataset(base.data.uri, base.data.image_options)
    base = _with_data(base, test_split=_choose_split(dataset, split, base.data.test_split))
    base = _with_data(base, query_heading=heading or base.data.query_heading)
    configs = [_with_fov(base, fov) for fov in fovs] or [base]
    check_test_split(configs[0], dataset)
    with _work_folder(out, reporter, steal=steal) as folder:
        # imports torch, Ray and faiss, which takes seconds: errors of the input come before
        from s4g_ray.pipeline.stages.evaluation_job import evaluate_on_cluster

        found, query_results = evaluate_on_cluster(
            opened,
            dataset,
            configs,
            folder,
            is_kept=out is not None,
            num_top=top if queries_out is not None else 0,
            reporter=reporter,
        )
        if out is not None:
            _write_found(folder, found)
        if queries_out is not None:
            write_results(queries_out, query_results)
            reporter.line(f"wrote the results of each query to {queries_out}")
    return found


def _write_found(folder: str, found: Sequence[Evaluation]) -> None:
    files.write_json(files.join(folder, "result.json"), [result.as_dict() for result in found])


def _check_queries_out(uri: str, top: int) -> str:
    """Return the file's absolute URI. Raises InputError for a file or `top` that cannot be."""
    if top < 1:
        raise InputError(f"--top {top} is below 1; give the number of references a query")
    check_kept("--queries-out", uri)
    uri = files.absolute(uri)
    check_results_uri(uri)
    return uri


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
def _work_folder(out: str | None, reporter: Reporter, *, steal: bool) -> Iterator[str]:
    """Yield a temporary folder, or `out`, which holds no finished evaluation."""
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
        yield folder
