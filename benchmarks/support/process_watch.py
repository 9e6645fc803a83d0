"""Sample the memory and processor time of a process and its descendants, by role. Linux only.

Ray's workers descend from the driver that started the cluster: driver -> raylet -> workers. A
worker's role is the class or function that its process title names.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = resource.getpagesize()
# a part of a worker's process title -> its role
ROLES = {
    "IndexShard": "shard",
    "EncoderActor": "encoder",
    "TrainWorker": "rank",
    "RayTrainWorker": "rank",
}


@dataclass
class RoleUse:
    """The use of all processes of a role."""

    cpu_s: float = 0.0
    peak_gb: float = 0.0  # private memory of the largest process
    num_processes: int = 0


@dataclass
class _Process:
    role: str
    cpu_s: float = 0.0
    peak: int = 0


@dataclass
class ProcessWatch:
    """Sample the tree of processes below `pid` until the end of a `with` block.

    A process that lives shorter than two samples is missed; a process's time after its last sample
    is, too.
    """

    pid: int
    every_s: float = 0.1
    spill_dir: Path | None = None
    spilled: int = 0  # most bytes at any time
    own_cpu_s: float = 0.0  # of the watching thread, which the process that watches spends
    _seen: dict[int, _Process] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def uses(self) -> dict[str, RoleUse]:
        """Return what each role used."""
        found: dict[str, RoleUse] = defaultdict(RoleUse)
        for process in self._seen.values():
            use = found[process.role]
            use.cpu_s += process.cpu_s
            use.peak_gb = max(use.peak_gb, process.peak / 1e9)
            use.num_processes += 1
        return dict(found)

    def count_cpu_s(self) -> float:
        """Return the processor time of all processes until now, ended ones too."""
        self._sample()
        return sum(process.cpu_s for process in list(self._seen.values()))

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self._sample()
            self.own_cpu_s = time.thread_time()

    def _sample(self) -> None:
        children: dict[int, list[int]] = defaultdict(list)
        cpu_of: dict[int, float] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            fields = _read_stat(entry)
            if fields is None:
                continue
            pid = int(entry.name)
            children[int(fields[1])].append(pid)
            cpu_of[pid] = (int(fields[11]) + int(fields[12])) / TICKS
        pending = [self.pid]
        while pending:
            pid = pending.pop()
            pending.extend(children[pid])
            if pid in cpu_of:
                self._add(pid, cpu_of[pid])
        if self.spill_dir is not None:
            self.spilled = max(self.spilled, _count_spilled(self.spill_dir))

    def _add(self, pid: int, cpu_s: float) -> None:
        role = "driver" if pid == self.pid else _find_role(pid)
        private = _read_private(pid)
        process = self._seen.setdefault(pid, _Process(role))
        if role not in ("ray", "driver"):
            process.role = role  # an idle worker is named after its task or actor later
        process.cpu_s = cpu_s
        process.peak = max(process.peak, private)


def _read_stat(entry: Path) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the command; None for a process that is gone."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _read_private(pid: int) -> int:
    """Return the resident bytes that are not shared with files or other processes."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * PAGE


def _find_role(pid: int) -> str:
    """Return the role of a worker; `task` for tasks, `ray` for Ray's own and idle processes."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return "ray"
    if not title.startswith("ray::") or title.startswith("ray::IDLE"):
        return "ray"
    for part, role in ROLES.items():
        if part in title:
            return role
    return "task"


def _count_spilled(folder: Path) -> int:
    """Return the bytes of the objects that Ray spilled below its temporary folder."""
    total = 0
    for path in folder.glob("**/ray_spilled_objects*/**/*"):
        try:
            if path.is_file():
                total += path.stat().st_size
        except OSError:
            continue
    return total
