"""RunFolder: run.json, config.yaml, metrics.jsonl, bad_images.jsonl, and where artefacts lie."""

from __future__ import annotations

import json
import math
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import s4g_ray
from s4g_ray.config.loading import dump_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.checkpoint import Checkpoint, epoch_uri, newest_checkpoint
from s4g_ray.errors import InputError
from s4g_ray.pipeline.branches.branch import find_branch
from s4g_ray.pipeline.branches.branch_record import REPLACED, Branch
from s4g_ray.pipeline.records import read_records
from s4g_ray.storage import files

Record = dict[str, Any]
# between two writes of metrics.jsonl to an object store that add steps alone
STEPS_EVERY_S = 10.0

# Keys that may change when a run is resumed: how and where it computes, not the result. Also the
# kind and size of the index, which errors of an index advise to change: later rounds use the new
# values, and an interrupted round is indexed again.
FREE_ON_RESUME = {
    "run_dir",
    "loggers",
    "data.uri",
    "data.images_root",
    "data.cache_dir",
    "data.on_bad_image",
    "embedding.num_actors",
    "embedding.cpus_per_actor",
    "embedding.gpus_per_actor",
    "embedding.on_cpu",
    "embedding.threads_per_actor",
    "embedding.batch_size",  # the last bits change; memory may require it
    "embedding.decoders_per_actor",
    "embedding.decode_ahead_mb",
    "embedding.part_mb",
    "embedding.keep",
    "mining.index_memory_gb",
    "mining.index_kind",
    "mining.max_search_hours",
    "mining.nprobe",
    "mining.ef_search",
    "mining.min_recall",
    "mining.recall_sample",
    "mining.num_shards",
    "mining.index_threads",
    "mining.query_block",
    "mining.cpus_per_shard",
    "mining.gpus_per_shard",
    "mining.shard_placement",
    "mining.num_searchers",
    "mining.cpus_per_searcher",
    "mining.part_mb",
    "mining.max_retries",
    "mining.keep",
    "mining.label_selector",
    "embedding.label_selector",
    "train.label_selector",
    "train.num_workers",
    "train.cpus_per_worker",
    "train.loader_processes",
    "train.log_every_steps",
    "train.gpus_per_worker",
    "train.placement",
    "train.env",
    "train.collective_timeout_s",
    "mining.max_staleness_epochs",
    "mining.when_late",
    "train.micro_batch_size",
    "train.max_failures",
    "train.max_skipped_steps",
    "train.profile_steps",
    "train.compile",  # the last bits change
    "train.resize_every_s",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.grace_s",
    "model.grad_checkpointing",
    "sampling.keep_plans",
    "sampling.max_pairs_per_cell",  # changes later plans; memory may require it
}

# folders whose artefacts are named by the epoch that they were made in or after
VERSIONED = (
    "checkpoints",
    "embeddings",
    "neighbors",
    "gallery_neighbors",
    "index",
    "gallery_index",
    "plans",
)


class RunFolder:
    """A run's folder: what is logged there, and the URIs of the artefacts.

    on_record: called with each record, in the thread that logs it. guard: called before a write;
    raises OwnershipLostError where another process has taken the folder. branch: the branch that is
    to be made, or completed, before the run continues.
    """

    def __init__(
        self,
        uri: str,
        config: RunConfig,
        info: Record,
        records: list[Record],
        bad_images: list[Record],
    ) -> None:
        self.uri = uri
        self.config = config
        self.info = info
        self.records = records
        self.bad_images = bad_images
        self.on_record: Callable[[Record], None] | None = None
        self.guard: Callable[[], None] = lambda: None
        self.branch: Branch | None = None
        self.has_begun = False  # run.json is written
        self._lock = threading.RLock()  # rounds write beside the training
        self._written = 0.0  # when metrics.jsonl was last written to an object store

    @classmethod
    def open(
        cls,
        config: RunConfig,
        dataset: GeoDataset,
        *,
        resume: bool,
        from_epoch: int | None = None,
    ) -> RunFolder:
        """Open a new folder, or an existing one to resume; write nothing.

        The folder is one that check_start takes. from_epoch: continue from the checkpoint after
        this epoch, as a branch. Raises InputError where a resumed run has other values or another
        data set, and as check_branch.
        """
        uri = files.absolute(config.run_dir)
        if resume and files.exists(files.join(uri, "run.json")):
            return cls._reopen(uri, config, dataset, from_epoch)
        info = {
            "format": "s4g-run",
            "version": 1,
            "s4g_ray": s4g_ray.__version__,
            "status": "running",
            "dataset": {
                "uri": dataset.uri,
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
            },
        }
        return cls(uri, config, info, [], [])

    @classmethod
    def _reopen(
        cls, uri: str, config: RunConfig, dataset: GeoDataset, from_epoch: int | None
    ) -> RunFolder:
        info = files.read_json(files.join(uri, "run.json"))
        if info.get("status") == REPLACED:
            raise InputError(
                f"{uri} keeps what a run did before it branched: it can be evaluated and exported,"
                " not resumed; set run_dir to the run's folder"
            )
        branch = find_branch(uri, info, config, from_epoch, FREE_ON_RESUME)
        if info["dataset"]["fingerprint"] != dataset.fingerprint:
            raise InputError(
                f"{uri} was started on another data set than {dataset.uri} now holds"
                f"{describe_other_name(info['dataset'], dataset)}"
            )
        info["dataset"]["uri"] = dataset.uri  # it may have been moved
        bad_images = read_records(uri, "bad_images.jsonl")
        folder = cls(uri, config, info, read_records(uri), bad_images)
        folder.has_begun = True
        folder.branch = branch
        return folder

    def start(self) -> None:
        """Write the configuration, then run.json: from here on the folder holds a run."""
        self.guard()
        files.write_bytes(self.path("config.yaml"), dump_config(self.config).encode())
        self.update()
        self.has_begun = True

    def path(self, *parts: str) -> str:
        """Return a URI below the folder."""
        return files.join(self.uri, *parts)

    def checkpoint(self, epoch: int) -> str:
        """Return the URI of an epoch's checkpoint."""
        return epoch_uri(self.uri, epoch)

    def update(self, **values: Any) -> None:
        """Change values of run.json."""
        self.guard()
        with self._lock:
            self.info.update(values)
            files.write_json(self.path("run.json"), self.info)

    def replace_records(self, records: list[Record]) -> None:
        """Write all lines of metrics.jsonl anew."""
        self.guard()
        with self._lock:
            self.records = records
            self._write_lines("metrics.jsonl", records)

    def log(self, kind: str, **values: Any) -> Record:
        """Add a line to metrics.jsonl; a value that is not finite becomes null, for JSON."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        record = {"kind": kind, "time": round(time.time(), 3), **finite}
        self.guard()
        with self._lock:
            self.records.append(record)
            if files.is_local(self.uri):
                files.append_bytes(self.path("metrics.jsonl"), _lines([record]))
            elif kind != "step" or time.monotonic() - self._written > STEPS_EVERY_S:
                # an object store takes whole objects only
                self._written = time.monotonic()
                self._write_lines("metrics.jsonl", self.records)
            self._notify(record)
        return record

    def _notify(self, record: Record) -> None:
        if self.on_record is not None:
            self.on_record(record)

    def find(self, kind: str, epoch: int) -> list[Record]:
        """Return the records of a kind about an epoch."""
        with self._lock:
            return [
                record
                for record in self.records
                if record["kind"] == kind and record["epoch"] == epoch
            ]

    def log_bad_images(self, reasons: tuple[str, ...] | list[str]) -> None:
        """Add images that were left out to bad_images.jsonl, each once."""
        with self._lock:
            known = {record["reason"] for record in self.bad_images}
            new = [reason for reason in dict.fromkeys(reasons) if reason not in known]
            if new:
                self.bad_images += [{"reason": reason} for reason in new]
                self._write_lines("bad_images.jsonl", self.bad_images)
                self._notify({"kind": "bad_images", "new": len(new)})

    def rewind(self, start: Checkpoint) -> None:
        """Forget the records and artefacts after a checkpoint, which are made again.

        The plan of an epoch that the checkpoint lies within stays.
        """
        self.forget(start.epoch, start.step)
        for folder in VERSIONED:
            last = start.epoch
            if folder == "plans" and start.batch > 0:
                last += 1
            for name in files.list_names(self.path(folder)):
                version = version_of(name)
                if version is not None and version > last:
                    files.remove(self.path(folder, name))

    def forget(self, epoch: int, step: int) -> None:
        """Drop the records about epochs after `epoch`, but keep those of steps until `step`."""
        with self._lock:
            self.replace_records(
                [
                    record
                    for record in self.records
                    if record.get("epoch", 0) <= epoch or record.get("step", step + 1) <= step
                ]
            )

    def _write_lines(self, name: str, records: list[Record]) -> None:
        files.write_bytes(self.path(name), _lines(records))


def find_start(folder: RunFolder) -> Checkpoint | None:
    """Return the checkpoint that a run continues from: its branch's, or the newest; None if new."""
    if folder.branch is not None:
        return Checkpoint.read(folder.checkpoint(folder.branch.from_epoch))
    return newest_checkpoint(folder.uri)


def _lines(records: list[Record]) -> bytes:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()


@dataclass(frozen=True)
class RunResult:
    """The result of a run: test metrics of the trained encoder, and of the untrained one.

    untrained: None where epoch 0 was not evaluated. finished: false when SIGTERM ended the run
    early; `resume` continues it where it has begun. ray_result: ray.train.Result of the workers,
    whose checkpoints and metrics are empty: those are this project's own. None where none started.
    """

    run_dir: str
    metrics: dict[str, float]
    untrained: dict[str, float] | None
    records: list[Record] = field(repr=False)
    finished: bool = True
    begun: bool = True  # the folder holds a run
    ray_result: Any = field(default=None, repr=False)


def result_of(folder: RunFolder, *, finished: bool, ray_result: Any = None) -> RunResult:
    """Return the result of a run from its records."""
    evaluations = [record for record in folder.records if record["kind"] == "evaluation"]
    metrics = [
        {key: value for key, value in record.items() if isinstance(value, float) and key != "time"}
        for record in evaluations
    ]
    untrained = None
    if evaluations and evaluations[0]["epoch"] == 0:
        untrained = metrics[0]
    last = metrics[-1] if metrics else {}
    return RunResult(
        folder.uri,
        last,
        untrained,
        folder.records,
        finished,
        begun=folder.has_begun,
        ray_result=ray_result,
    )


def describe_other_name(known: Mapping[str, Any], dataset: GeoDataset) -> str:
    """Return the end of an error for a data set of another fingerprint, where its name is another.

    known: the entry `dataset` of run.json.
    """
    name = known["name"]
    if name == dataset.name:
        return ""
    return (
        f"; its name is {dataset.name!r}, not {name!r}, and belongs to the fingerprint: where the"
        f" rows are the same, convert it again with --name {shlex.quote(name)}"
    )


def version_of(name: str) -> int | None:
    """Return the number in `epoch=0004`, `v=0004` or `epoch=0004.parquet`; None for other names."""
    match = re.fullmatch(r"(?:epoch|v)=(\d+)(?:\.parquet)?", name)
    return int(match[1]) if match else None
