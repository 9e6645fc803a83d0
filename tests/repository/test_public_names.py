from __future__ import annotations

from importlib import import_module

import pytest

PUBLIC = {
    "config": ["load_config", "RunConfig"],
    "dataset": ["open_dataset", "write_dataset", "GeoDataset"],
    "neighbors": ["geographic_neighbors", "NeighborGraph"],
    "sampler": ["PairTable", "plan_batches", "BatchPlan"],
    "loss": ["symmetric_info_nce"],
    "index": ["VectorIndex", "IndexService"],
    "evaluation": ["retrieval_metrics"],
    "pipeline": ["run", "RunResult"],
    **{
        f"datasets.{name}": ["convert"]
        for name in ("cvusa", "cvact", "vigor", "university1652", "earth", "folder")
    },
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_scripts_import_them_from(module: str) -> None:
    found = import_module(f"s4g_ray.{module}")
    for name in PUBLIC[module]:
        assert callable(getattr(found, name)), name


def test_the_index_is_built_searched_saved_and_loaded_by_its_public_name() -> None:
    from s4g_ray.index.vector_index import VectorIndex
    from s4g_ray.index.vector_index import VectorIndex as Defined

    assert VectorIndex is Defined
    assert all(hasattr(VectorIndex, name) for name in ("build", "search", "save", "load"))
