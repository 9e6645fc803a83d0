"""Describe the machine and the versions that a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = (
    "numpy",
    "scipy",
    "numba",
    "faiss-cpu",
    "faiss-gpu",
    "ray",
    "pyarrow",
    "simplejpeg",
    "opencv-python-headless",
)


def read_versions() -> dict[str, str]:
    """Return the versions of the installed packages that figures depend on."""
    installed = {
        (d.metadata["Name"] or "").lower(): d.version for d in importlib.metadata.distributions()
    }
    return {name: installed[name] for name in PACKAGES if name in installed}


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores, memory and versions, to be shown beside every figure."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    shown = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": f"{names[0] if names else platform.machine()} ({' '.join(shown)})",
        "cores": os.cpu_count() or 0,
        "memory": f"{memory:.0f} GB",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **read_versions(),
    }
