"""Pack a data set's images into tar shards, neighbors on the ground next to each other.

A shard holds images of one view and one split, in the order of a curve (s2_curve.py). Its bytes are
a function of the data set, its images as they can be read, and the options; not of the number of
threads, nor of interruptions. The number of images of a shard is computed from the sizes of a
sample of readable images: fixing or replacing images between two calls may change which shards
there are.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

import pyarrow as pa

from s4g_ray.data.dataset import GeoDataset, open_dataset, refuse_existing, write_dataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.data.images import READ_AT_ONCE
from s4g_ray.data.pixels.image_values import ImageValues
from s4g_ray.data.schema import OPTIONAL, SCHEMAS
from s4g_ray.datasets.packing.layout import (
    PackOptions,
    Plan,
    Shard,
    encode_stored,
    plan_view,
)
from s4g_ray.datasets.packing.packed_tables import (
    SHARDS,
    Skipped,
    WrittenShard,
    make_packed_tables,
)
from s4g_ray.datasets.packing.tar_shards import new_object, verify
from s4g_ray.errors import BadImageError, InputError, RunError, StoreError
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files
from s4g_ray.storage.byte_ranges import read_ranges
from s4g_ray.storage.manifest import Manifest, Part, open_part, open_published, publish
from s4g_ray.storage.part_commits import WORK, read_commit, write_commit
from s4g_ray.storage.tar_writer import TarWriter

KIND = "image shards"
# names of shards, and of the files that a killed process leaves
OURS = re.compile(r"\.?(queries|references)-\w+-\d{5,}\.tar(\.\w+\.tmp)?")


@dataclass(frozen=True)
class Packed:
    """A packed data set."""

    dataset: GeoDataset
    num_images: int
    num_shards: int
    num_bytes: int  # of the shards
    skipped: tuple[Skipped, ...]
    reused_shards: int  # written by an earlier call, interrupted or finished


@dataclass
class PackJob:
    """The state that the threads share."""

    target: str
    key: str  # a fingerprint of the data set and the options
    options: PackOptions
    on_progress: Update
    values: ImageValues  # of the images that are read
    total: int = 0  # images
    done: int = 0  # images
    reused: int = 0  # shards
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, images: int, shards: int = 0) -> None:
        """Count finished images and reused shards, and report the progress."""
        with self.lock:
            self.done += images
            self.reused += shards
            self.on_progress(self.done, self.total)

    @property
    def folder(self) -> str:
        """The folder of the shards."""
        return files.join(self.target, SHARDS)


def pack(
    source: str,
    target: str,
    options: PackOptions | None = None,
    *,
    num_threads: int | None = None,
    on_progress: Update = ignore,
) -> Packed:
    """Write a data set whose images are in the tar files TARGET/shards, with the source's rows.

    Reads each shard back after writing it, and compares every image's byte range with the bytes
    that were read from the source (or resized). Calling it again resumes an interrupted call, and
    returns the result of a finished one. `on_progress` counts images, from several threads. Raises
    InputError for the errors of open_dataset and for a target that holds something else,
    BadImageError unless bad images are skipped, and RunError for a store that fails.
    """
    options = options or PackOptions()
    target = files.absolute(target)
    dataset = open_dataset(source)
    # without on_bad_image, which may change between calls to resume after a bad image
    keyed_options = replace(options, on_bad_image="fail")
    key = files.fingerprint(repr((dataset.fingerprint, keyed_options)).encode())
    job = PackJob(target, key, options, on_progress, dataset.values)
    if files.exists(files.join(target, "dataset.json")):
        finished = _find_finished(job)
        if finished is not None:
            return finished
    _claim_target(job, dataset)
    num_threads = num_threads or len(os.sched_getaffinity(0))
    tables = {view: _read_table(dataset, view) for view in VIEWS}
    with _single_torch_thread():  # each image is resized by one thread of the pool
        plans = {
            view: plan_view(tables[view], dataset.images_root, view, options, dataset.values)
            for view in VIEWS
        }
        shards = [shard for plan in plans.values() for shard in plan.shards]
        if not shards:
            raise InputError(f"{dataset.uri} holds no image")
        written = _write_shards(job, shards, num_threads)
    return _publish(job, dataset, tables, plans, written)


@contextmanager
def _single_torch_thread() -> Iterator[None]:
    import torch  # takes seconds: errors of the input come before

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _find_finished(job: PackJob) -> Packed | None:
    """Return the result of an earlier call that finished the same work, if there is one.

    Raises RunError when a shard of it is lost, StoreError when the store does not answer.
    """
    try:
        manifest = open_published(job.folder, KIND)
    except StoreError:
        raise
    except RunError:
        return None
    if manifest.info["key"] != job.key:
        return None
    if manifest.info["skipped"] and job.options.on_bad_image == "fail":
        return None
    for part in manifest.parts:
        open_part(job.folder, part).close()
    files.remove(files.join(job.target, WORK))
    return _open_packed(job.target, manifest, len(manifest.parts))


def _open_packed(target: str, manifest: Manifest, reused: int) -> Packed:
    return Packed(
        dataset=open_dataset(target),
        num_images=manifest.info["images"],
        num_shards=len(manifest.parts),
        num_bytes=sum(part.num_bytes for part in manifest.parts),
        skipped=tuple(Skipped(**row) for row in manifest.info["skipped"]),
        reused_shards=reused,
    )


def _claim_target(job: PackJob, dataset: GeoDataset) -> None:
    """Write in the target what is being packed there.

    Raises InputError when the target holds, or was claimed for, something else; StoreError when the
    store does not answer.
    """
    if f"{job.target}/".startswith(f"{dataset.uri}/"):
        raise InputError(
            f"{job.target} is inside the data set to be packed; choose a folder outside of it"
        )
    refuse_existing(job.target)
    uri = files.join(job.target, WORK, "pack.json")
    claim: dict[str, Any] = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "options": asdict(job.options),
        "key": job.key,
    }
    try:
        found = files.read_json(uri)
        if found["key"] != job.key:
            _refuse_claim(job.target, found, claim)
    except StoreError:
        raise
    except FileNotFoundError:  # not claimed yet
        _check_empty(job.target)
    except (RunError, KeyError, TypeError, AttributeError):  # truncated or altered: claim it anew
        pass
    files.write_json(uri, claim)


def _refuse_claim(target: str, found: dict[str, Any], wanted: dict[str, Any]) -> NoReturn:
    """Raise InputError with both data sets, and the options in which the two claims differ."""
    found_options, wanted_options = _describe_differences(found["options"], wanted["options"])
    found_name = f"{found['name']} ({found['fingerprint'][:8]})"
    wanted_name = f"{wanted['name']} ({wanted['fingerprint'][:8]})"
    raise InputError(
        f"{target} holds a part of data set {found_name}{found_options}, but"
        f" {wanted_name}{wanted_options} is asked for; give the same again to resume, remove the"
        " folder, or choose another"
    )


def _describe_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, str]:
    """Return ` with KEY=VALUE, ...` of both, for the options in which they differ."""
    as_json = json.loads(json.dumps(wanted))
    keys = [key for key in as_json if key != "on_bad_image" and found.get(key) != as_json[key]]
    if not keys:
        return "", ""
    of_found = ", ".join(f"{key}={found.get(key)}" for key in keys)
    of_wanted = ", ".join(f"{key}={as_json.get(key)}" for key in keys)
    return f" with {of_found}", f" with {of_wanted}"


def _check_empty(target: str) -> None:
    """Raise InputError when a folder holds anything but temporary files and the work folder."""
    if set(files.list_content(target)) - {WORK}:
        raise InputError(
            f"{target} is not empty, and was not begun by s4g pack; choose another folder"
        )


def _read_table(dataset: GeoDataset, view: View) -> pa.Table:
    source = dataset.queries if view == "queries" else dataset.references
    table = source.to_table(columns=[*SCHEMAS[view].names, *OPTIONAL[view].names])
    unknown = [name for name in OPTIONAL[view].names if table[name].null_count == len(table)]
    return table.drop(unknown)


def _write_shards(job: PackJob, shards: Sequence[Shard], num_threads: int) -> list[WrittenShard]:
    """Write the shards, several at a time. After the first error the others stop at an image."""
    job.total = sum(len(shard.ids) for shard in shards)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="pack") as pool:
        futures = [pool.submit(_write_shard, job, shard) for shard in shards]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            job.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _write_shard(job: PackJob, shard: Shard) -> WrittenShard:
    """Return a shard that an earlier call committed; or write it, read it back and commit it.

    A shard without some of its images is always written again: they may be fixed by now.
    """
    commit = files.join(job.target, WORK, f"{shard.name}.json")
    key = files.fingerprint(repr((job.key, shard)).encode())
    # `lambda`: no files to check here, the shard was verified when it was written
    found = read_commit(commit, key, WrittenShard.from_json, lambda _: ())
    if found is not None and found.is_whole and _has_part(job.folder, found.part):
        job.advance(len(shard.ids), shards=1)
        return found
    uri = files.join(job.folder, shard.name)
    places: list[tuple[int, int] | str] = []
    with new_object(uri) as file:
        tar = TarWriter(file)
        for image_id, stored in _read_images(job, shard):
            if isinstance(stored, str):
                places.append(stored)
                continue
            data, extension = stored
            member = tar.add(f"{shard.view}/{image_id:09d}.{extension}", data)
            places.append((member.offset, member.length))
        sha256 = tar.close()
    verify(uri, tar.num_bytes, sha256, tar.members)
    written = WrittenShard(Part(shard.name, len(tar.members), tar.num_bytes, sha256), places)
    write_commit(commit, key, written)
    return written


def _has_part(folder: str, part: Part) -> bool:
    try:
        open_part(folder, part).close()
    except StoreError:
        raise
    except RunError:  # removed or truncated
        return False
    return True


def _read_images(job: PackJob, shard: Shard) -> Iterator[tuple[int, tuple[bytes, str] | str]]:
    """Yield the id of each image of a shard, and its bytes and extension, or why it is bad.

    Raises BadImageError for a bad image unless they are skipped, and RunError when another shard
    has failed.
    """
    for start in range(0, len(shard.ids), READ_AT_ONCE):
        found = read_ranges(shard.ranges[start : start + READ_AT_ONCE])
        for number, data in enumerate(found, start):
            if job.stopped.is_set():
                raise RunError(f"{shard.name} was stopped")
            stored = encode_stored(data, shard.view, job.options, job.values)
            if isinstance(stored, str):
                stored = f"id {shard.ids[number]}, {shard.ranges[number][0]}: {stored}"
                if job.options.on_bad_image == "fail":
                    raise BadImageError(
                        f"{shard.view}: {stored}; fix the image, or leave it out:"
                        " --on-bad-image skip"
                    )
            yield shard.ids[number], stored
            job.advance(1)


def _publish(
    job: PackJob,
    dataset: GeoDataset,
    tables: dict[View, pa.Table],
    plans: dict[View, Plan],
    written: Sequence[WrittenShard],
) -> Packed:
    """Publish the shards, then the data set that refers to them."""
    packed, skipped = make_packed_tables(tables, plans, written)
    if skipped and not len(packed["references"]):
        raise BadImageError(f"no image is left to pack; the first: {skipped[0].reason}")
    parts = [shard.part for shard in written]
    info = {
        "key": job.key,
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "options": asdict(job.options),
        "images": sum(part.rows for part in parts),
        "skipped": [asdict(row) for row in skipped],
    }
    _remove_other_shards(job.folder, {part.name for part in parts})
    manifest = publish(job.folder, KIND, parts, info=info)
    write_dataset(
        job.target,
        packed["references"],
        packed["queries"],
        name=dataset.name,
        views=dataset.views or None,
        values=dataset.values,
    )
    files.remove(files.join(job.target, WORK))
    return _open_packed(job.target, manifest, job.reused)


def _remove_other_shards(folder: str, names: set[str]) -> None:
    """Remove shards and temporary files of earlier attempts; keep files that pack did not write."""
    for name in files.list_names(folder):
        if name not in names and OURS.fullmatch(name):
            files.remove(files.join(folder, name))
