"""A run's folder: run.json, config.yaml, metrics.jsonl, bad_images.jsonl, and where its artefacts lie."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import s4g_ray
from s4g_ray import storage
from s4g_ray.config import RunConfig, dump_config, load_config
from s4g_ray.dataset import GeoDataset
from s4g_ray.errors import InputError

Record = dict[str, Any]


class RunFolder:
    """A run's folder: run.json, config.yaml, metrics.jsonl, bad_images.jsonl, and the URIs of its artefacts."""

    def __init__(self, uri: str, info: Record, records: list[Record], bad_images: list[Record]) -> None:
        self.uri, self.info, self.records, self.bad_images = uri, info, records, bad_images

    @classmethod
    def open(cls, config: RunConfig, dataset: GeoDataset, *, resume: bool) -> RunFolder:
        """Make a new folder, or open an existing one to resume. Raises InputError when that must not be."""
        uri = storage.absolute(config.run_dir)
        if storage.exists(storage.join(uri, "run.json")):
            if not resume:
                raise InputError(f"{uri} holds a run already; go on with --resume, or choose another run_dir")
            return cls._reopen(uri, config, dataset)
        if storage.list_names(uri):
            raise InputError(f"{uri} is not empty and holds no run; choose another run_dir")
        info = {
            "format": "s4g-run", "version": 1, "s4g_ray": s4g_ray.__version__, "status": "running",
            "dataset": {"uri": dataset.uri, "name": dataset.name, "fingerprint": dataset.fingerprint},
        }  # fmt: skip
        storage.write_bytes(storage.join(uri, "config.yaml"), dump_config(config).encode())
        folder = cls(uri, info, [], [])
        folder.update()
        return folder

    @classmethod
    def _reopen(cls, uri: str, config: RunConfig, dataset: GeoDataset) -> RunFolder:
        info = storage.read_json(storage.join(uri, "run.json"))
        before = load_config(storage.join(uri, "config.yaml")) if storage.is_local(uri) else config
        ours, theirs = (c.model_dump(exclude={"ray", "run_dir"}) for c in (config, before))
        changed = [f"{s}: {theirs[s]!r} -> {ours[s]!r}" for s in ours if ours[s] != theirs[s]]
        if changed:
            raise InputError(f"{uri} was started with another configuration: {'; '.join(changed)}")
        if info["dataset"]["fingerprint"] != dataset.fingerprint:
            raise InputError(f"{uri} was started on another data set than {dataset.uri} now holds")
        return cls(uri, info, read_records(uri), read_records(uri, "bad_images.jsonl"))

    def path(self, *parts: str) -> str:
        """A URI below the folder."""
        return storage.join(self.uri, *parts)

    def checkpoint(self, epoch: int) -> str:
        """The URI of an epoch's checkpoint."""
        return self.path(f"checkpoints/epoch={epoch:04d}")

    def update(self, **values: Any) -> None:
        """Change run.json."""
        self.info.update(values)
        storage.write_json(self.path("run.json"), self.info)

    def log(self, kind: str, **values: Any) -> Record:
        """Add a line to metrics.jsonl; what is not finite becomes null, for JSON knows no other way."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"kind": kind, "time": round(time.time(), 3), **finite}
        self.records.append(record)
        self._write_lines("metrics.jsonl", self.records)
        return record

    def log_bad_images(self, reasons: tuple[str, ...] | list[str]) -> None:
        """List images that were left out, each once."""
        known = {record["reason"] for record in self.bad_images}
        new = [reason for reason in dict.fromkeys(reasons) if reason not in known]
        if new:
            self.bad_images += [{"reason": reason} for reason in new]
            self._write_lines("bad_images.jsonl", self.bad_images)

    def rewind(self, epoch: int) -> None:
        """Forget what was logged after an epoch: it is done again."""
        self.records = [record for record in self.records if record.get("epoch", 0) <= epoch]

    def _write_lines(self, name: str, records: list[Record]) -> None:
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        storage.write_bytes(self.path(name), text.encode())


def read_records(uri: str, name: str = "metrics.jsonl") -> list[Record]:
    """The lines of a run's metrics.jsonl or bad_images.jsonl; none when it is not there yet."""
    path = storage.join(uri, name)
    return [json.loads(line) for line in storage.read_bytes(path).splitlines()] if storage.exists(path) else []
