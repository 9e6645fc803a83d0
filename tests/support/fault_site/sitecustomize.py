"""Faults on cue, in every process of a run that has this folder on its PYTHONPATH.

S4G_FAULTS is a JSON list of {"at": parts of an object's URI, "do": a fault, "marker": file}. When
that object is written: kill writes half of it under a temporary name, then kills the process;
refuse fails the write; die ends the thread. Each strikes once, which the marker records. full
refuses that object and all after it, as a full disk does, while the marker exists. hold delays the
write until the marker exists; MARKER.held exists once a write waits.

A process that Ray starts as a worker lets the fork server do it, where there is one. One that it
starts as an agent publishes its ports at once (agent_ports.py).
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

COMMAND = " ".join(sys.orig_argv)
if os.environ.get("S4G_FORK_SERVER") and "/default_worker.py" in COMMAND:
    importlib.import_module("fork_request").replace_process(os.environ["S4G_FORK_SERVER"])
if "/agent" in COMMAND:
    importlib.import_module("agent_ports").publish_ports()

FAULTS = json.loads(os.environ.get("S4G_FAULTS", "[]"))


def _meant(fault: dict[str, str], uri: str) -> bool:
    return all(part in uri for part in fault["at"].split())


def _strike(fault: dict[str, str], uri: str, data: bytes) -> None:
    marker = Path(fault["marker"])
    if fault["do"] == "full":
        if _meant(fault, uri):
            marker.touch()
        if marker.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return
    if not _meant(fault, uri) or marker.exists():
        return
    if fault["do"] == "hold":
        marker.with_name(f"{marker.name}.held").touch()
        while not marker.exists():
            time.sleep(0.1)
        return
    marker.touch()
    if fault["do"] == "refuse":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    if fault["do"] == "die":
        raise SystemExit("on cue")
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_name(f".{target.name}.cut.tmp").write_bytes(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(module: Any) -> None:
    write = module._write_whole

    def write_or_strike(uri: str, data: bytes) -> None:
        for fault in FAULTS:
            _strike(fault, uri, data)
        write(uri, data)

    module._write_whole = write_or_strike


class _Finder:
    """Arms s4g_ray.storage.files when it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "s4g_ray.storage.files":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _arm(module)

        loader.exec_module = exec_module
        return spec


if FAULTS and "s4g_ray.storage.files" in sys.modules:  # of a forked process
    _arm(sys.modules["s4g_ray.storage.files"])
elif FAULTS:
    sys.meta_path.insert(0, _Finder())
