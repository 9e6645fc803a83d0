"""Measure what a training rank holds of a data set, in a process of its own; print it as JSON.

    python -m benchmarks.support.rank_probe DATASET PLAN CACHE_DIR FORM... [--ranks 2] [--positions]

FORMS: `mapped`, tables as a rank opens them; `arrays`, the same tables in memory; `lists`, columns
as Python lists. Private bytes are those of pages that no other process maps: keep the tables mapped
by another process meanwhile, as another rank does. --positions: coordinates and sizes are read too,
as soft labels need them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from s4g_ray.data.dataset import open_dataset, write_dataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import list_image_files
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.batch_plan import BatchPlan, PlanStats, load_plan_share
from s4g_ray.data.tables.node_cache import open_image_tables
from s4g_ray.storage import files

BATCH = 128
SPLITS: Mapping[View, list[str]] = {"queries": ["train"], "references": ["train"]}
LOOKUPS = 200  # batches
SHARD = 10_000  # images


def write_places(folder: Path, count: int, *, packed: bool) -> str:
    """Write a data set of `count` places, without images; return its URI."""
    rng = np.random.default_rng(0)
    ids = np.arange(count)
    made = {}
    for view in ("references", "queries"):
        names = pa.array(ids // SHARD if packed else ids).cast(pa.string())
        start, end = (f"shards/{view}-", ".tar") if packed else (f"images/{view}/", ".jpg")
        columns: dict[str, Any] = {
            "id": np.cumsum(rng.integers(1, 9, count)),  # with gaps
            "place_id": ids,
            "uri": pc.binary_join_element_wise(start, pc.utf8_lpad(names, 9, "0"), end, ""),
            "lat": rng.uniform(-80, 80, count),
            "lon": rng.uniform(-180, 180, count),
            "split": pa.repeat("train", count),
        }
        if packed:
            columns["length"] = rng.integers(20_000, 90_000, count)
            columns["offset"] = ids % SHARD * 100_000
        if view == "queries":
            columns["heading_deg"] = rng.uniform(0, 360, count).astype(np.float32)
        else:
            columns["size_m"] = rng.uniform(50, 200, count).astype(np.float32)
        made[view] = pa.table(columns)
    write_dataset(str(folder / "data"), made["references"], made["queries"], name="places")
    return str(folder / "data")


def write_plan(folder: Path, count: int) -> str:
    """Write a plan of about `count` pairs; return its URI."""
    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.integers(1, 9, count))
    batches = rng.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)
    stats = PlanStats(count, batches.size, count - batches.size, 0.0)
    uri = str(folder / "plan.parquet")
    BatchPlan(batches, stats).save(uri, PairTable(ids, ids, ids))
    return uri


def read_private() -> int:
    """Return the private bytes of this process: those of pages that no other process maps."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
    return 1024 * sum(kilobytes)


def touch(tables: Mapping[View, ImageTable], *, positions: bool = False) -> int:
    """Read all that loading needs of all rows, as random access does in time; return the bytes.

    positions: coordinates and sizes too.
    """
    num_bytes = 0
    for table in tables.values():
        arrays: list[NDArray[Any]] = [table.ids, table.offsets, table.lengths, table.headings]
        arrays.extend([table.uris.heap, table.uris.bounds])
        if table.uris.codes is not None:
            arrays.append(table.uris.codes)
        if positions:
            arrays.extend([table.lat, table.lon, table.sizes])
        for array in arrays:
            array.sum()
            num_bytes += 0 if array.strides == (0,) else array.nbytes
    return num_bytes


def read_lists(uri: str) -> dict[View, list[Any]]:
    """Read tables with Python lists of paths, offsets and lengths, and a sorting of the ids."""
    dataset = open_dataset(uri)
    tables: dict[View, list[Any]] = {}
    for view, splits in SPLITS.items():
        columns = ["id", "place_id", "uri", "offset", "length", "lat", "lon", "region"]
        source = getattr(dataset, view)
        table = source.to_table(columns=columns, filter=pc.field("split").isin(splits))
        table = table.sort_by("id")
        tables[view] = [
            *(table[name].to_numpy() for name in ("id", "place_id", "lat", "lon")),
            [files.join(uri, path) for path in table["uri"].to_pylist()],
            *(table[name].to_pylist() for name in ("offset", "length", "region")),
            np.full(len(table), np.nan),
            np.argsort(table["id"].to_numpy(), kind="stable"),
        ]
    return tables


def measure(
    uri: str, plan: str, cache_dir: str, form: str, num_ranks: int, *, positions: bool = False
) -> dict[str, float]:
    """Measure bytes of all places, and seconds of opening and of looking a batch up.

    share: bytes of the plan's share alone, without what reading it left behind.
    """
    before = read_private()
    started = time.perf_counter()
    tables: Any
    if form == "mapped":
        tables = open_image_tables(uri, SPLITS, cache_dir)
    elif form == "arrays":
        dataset = open_dataset(uri)
        tables = {view: dataset.table(view, splits) for view, splits in SPLITS.items()}
    else:
        tables = read_lists(uri)
    found = {"open_s": time.perf_counter() - started, "shared": 0.0}
    if form != "lists":
        found["look_up_s"] = look_up(tables)
        found["shared"] = touch(tables, positions=positions) if form == "mapped" else 0
    found["tables"] = read_private() - before
    share = load_plan_share(plan, num_ranks, 0)
    found["plan"] = read_private() - before - found["tables"]
    found["share"] = sum(ids.nbytes for ids in share)
    del tables
    return found


def look_up(tables: Mapping[View, ImageTable]) -> float:
    """Return the median seconds of finding the files of a batch of random ids."""
    rng = np.random.default_rng(1)
    table = tables["queries"]
    times = []
    for _ in range(LOOKUPS):
        ids = table.ids[rng.integers(0, len(table), BATCH)]
        started = time.perf_counter()
        list_image_files(table, table.rows(ids).tolist())
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def main(arguments: list[str]) -> None:
    """Measure after a run over a small data set, which imports and starts what is lazy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset")
    parser.add_argument("plan")
    parser.add_argument("cache_dir")
    parser.add_argument("forms", nargs="+", choices=["mapped", "arrays", "lists"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--positions", action="store_true")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        small = (
            write_places(Path(folder), 20 * BATCH, packed=False),
            write_plan(Path(folder), 20 * BATCH),
        )
        for form in given.forms:
            measure(*small, folder, form, given.ranks)
    print(
        json.dumps(
            {
                form: measure(
                    given.dataset,
                    given.plan,
                    given.cache_dir,
                    form,
                    given.ranks,
                    positions=given.positions,
                )
                for form in given.forms
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
