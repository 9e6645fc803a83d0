from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import s4g_ray

STUB = Path(s4g_ray.__file__).with_suffix(".pyi")
PUBLIC = (
    "BadImagesRecord",
    "BatchPlan",
    "Callback",
    "EmbeddingRecord",
    "EpochRecord",
    "EvaluationRecord",
    "Gallery",
    "GeoDataset",
    "IndexClient",
    "IndexService",
    "LostRecord",
    "MiningRecord",
    "NeighborGraph",
    "PairTable",
    "RoundFailedRecord",
    "RoundRecord",
    "RunConfig",
    "RunRecord",
    "RunResult",
    "StepRecord",
    "VectorIndex",
    "WorkersRecord",
    "geographic_neighbors",
    "load_config",
    "open_dataset",
    "open_gallery",
    "plan_batches",
    "retrieval_metrics",
    "run",
    "symmetric_info_nce",
    "write_dataset",
)
CONVERTERS = (
    *("cvusa", "cvact", "vigor", "university1652", "earth", "landsat", "folder"),
    *("published.sues200", "published.denseuav", "published.gta_uav"),
    *("published.uav_visloc", "published.cvcities"),
)


def test_the_stub_lists_exactly_the_public_names() -> None:
    listed = re.findall(r"^from \S+ import (\w+) as \1$", STUB.read_text(), re.MULTILINE)
    assert sorted(listed) == list(PUBLIC)
    assert set(PUBLIC) <= set(dir(s4g_ray))
    assert sorted(vars(s4g_ray)["__all__"]) == list(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_imported_from_s4g_ray(name: str) -> None:
    imported = getattr(s4g_ray, name)
    assert callable(imported)
    assert imported.__name__ == name
    assert getattr(import_module(imported.__module__), name) is imported


@pytest.mark.parametrize("name", CONVERTERS)
def test_each_converter_module_has_a_function_convert(name: str) -> None:
    assert callable(import_module(f"s4g_ray.datasets.{name}").convert)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Nothing"):
        s4g_ray.Nothing  # type: ignore[attr-defined] # noqa: B018


def test_importing_s4g_ray_loads_no_large_library() -> None:
    code = "import s4g_ray, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "s4g_ray" in loaded
    assert not loaded & {"torch", "ray", "numpy", "pyarrow", "pydantic", "faiss"}


def test_the_index_is_built_searched_saved_and_loaded_by_its_public_name() -> None:
    assert all(hasattr(s4g_ray.VectorIndex, name) for name in ("build", "search", "save", "load"))
