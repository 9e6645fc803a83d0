"""Check this machine: cores, memory, GPUs, shared memory, temporary folder, HOME."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from s4g_ray.cli.setup.finding import Finding
from s4g_ray.distributed.start_checks import check_local_start, home_folder
from s4g_ray.errors import InputError

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
GB = 1e9
ANSWER_S = 60.0  # for nvidia-smi, which hangs with some faults of the driver
LEAST_MEMORY_GB = 4.0  # free: the demo's processes take about three
LEAST_TEMPORARY_GB = 2.0
SHARED_SHARE = 0.3  # of the memory: what Ray's object store takes of /dev/shm


def check_cores(cgroup: Path = CGROUP) -> Finding:
    """Compare the cores of this machine with those that this process may use."""
    total = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)))
    quota = read_cpu_quota(cgroup)
    if quota is not None:
        usable = min(usable, quota)
    value = f"{usable:g} of {total} usable"
    if usable < 2:
        return Finding(
            "cores",
            "warning",
            value,
            "training, loading and mining take turns; give the container at least 2 cores",
        )
    if usable < total:
        return Finding(
            "cores",
            "warning",
            f"{value}: Ray counts all {total}, and starts work for them",
            f"set ray.num_cpus={int(usable)} for runs on this machine",
        )
    return Finding("cores", "ok", value)


def read_cpu_quota(cgroup: Path) -> float | None:
    """Return the cores that a container's quota allows, of cgroup 2 or 1; None without a quota."""
    words = _read(cgroup / "cpu.max").split()
    if not words:
        words = [_read(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None  # "max" or -1: no limit
    return int(words[0]) / int(words[1])


def check_memory(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> Finding:
    """Return the memory of this machine or container, and what of it is free."""
    total, free = read_memory(meminfo)
    limit = read_memory_limit(cgroup)
    note = ""
    if limit is not None and limit[0] < total:
        total = limit[0]
        free = min(free, total - limit[1])
        note = " (limit of the container)"
    value = f"{free / GB:.1f} GB free of {total / GB:.1f} GB{note}"
    if free < LEAST_MEMORY_GB * GB:
        return Finding(
            "memory",
            "warning",
            value,
            "end other processes, or lower train.batch_size, train.num_workers and"
            " embedding.num_actors",
        )
    return Finding("memory", "ok", value)


def read_memory(meminfo: Path = MEMINFO) -> tuple[float, float]:
    """Return the memory of this machine and what of it is available, bytes."""
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total, free = (1024.0 * int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return total, free


def read_memory_limit(cgroup: Path) -> tuple[float, float] | None:
    """Return limit and use, bytes, of cgroup 2 or 1; None without a limit. Cache is not use."""
    files = (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat"),
        (
            cgroup / "memory" / "memory.limit_in_bytes",
            cgroup / "memory" / "memory.usage_in_bytes",
            cgroup / "memory" / "memory.stat",
        ),
    )
    for limit, use, stat in files:
        if _read(limit).isdigit() and _read(use).isdigit():
            rows = (line.split() for line in _read(stat).splitlines())
            cached = {row[0]: int(row[1]) for row in rows if len(row) == 2}
            used = int(_read(use)) - cached.get("inactive_file", 0)
            return float(_read(limit)), float(max(used, 0))
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no such limit, or not of this process
        return ""


def list_gpus() -> list[str] | None:
    """Return the GPUs that NVIDIA's driver names, with their memory; none without a driver.

    None where the driver does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def check_gpus(gpus: list[str] | None) -> Finding:
    """Compare the GPUs of the driver with those that torch can use."""
    if gpus is None:
        remedy = "restart the driver, or the machine"
        value = f"nvidia-smi does not answer within {ANSWER_S:g} s"
        return Finding("GPUs", "error", value, remedy)
    import torch  # not at the top: it takes seconds

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        if usable:
            return Finding("GPUs", "ok", f"{usable} (no nvidia-smi)")
        return Finding("GPUs", "ok", "none; everything runs on the processor")
    value = f"{', '.join(gpus)}; torch {torch.__version__} can use {usable}"
    if usable < len(gpus):
        built = torch.version.cuda
        remedy = (
            f"install a driver for CUDA {built}, or unset CUDA_VISIBLE_DEVICES"
            if built
            else "install a torch that is built for CUDA"
        )
        return Finding("GPUs", "error" if usable == 0 else "warning", value, remedy)
    return Finding("GPUs", "ok", f"{value}; train.use_gpu=true uses them")


def check_shared_memory(folder: str = "/dev/shm") -> Finding:
    """Compare free shared memory with what Ray's object store takes."""
    name = "shared memory"
    if not Path(folder).is_dir():
        return Finding(name, "warning", f"there is no {folder}", "Ray uses its temporary folder")
    free = float(shutil.disk_usage(folder).free)
    wanted = SHARED_SHARE * read_memory()[0]
    limit = read_memory_limit(CGROUP)
    if limit is not None:
        wanted = min(wanted, SHARED_SHARE * limit[0])
    value = f"{free / GB:.1f} GB free in {folder}"
    if free < 0.9 * wanted:
        return Finding(
            name,
            "warning",
            f"{value}, below the {wanted / GB:.1f} GB of Ray's object store, which then uses a"
            " slower file",
            f"docker run --shm-size={wanted / GB:.0f}g, or a larger emptyDir of medium Memory",
        )
    return Finding(name, "ok", value)


def check_temporary_folder() -> Finding:
    """Check the folder of Ray's sockets and logs: length, access, space; and Ray's token."""
    folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    name = "temporary folder"
    try:
        check_local_start()
    except InputError as error:
        value, _, remedy = str(error).partition("; ")
        return Finding(name, "error", value, remedy)
    free = shutil.disk_usage(folder).free / GB
    value = f"{folder}, {free:.1f} GB free"
    if free < LEAST_TEMPORARY_GB:
        return Finding(name, "warning", value, "make room, or set RAY_TMPDIR to a folder with more")
    return Finding(name, "ok", value)


def check_home() -> Finding:
    """Check that HOME can be written: Ray keeps its token there, other libraries caches."""
    home = str(home_folder())
    fault = find_write_fault(home)
    if fault:
        return Finding("HOME", "error", f"{home}: {fault}", "set HOME to a folder with access")
    return Finding("HOME", "ok", home)


def find_write_fault(folder: str) -> str:
    """Return why no file can be made in a folder; empty where one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
