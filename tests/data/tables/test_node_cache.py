"""Image tables that the processes of a node share, against those read into memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.support.rank_probe import SPLITS, touch, write_places, write_plan
from s4g_ray.config.data_schema import AugmentConfig, DataConfig, ImageOptions
from s4g_ray.data.dataset import GeoDataset, open_dataset, write_dataset
from s4g_ray.data.image_table import VIEWS, ImageTable, View
from s4g_ray.data.pair_loader import PairLoader
from s4g_ray.data.pixels.image_values import ImageValues
from s4g_ray.data.tables import node_cache
from s4g_ray.data.tables.node_cache import (
    TableSource,
    build_tables,
    make_cache_folder,
    open_image_tables,
)
from s4g_ray.data.tables.text_column import TextColumn
from s4g_ray.errors import InputError, RunError, WriteError
from s4g_ray.storage import files
from tests.conftest import SIZE, tables
from tests.support.faulty_s3 import Store
from tests.support.resealed import reseal

WANTED: dict[View, list[str]] = {"queries": ["train"], "references": ["train", "gallery"]}


class Builds:
    """Stands for the pool of the process that builds: builds in this process, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.dies = False
        self.lock = threading.Lock()

    def __call__(self, *_: Any, **__: Any) -> Builds:
        return self

    def __enter__(self) -> Builds:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function at once, and keep its error."""
        future: Future[Any] = Future()
        with self.lock:
            self.count += 1
        try:
            if self.dies:
                raise BrokenProcessPool
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    made = Builds()
    monkeypatch.setattr(node_cache, "ProcessPoolExecutor", made)
    monkeypatch.setattr(node_cache, "SMALL_BYTES", 0)
    return made


@pytest.fixture
def dataset(tmp_path: Path) -> GeoDataset:
    """A data set of all kinds of rows, in disorder."""
    rng = np.random.default_rng(0)
    made: dict[str, pa.Table] = {}
    for view, table in zip(VIEWS, tables(40), strict=True):
        ids = rng.permutation(40) * 3
        is_packed = ids % 2 == 0
        uris = np.where(is_packed, "shards/1.tar", [f"/a/{i}" for i in ids])
        others = ["gallery", "test"] if view == "references" else ["test", "test"]
        made[view] = pa.table(
            {
                **{name: table[name] for name in ("place_id", "lat", "lon")},
                "id": ids,
                "uri": pa.array(uris.tolist()),
                "offset": pa.array(ids * 10**9, mask=~is_packed),
                "length": pa.array(ids + 1, mask=~is_packed),
                "split": ["train"] * 30 + others * 5,
                "region": [None, "x"] * 20,
            }
        )
    headings = pa.array(rng.uniform(0, 360, 40).astype(np.float32), mask=np.arange(40) % 7 == 0)
    queries = made["queries"].append_column("heading_deg", headings)
    sizes = pa.array(rng.choice([60.0, 120.0], 40).astype(np.float32), mask=np.arange(40) % 9 == 0)
    references = made["references"].append_column("size_m", sizes)
    return write_dataset(str(tmp_path / "data"), references, queries, name="mixed")


def assert_equal(found: ImageTable, wanted: ImageTable) -> None:
    for field in fields(ImageTable):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(other, TextColumn):
            assert list(one) == list(other), field.name
        elif isinstance(other, ImageValues):
            assert one == other
        else:
            assert one.dtype == other.dtype, field.name
            np.testing.assert_array_equal(one, other, field.name)


def find_sources(uri: str) -> list[TableSource]:
    found = [TableSource.find(uri, view, splits) for view, splits in WANTED.items()]
    return [source for source in found if source is not None]


def test_tables_of_other_image_options_are_others(dataset: GeoDataset, tmp_path: Path) -> None:
    """The folder of the images, and how their values are shown, are kept in mapped tables."""
    plain = open_image_tables(dataset.uri, WANTED, str(tmp_path))["queries"]
    images = ImageOptions(str(tmp_path / "elsewhere"), "0,3000", (4, 3, 2))
    for _ in range(2):  # built, and mapped again
        found = open_image_tables(dataset.uri, WANTED, str(tmp_path), images)["queries"]
        assert found.values == ImageValues("0,3000", (4, 3, 2))
        assert_equal(found, open_dataset(dataset.uri, images).table("queries", ["train"]))
    assert (plain.values, plain.uris[0]) != (found.values, found.uris[0])


def list_tables(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("s4g-ray-*/*") if path.is_dir())


def test_mapped_tables_equal_those_in_memory_and_are_built_once(
    dataset: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    cache = str(tmp_path / "cache")
    for _ in range(2):
        found = open_image_tables(dataset.uri, WANTED, cache)
        for view, splits in WANTED.items():
            assert_equal(found[view], dataset.table(view, splits))
    swapped = {"references": ["gallery", "train"], "queries": ["train"]}
    found = open_image_tables(dataset.uri, swapped, cache)  # type: ignore[arg-type]
    assert builds.count == 1
    assert_equal(found["references"], dataset.table("references", ["train", "gallery"]))
    with pytest.raises(ValueError, match="read-only"):
        found["references"].ids[0] = 1
    open_image_tables(dataset.uri, {"queries": ["test"]}, cache)
    assert builds.count == 2
    assert len(list_tables(tmp_path / "cache")) == 3


def test_rows_of_a_mapped_table_are_found_by_id_and_unknown_ids_refused(
    dataset: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    table = open_image_tables(dataset.uri, WANTED, str(tmp_path))["references"]
    ids = np.random.default_rng(0).permutation(table.ids)
    shuffled = table.take(table.rows(ids))
    for made in (table, shuffled):
        assert np.array_equal(made.ids[made.rows(ids)], ids)
        assert made.rows(ids[:0]).tolist() == []
        for unknown in (-1, 1, 10**12):
            with pytest.raises(KeyError, match=str(unknown)):
                made.rows(np.array([ids[0], unknown]))
    with pytest.raises(KeyError, match="3"):
        table.take(ids[:0]).rows(np.array([3]))


def test_a_part_of_a_mapped_table_is_sent_without_the_other_rows(
    dataset: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    table = open_image_tables(dataset.uri, WANTED, str(tmp_path))["references"]
    part = table.take(slice(5, 9))
    assert_equal(part, table.take(np.arange(5, 9)))
    data = pickle.dumps(part)
    assert_equal(pickle.loads(data), part)
    lengths = [len(uri) - len(part.uris.prefix) for uri in part.uris]
    assert len(pickle.loads(data).uris.heap) == sum(lengths)
    assert not np.shares_memory(table.take(np.arange(5, 9)).ids, table.ids)
    assert np.shares_memory(part.ids, table.ids)


def test_processes_that_start_together_build_once(
    dataset: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    with ThreadPoolExecutor(6) as pool:
        opened = list(
            pool.map(lambda _: open_image_tables(dataset.uri, WANTED, str(tmp_path)), range(6))
        )
    assert builds.count == 1
    for found in opened:
        assert_equal(found["queries"], dataset.table("queries", ["train"]))


def test_a_process_of_its_own_builds(
    dataset: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache, "SMALL_BYTES", 0)
    found = open_image_tables(dataset.uri, {"queries": ["train"]}, str(tmp_path))
    assert_equal(found["queries"], dataset.table("queries", ["train"]))


def test_a_small_data_set_is_read_into_memory_and_a_missing_one_is_refused(
    dataset: GeoDataset, tmp_path: Path
) -> None:
    found = open_image_tables(dataset.uri, WANTED, str(tmp_path / "cache"))
    assert_equal(found["queries"], dataset.table("queries", ["train"]))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match=r"no data set at .*dataset\.json is missing"):
        open_image_tables(str(tmp_path / "none"), WANTED)
    shutil.rmtree(Path(dataset.uri) / "queries")
    with pytest.raises(
        InputError, match=r"queries/part-00000\.parquet, a part of .* rows, is missing"
    ):
        open_image_tables(dataset.uri, WANTED)


def test_a_changed_data_set_is_read_and_validated_again_and_its_earlier_table_removed(
    dataset: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    cache = tmp_path / "cache"
    before = open_image_tables(dataset.uri, WANTED, str(cache))["queries"]
    names = list_tables(cache)
    part = Path(dataset.uri) / "queries/part-00000.parquet"
    table = pq.read_table(part)
    column = table.column_names.index("uri")
    moved = pa.array([f"elsewhere/{i}" for i in range(40)])
    pq.write_table(table.set_column(column, "uri", moved), part)
    reseal(dataset.uri)
    after = open_image_tables(dataset.uri, WANTED, str(cache))["queries"]
    assert_equal(after, open_dataset(dataset.uri).table("queries", ["train"]))
    assert builds.count == 2
    assert len(set(list_tables(cache)) - set(names)) == 2  # dataset.json lists the parts of both
    assert len(list_tables(cache)) == 2
    assert before.uris[0] not in list(after.uris)  # still mapped, though its files are removed
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(InputError, match="it was cut off or altered"):
        open_image_tables(dataset.uri, WANTED, str(cache))


@pytest.mark.parametrize("damage", ["cut", "missing", "header", "other"])
def test_a_damaged_table_is_built_again(
    dataset: GeoDataset, tmp_path: Path, builds: Builds, damage: str
) -> None:
    open_image_tables(dataset.uri, WANTED, str(tmp_path))
    for header in tmp_path.glob("s4g-ray-*/*/table.json"):
        ids = header.with_name("ids.npy")
        if damage == "cut":
            ids.write_bytes(ids.read_bytes()[:-8])
        elif damage == "missing":
            ids.unlink()
        elif damage == "header":
            header.write_text(header.read_text()[:-20])
        else:
            np.save(ids, np.arange(7))
    found = open_image_tables(dataset.uri, WANTED, str(tmp_path))
    assert builds.count == 2
    assert_equal(found["queries"], dataset.table("queries", ["train"]))


def test_what_nobody_uses_and_what_was_not_finished_is_removed(
    dataset: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    folder = make_cache_folder(str(tmp_path))
    source = find_sources(dataset.uri)[0]
    days_old = {"0ld-table": 31, "0ld.lock": 31, "other-table": 29, "other.lock": 29}
    unfinished = folder / f"{source.locate(folder).name}-12345678"
    unfinished.mkdir()
    for name, days in days_old.items():
        path = folder / name
        if path.suffix:
            path.touch()
        else:
            path.mkdir()
        used = path.stat().st_mtime - days * 86_400
        os.utime(path, (used, used))
    open_image_tables(dataset.uri, WANTED, str(tmp_path))
    left = {path.name for path in folder.iterdir()}
    assert left & days_old.keys() == {"other-table", "other.lock"}
    assert not unfinished.exists()
    assert {"README.txt", *(s.locate(folder).name for s in find_sources(dataset.uri))} <= left


def test_opening_a_table_marks_it_as_used(
    dataset: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    open_image_tables(dataset.uri, WANTED, str(tmp_path))
    headers = list(tmp_path.glob("s4g-ray-*/*/table.json"))
    for header in headers:
        os.utime(header, (1, 1))
    open_image_tables(dataset.uri, WANTED, str(tmp_path))
    assert all(header.stat().st_mtime > 1 for header in headers)


def test_a_cache_folder_that_others_may_write_is_refused(
    dataset: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    """Otherwise another user of the machine could choose the images that a run reads."""
    folder = make_cache_folder(str(tmp_path))
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(InputError, match=r"others may write into .*set data\.cache_dir"):
        open_image_tables(dataset.uri, WANTED, str(tmp_path))
    folder.chmod(0o700)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="others may write into"):
        open_image_tables(dataset.uri, WANTED, str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make the cache folder .*data\.cache_dir"):
        open_image_tables(dataset.uri, WANTED, str(tmp_path / "file"))


def test_a_full_disk_and_a_dead_builder_are_errors_with_their_remedy(
    dataset: GeoDataset, tmp_path: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(WriteError, match=r"1 kB left; make room, or set data\.cache_dir"):
            open_image_tables(dataset.uri, WANTED, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(WriteError, match="No space left on device; make room"):
            open_image_tables(dataset.uri, WANTED, str(tmp_path))
    assert list_tables(tmp_path) == []
    builds.dies = True
    with pytest.raises(RunError, match=r"the process that builds .*died; give the node more mem"):
        open_image_tables(dataset.uri, WANTED, str(tmp_path))


def full_disk(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_data_set_that_changes_while_it_is_read_is_refused(
    dataset: GeoDataset, tmp_path: Path
) -> None:
    (source, *_) = find_sources(dataset.uri)
    with pytest.raises(RunError, match="was changed while it was read"):
        build_tables(make_cache_folder(str(tmp_path)), [replace(source, state="0" * 64)])
    assert list_tables(tmp_path) == []


def test_a_relative_or_remote_cache_folder_is_refused() -> None:
    for cache_dir in ("cache", "s3://bucket/cache"):
        with pytest.raises(ValueError, match="is no absolute local path"):
            DataConfig(uri="x", cache_dir=cache_dir)


def test_batches_from_mapped_tables_are_those_from_memory(
    synthetic: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    sizes = {"uri": "x", "query_size": (SIZE, SIZE), "reference_size": (SIZE, SIZE)}
    mapped = open_image_tables(synthetic.uri, SPLITS, str(tmp_path))
    batches = []
    for made in (mapped, {view: synthetic.table(view, ["train"]) for view in VIEWS}):
        data = DataConfig.model_validate(sizes)
        loader = PairLoader(made["queries"], made["references"], data, AugmentConfig(), seed=1)
        with loader:
            batches += list(loader.load(np.array([[3, 50]]), np.array([[3, 50]]), epoch=1))
    assert bool((batches[0].queries == batches[1].queries).all())
    assert bool((batches[0].references == batches[1].references).all())


@pytest.mark.s3
def test_tables_of_an_object_store_are_mapped_without_reading_the_data_set_again(
    store: Store, synthetic: GeoDataset, tmp_path: Path, builds: Builds
) -> None:
    uri = "s3://data/synthetic"
    open_image_tables(uri, SPLITS, str(tmp_path))
    store.proxy.reset()
    found = open_image_tables(uri, SPLITS, str(tmp_path))
    assert not [key for _, key in store.proxy.requests if key.endswith(".parquet")]
    assert builds.count == 1
    assert list(found["queries"].uris)[5] == f"{uri}/images/queries/5.png"
    assert_equal(found["references"], open_dataset(uri).table("references", ["train"]))
    contents = files.read_bytes(f"{uri}/queries/part-00000.parquet")
    files.write_bytes(f"{uri}/queries/part-00000.parquet", contents + b"cut off")
    try:
        with pytest.raises(InputError, match="it was cut off or altered"):
            open_image_tables(uri, SPLITS, str(tmp_path))
    finally:
        files.write_bytes(f"{uri}/queries/part-00000.parquet", contents)


@pytest.mark.parametrize("packed", [False, True])
def test_a_rank_holds_at_most_32_bytes_a_place(tmp_path: Path, packed: bool) -> None:
    """In a process of its own, while this one has the tables mapped as another rank has."""
    count = 100_000
    num_pairs = 1_000_000  # reading any plan leaves about 5 MB behind
    uri = write_places(tmp_path, count, packed=packed)
    plan = write_plan(tmp_path, num_pairs)
    sources = [TableSource.find(uri, view, splits) for view, splits in SPLITS.items()]
    folder = make_cache_folder(str(tmp_path))
    build_tables(folder, [source for source in sources if source is not None])
    opened = open_image_tables(uri, SPLITS, str(tmp_path))
    assert touch(opened, positions=True) > touch(opened) + 32 * count
    assert touch(opened) > 32 * count
    command = [sys.executable, "-m", "benchmarks.support.rank_probe", uri, plan, str(tmp_path)]
    done = subprocess.run(
        [*command, "mapped", "arrays", "--positions"], check=True, stdout=subprocess.PIPE
    )
    found = json.loads(done.stdout)
    held = found["mapped"]
    assert held["share"] == pytest.approx(num_pairs * 16 / 2, rel=0.01)  # of two ranks
    assert held["plan"] > held["share"] / 2
    assert held["tables"] / count + held["plan"] / num_pairs <= 32
    assert found["arrays"]["tables"] / count > 40  # of tables in memory the probe sees that much
