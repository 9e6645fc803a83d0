"""`s4g pack`: a data set's images in tar shards, neighbors on the ground beside each other, resized if asked.

A shard holds images of one view and one split along a curve (curve.py). What it holds is a function of the data set,
its images as they can be read and the options, and so are its bytes: not of the number of threads, nor of how often
the work was cut off. How many images a shard has follows from the size of some that can be read: images that are mended
or replaced between two calls may change which shards there are.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from s4g_ray.data.dataset import GeoDataset, open_dataset, refuse_existing, write_dataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.data.images import READ_AT_ONCE
from s4g_ray.data.schema import SCHEMAS
from s4g_ray.datasets.packing.layout import PackOptions, Plan, Shard, plan_view, stored
from s4g_ray.datasets.packing.tar_shards import TarWriter, new_object, verify
from s4g_ray.errors import BadImageError, InputError, RunError, StoreError
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import read_ranges
from s4g_ray.storage.manifest import Manifest, Part, open_part, open_published, publish
from s4g_ray.storage.part_commits import WORK, read_commit, write_commit

SHARDS = "shards"  # the folder of shards, in that of the data set
KIND = "image shards"
OURS = re.compile(
    r"\.?(queries|references)-\w+-\d{5,}\.tar(\.\w+\.tmp)?"
)  # shards, and what a killed process left


@dataclass(frozen=True)
class Skipped:
    """A row that was left out, and why."""

    view: View
    id: int
    reason: str


@dataclass(frozen=True)
class Packed:
    """A data set that was packed."""

    dataset: GeoDataset
    num_images: int
    num_shards: int
    num_bytes: int  # of the shards
    skipped: tuple[Skipped, ...]
    reused_shards: int  # written before, by a call that was cut off or that had finished


@dataclass(frozen=True)
class _Written:
    """What was stored of a shard's images: offset and length, or what is wrong with one."""

    part: Part
    places: list[tuple[int, int] | str]

    @property
    def whole(self) -> bool:
        """Whether no image was left out."""
        return not any(isinstance(place, str) for place in self.places)

    @classmethod
    def from_json(cls, value: Any) -> _Written:
        places = [
            place if isinstance(place, str) else (place[0], place[1]) for place in value["places"]
        ]
        return cls(Part(**value["part"]), places)


@dataclass
class PackJob:
    """What the threads share."""

    target: str
    key: str
    options: PackOptions
    on_progress: Update
    total: int = 0  # images
    done: int = 0
    reused: int = 0  # shards
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, images: int, shards: int = 0) -> None:
        with self.lock:
            self.done, self.reused = self.done + images, self.reused + shards
            self.on_progress(self.done, self.total)

    @property
    def folder(self) -> str:
        """That of the shards."""
        return files.join(self.target, SHARDS)


def pack(
    source: str,
    target: str,
    options: PackOptions | None = None,
    *,
    num_threads: int | None = None,
    on_progress: Update = ignore,
) -> Packed:
    """Write a data set whose images lie in the tar files TARGET/shards; rows and ids are those of the source.

    Each file is read back when it is written: every image's byte range must hold what was read from the source (or
    what it was resized to). A call that was cut off goes on where it was when it is made again; one that had finished
    returns what is there. `on_progress` counts images, from several threads. Raises InputError for a data set that
    open_dataset refuses and for a target that holds something else, BadImageError unless bad images are skipped,
    RunError for a store that fails.
    """
    options, target = options or PackOptions(), files.absolute(target)
    dataset = open_dataset(source)
    same = replace(options, on_bad_image="fail")  # it may be changed, to go on after a bad image
    key = files.fingerprint(repr((dataset.fingerprint, same)).encode())
    job = PackJob(target, key, options, on_progress)
    if files.exists(files.join(target, "dataset.json")) and (finished := _finished(job)):
        return finished
    _claim(job, dataset)
    num_threads = num_threads or len(os.sched_getaffinity(0))
    tables = {view: _table(dataset, view) for view in VIEWS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # an image is resized by the thread that has it
    try:
        plans = {view: plan_view(tables[view], dataset.uri, view, options) for view in VIEWS}
        shards = [shard for plan in plans.values() for shard in plan.shards]
        if not shards:
            raise InputError(f"{dataset.uri} holds no image")
        written = _write_all(job, shards, num_threads)
    finally:
        torch.set_num_threads(threads)
    return _publish(job, dataset, tables, plans, written)


def _finished(job: PackJob) -> Packed | None:
    """What an earlier call has finished with the same, if it has.

    Raises RunError when a shard of it is lost, StoreError when the store does not tell.
    """
    try:
        manifest = open_published(job.folder, KIND)
    except StoreError:
        raise
    except RunError:
        return None
    if manifest.info["key"] != job.key or (
        manifest.info["skipped"] and job.options.on_bad_image == "fail"
    ):
        return None
    for part in manifest.parts:
        open_part(job.folder, part).close()
    files.remove(files.join(job.target, WORK))
    return _packed(job.target, manifest, len(manifest.parts))


def _packed(target: str, manifest: Manifest, reused: int) -> Packed:
    num_bytes, info = sum(part.num_bytes for part in manifest.parts), manifest.info
    skipped = tuple(Skipped(**row) for row in info["skipped"])
    return Packed(
        open_dataset(target), info["images"], len(manifest.parts), num_bytes, skipped, reused
    )


def _claim(job: PackJob, dataset: GeoDataset) -> None:
    """Say in the target what is being packed there.

    Raises InputError when it is, or was, something else, StoreError when the store does not tell.
    """
    if f"{job.target}/".startswith(f"{dataset.uri}/"):
        raise InputError(
            f"{job.target} lies in the data set that is to be packed; choose a folder outside of it"
        )
    refuse_existing(job.target)
    uri = files.join(job.target, WORK, "pack.json")
    wanted: dict[str, Any] = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "options": asdict(job.options),
        "key": job.key,
    }
    try:
        found = files.read_json(uri)
        if found["key"] != job.key:
            theirs, ours = (f"{of['name']} ({of['fingerprint'][:8]})" for of in (found, wanted))
            changed = _differing(found["options"], wanted["options"])
            raise InputError(
                f"{job.target} holds a part of data set {theirs}{changed[0]}, but {ours}{changed[1]} is asked for; give"
                " the same again to go on, remove the folder, or choose another"
            )
    except StoreError:
        raise
    except FileNotFoundError:  # nobody's
        there = [
            name for name in files.list_names(job.target) if not re.fullmatch(r"\..*\.tmp", name)
        ]
        if set(there) - {WORK}:
            raise InputError(
                f"{job.target} is not empty, and was not begun by s4g pack; choose another folder"
            ) from None
    except (RunError, KeyError, TypeError, AttributeError):  # cut short or altered
        pass
    files.write_json(uri, wanted)


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, str]:
    """` with KEY=VALUE, ...` of both, for the options in which they differ."""
    as_json = json.loads(json.dumps(ours))
    keys = [key for key in as_json if key != "on_bad_image" and theirs.get(key) != as_json[key]]
    told = [", ".join(f"{key}={of.get(key)}" for key in keys) for of in (theirs, as_json)]
    return (f" with {told[0]}", f" with {told[1]}") if keys else ("", "")


def _table(dataset: GeoDataset, view: View) -> pa.Table:
    source = dataset.queries if view == "queries" else dataset.references
    return source.to_table(columns=SCHEMAS[view].names)


# The work.


def _write_all(job: PackJob, shards: Sequence[Shard], num_threads: int) -> list[_Written]:
    """Write the shards, several at a time; after the first that fails, the others stop at their next images."""
    job.total = sum(len(shard.ids) for shard in shards)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="pack") as pool:
        futures = [pool.submit(_write_shard, job, shard) for shard in shards]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if failed := [f for f in futures if f in done and f.exception()]:
                failed[0].result()
            return [future.result() for future in futures]
        finally:
            job.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _write_shard(job: PackJob, shard: Shard) -> _Written:
    """A shard as an earlier call committed it, or written, read back and committed now.

    One without some images is always written: they may have been mended.
    """
    commit = files.join(job.target, WORK, f"{shard.name}.json")
    key = files.fingerprint(repr((job.key, shard)).encode())
    found = read_commit(commit, key, _Written.from_json, lambda _: ())  # its file was verified then
    if found is not None and found.whole and _is_there(job.folder, found.part):
        job.advance(len(shard.ids), shards=1)
        return found
    uri = files.join(job.folder, shard.name)
    places: list[tuple[int, int] | str] = []
    with new_object(uri) as file:
        tar = TarWriter(file)
        for id_, made in _contents(job, shard):
            if isinstance(made, str):
                places.append(made)
                continue
            member = tar.add(f"{shard.view}/{id_:09d}.{made[1]}", made[0])
            places.append((member.offset, member.length))
        sha256 = tar.close()
    verify(uri, tar.num_bytes, sha256, tar.members)
    written = _Written(Part(shard.name, len(tar.members), tar.num_bytes, sha256), places)
    write_commit(commit, key, written)
    return written


def _is_there(folder: str, part: Part) -> bool:
    try:
        open_part(folder, part).close()
    except StoreError:
        raise
    except RunError:  # removed, or cut short
        return False
    return True


def _contents(job: PackJob, shard: Shard) -> Iterator[tuple[int, tuple[bytes, str] | str]]:
    """Id of each image of a shard, and what is stored of it (bytes and extension), or what is wrong with it.

    Raises BadImageError for a bad one unless they are skipped, and RunError when the work was given up.
    """
    for start in range(0, len(shard.ids), READ_AT_ONCE):
        found = read_ranges(shard.ranges[start : start + READ_AT_ONCE])
        for number, data in enumerate(found, start):
            if job.stopped.is_set():
                raise RunError(f"{shard.name} was given up")
            made = stored(data, shard.view, job.options)
            if isinstance(made, str):
                made = f"id {shard.ids[number]}, {shard.ranges[number][0]}: {made}"
                if job.options.on_bad_image == "fail":
                    raise BadImageError(
                        f"{shard.view}: {made}; mend the image, or leave it out: --on-bad-image skip"
                    )
            yield shard.ids[number], made
            job.advance(1)


# The data set.


def _publish(
    job: PackJob,
    dataset: GeoDataset,
    tables: dict[View, pa.Table],
    plans: dict[View, Plan],
    written: Sequence[_Written],
) -> Packed:
    made: dict[View, pa.Table] = {}
    skipped: list[Skipped] = []
    remaining = iter(written)
    for view in VIEWS:
        of_view = [next(remaining) for _ in plans[view].shards]
        made[view], bad = _packed_table(tables[view], view, plans[view], of_view)
        skipped += bad
    made["queries"], lonely = _with_train_reference(made["queries"], made["references"])
    skipped += lonely
    if skipped and not len(made["references"]):
        raise BadImageError(f"no image is left to pack; the first: {skipped[0].reason}")
    info = {
        "key": job.key,
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "options": asdict(job.options),
        "images": sum(w.part.rows for w in written),
        "skipped": [asdict(row) for row in skipped],
    }
    _remove_others(job.folder, {w.part.name for w in written})
    manifest = publish(job.folder, KIND, [w.part for w in written], info=info)
    write_dataset(
        job.target,
        made["references"],
        made["queries"],
        name=dataset.name,
        views=dataset.views or None,
    )
    files.remove(files.join(job.target, WORK))
    return _packed(job.target, manifest, job.reused)


def _remove_others(folder: str, names: set[str]) -> None:
    """Remove shards of attempts that made others, and files that were being written; other files are not ours."""
    for name in files.list_names(folder):
        if name not in names and OURS.fullmatch(name):
            files.remove(files.join(folder, name))


def _packed_table(
    table: pa.Table, view: View, plan: Plan, written: Sequence[_Written]
) -> tuple[pa.Table, list[Skipped]]:
    """The rows with their images' places in the shards, without those whose image is bad, which are told."""
    places = [written[s].places[n] for s, n in zip(plan.shard_of, plan.number_of, strict=True)]
    good = np.array([not isinstance(place, str) for place in places], np.bool_)
    ids = table["id"].to_pylist()
    skipped = [
        Skipped(view, ids[row], place) for row, place in enumerate(places) if isinstance(place, str)
    ]
    names = [f"{SHARDS}/{w.part.name}" for w in written]
    kept = [place for place in places if not isinstance(place, str)]
    columns = {
        "uri": pa.array([names[s] for s in plan.shard_of[good]], pa.string()),
        "offset": pa.array([offset for offset, _ in kept], pa.int64()),
        "length": pa.array([length for _, length in kept], pa.int64()),
    }
    table = table.filter(pa.array(good))
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table, skipped


def _with_train_reference(
    queries: pa.Table, references: pa.Table
) -> tuple[pa.Table, list[Skipped]]:
    """The queries that a data set may hold now that references were left out, and the others."""
    there = references.filter(pc.field("split") == "train")["place_id"].combine_chunks()
    kept = pc.or_(
        pc.not_equal(queries["split"], "train"), pc.is_in(queries["place_id"], value_set=there)
    )
    lost = queries.filter(pc.invert(kept))["id"].to_pylist()
    reason = "no train reference of its place could be packed"
    return queries.filter(kept), [Skipped("queries", id_, f"id {id_}: {reason}") for id_ in lost]
