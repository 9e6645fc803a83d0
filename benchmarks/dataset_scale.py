"""Measure data sets of many rows: write, open, start, convert a folder, evaluate. No images.

    python -m benchmarks.dataset_scale [--counts 1000000 10000000] [--queries 1000] [--dim 64]

N places, each a query and a reference, at clustered positions, with gaps between their ids and in
no order on the ground. Each step runs in a process of its own: its wall time, its processor time
and its peak memory, what the interpreter and its libraries take included. Libraries that a step
does not need are imported where they are needed, so that they do not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from fsspec.spec import AbstractFileSystem

from s4g_ray.arrays import Floats32, Floats64
from s4g_ray.data.dataset import open_dataset, write_dataset
from s4g_ray.data.sphere import EARTH_RADIUS_M
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.storage.manifest import Part, Stamp, publish, write_part

BATCH = 250_000  # rows that are drawn at once
IMAGES_PER_FOLDER = 1000
PART_BYTES = 32_000_000
VIEWS = ("references", "queries")
STAMP = Stamp(step=0, weights_sha256="w", preprocessing="p", dataset="d", dim=0, dtype="float16")


class ImaginaryFolders(AbstractFileSystem):  # type: ignore[misc]
    """Folders imaginary://VIEW/FOLDER of IMAGES_PER_FOLDER images, which are listed alone."""

    protocol = "imaginary"

    def ls(self, path: str, **_: Any) -> list[Any]:
        """List a folder."""
        inside = self._strip_protocol(path)
        return [f"{inside}/{number:06d}.jpg" for number in range(IMAGES_PER_FOLDER)]


def draw_positions(start: int, count: int, side_deg: float) -> tuple[Floats64, Floats64]:
    """Draw latitudes and longitudes of the rows of a batch, in 200 clusters."""
    rng = np.random.default_rng(start)
    centres = np.random.default_rng(1).uniform((35, -10), (60, 30), (200, 2))
    lat, lon = (centres[rng.integers(0, 200, count)] + rng.uniform(0, side_deg, (count, 2))).T
    return lat, lon


def draw_rows(
    num_rows: int, view: str, num_test: int, first: int = 0, rest: str = "train"
) -> Iterator[pa.Table]:
    """Draw rows of a view from `first` on: the last num_test of num_rows places are test."""
    for start in range(first // BATCH * BATCH, num_rows, BATCH):
        rows = np.arange(start, min(start + BATCH, num_rows))
        lat, lon = draw_positions(start, len(rows), 2.0)
        if view == "queries":  # a few metres away
            lat = lat + np.degrees(5 / EARTH_RADIUS_M)
        folders = pc.utf8_lpad(pa.array(rows // IMAGES_PER_FOLDER).cast(pa.string()), 6, "0")
        names = pc.utf8_lpad(pa.array(rows % IMAGES_PER_FOLDER).cast(pa.string()), 6, "0")
        uri = pc.binary_join_element_wise(f"imaginary://{view}/", folders, "/", names, ".jpg", "")
        table = pa.table(
            {
                "id": rows * 3 + rows % 3,
                "place_id": rows,
                "uri": uri,
                "lat": lat,
                "lon": lon,
                "split": np.where(rows < num_rows - num_test, rest, "test"),
            }
        )
        yield table.slice(max(0, first - start))


def write_rows(root: str, num_rows: int, num_test: int) -> None:
    """Write the data set from iterators."""
    rows = [draw_rows(num_rows, view, num_test) for view in VIEWS]
    write_dataset(f"{root}/data", *rows, name="scale")


def write_gallery(root: str, num_rows: int, num_test: int) -> None:
    """Write a data set of test queries in a gallery of num_rows references."""
    references = draw_rows(num_rows, "references", num_test, rest="gallery")
    queries = draw_rows(num_rows, "queries", num_test, first=num_rows - num_test)
    write_dataset(f"{root}/gallery", references, queries, name="scale")


def write_lists(root: str, num_rows: int, num_test: int) -> None:
    """Write the rows as CSV and as Parquet lists of a folder."""
    columns = {"uri": "path", "lat": "lat", "lon": "lon", "split": "split"}
    for view in VIEWS:
        csv_writer: Any = None
        parquet_writer: Any = None
        for table in draw_rows(num_rows, view, num_test):
            table = table.select(list(columns)).rename_columns(list(columns.values()))
            csv_writer = csv_writer or pacsv.CSVWriter(
                f"{root}/{view}.csv",
                table.schema,
                write_options=pacsv.WriteOptions(quoting_style="none"),
            )
            parquet_writer = parquet_writer or pq.ParquetWriter(
                f"{root}/{view}.parquet", table.schema
            )
            csv_writer.write_table(table)
            parquet_writer.write_table(table)
        csv_writer.close()
        parquet_writer.close()


def write_embeddings(root: str, num_rows: int, num_test: int, dim: int) -> None:
    """Publish a float16 table of all references and of the test queries, in parts of 32 MB."""
    centres = np.random.default_rng(0).standard_normal((1000, dim), dtype=np.float32)

    def draw(rows: Any) -> Floats32:
        own = np.random.default_rng(rows[0]).standard_normal((len(rows), dim), dtype=np.float32)
        return np.asarray(own + centres[rows % 1000], np.float32)

    per_part = PART_BYTES // (2 * dim)
    parts: list[Part] = []
    for start in range(0, num_rows, per_part):
        rows = np.arange(start, min(start + per_part, num_rows))
        contents = encode_part(rows * 3 + rows % 3, rows, draw(rows), "float16")
        name = f"references/part-{len(parts):05d}.parquet"
        parts.append(write_part(f"{root}/embeddings", name, contents, len(rows)))
    rows = np.arange(num_rows - num_test, num_rows)
    contents = encode_part(rows * 3 + rows % 3, rows, draw(rows), "float16")
    parts.append(write_part(f"{root}/embeddings", "queries/part-0.parquet", contents, len(rows)))
    publish(f"{root}/embeddings", "embeddings", parts, STAMP)


def open_only(root: str) -> None:
    """Open and validate."""
    open_dataset(f"{root}/data")


def start_run(root: str) -> None:
    """Do what a run does with the data set before it starts."""
    from s4g_ray.config.loading import parse_config
    from s4g_ray.data.train_split import TrainSplit
    from s4g_ray.pipeline.preflight import check_against_dataset

    config = parse_config(
        {
            "run_dir": f"{root}/run",
            "data": {"uri": f"{root}/data"},
            "sampling": {"exclude_radius_m": 0.0},
        }
    )
    dataset = open_dataset(config.data.uri)
    split = TrainSplit.read(config, dataset)
    check_against_dataset(config, dataset, split)
    dataset.release_columns()


def convert_lists(root: str, kind: str) -> None:
    """Convert the folder by its lists."""
    from s4g_ray.datasets import folder

    fsspec.register_implementation("imaginary", ImaginaryFolders, clobber=True)
    folder.convert(
        root,
        f"{root}/made-{kind}",
        queries=f"queries.{kind}",
        references=f"references.{kind}",
        split_column="split",
        strict=True,
    )


def evaluate(root: str) -> None:
    """Score the test split from the parts of the embedding table."""
    from s4g_ray.evaluation.scores import score_tables

    dataset = open_dataset(f"{root}/gallery")
    uri = f"{root}/embeddings"
    score_tables(dataset, "test", uri, uri, stamp=STAMP, radii_m=(25, 50, 100))


def measure(step: Callable[..., None], *args: Any) -> dict[str, float]:
    """Call a step in this process; return its wall and processor seconds, and the peak memory."""
    before = time.process_time()
    started = time.perf_counter()
    step(*args)
    seconds = time.perf_counter() - started
    cpu = time.process_time() - before
    status = Path("/proc/self/status").read_text()
    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
    return {"seconds": seconds, "cpu_s": cpu, "peak_gb": peak_kb / 1e6}


def measure_count(root: str, count: int, num_test: int, dim: int) -> list[list[str]]:
    """Measure all steps with a number of rows a view: rows of the table."""
    from benchmarks.support.record import apart

    steps: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [
        ("write_dataset, iterators", write_rows, (count, num_test)),
        ("open", open_only, ()),
        ("open and checks of a run's start", start_run, ()),
        ("convert folder, CSV", convert_lists, ("csv",)),
        ("convert folder, Parquet", convert_lists, ("parquet",)),
        (f"evaluate {num_test:,} queries, D={dim}", evaluate, ()),
    ]
    apart(write_lists, root, count, num_test)
    rows: list[list[str]] = []
    for name, step, args in steps:
        if step is evaluate:
            apart(write_gallery, root, count, num_test)
            apart(write_embeddings, root, count, num_test, dim)
        found = apart(measure, step, root, *args)
        rows.append(
            [
                f"{count:,}",
                name,
                f"{found['seconds']:.1f} s",
                f"{found['cpu_s']:.1f} s",
                f"{found['peak_gb']:.2f} GB",
            ]
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and record."""
    from benchmarks.support.record import record

    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--name", default="dataset_scale")
    options = parser.parse_args()
    rows: list[list[str]] = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as root:
            rows += measure_count(root, count, options.queries, options.dim)
    record(
        options.name,
        title="Data sets of many rows",
        text=(
            "N places, a query and a reference each (2 N rows), without images: written from"
            " iterators of tables, opened and validated, opened and checked as a run's start does,"
            " and converted from lists of a folder whose listings cost nothing; then test queries"
            " in a gallery of N references, from the parts of a float16 table. Each in a process of"
            " its own. The peak includes the libraries. Targets at 10,000,000 rows: open 60 s"
            " and 2 GB, convert folder 180 s and 4 GB."
        ),
        command="python -m benchmarks.dataset_scale",
        columns=["N", "step", "wall", "processor", "peak memory"],
        rows=rows,
        config={"queries": options.queries, "D": options.dim},
        order=45,
    )


if __name__ == "__main__":
    main()
