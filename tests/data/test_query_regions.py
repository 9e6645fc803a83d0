from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from s4g_ray.data.dataset import write_dataset
from tests.conftest import tables


def test_the_regions_of_some_queries_are_read_in_their_order(tmp_path: Path) -> None:
    references, queries = tables(6)
    plain = write_dataset(str(tmp_path / "plain"), references, queries, name="plain")
    assert plain.query_regions(np.array([4, 1])) is None
    names = pa.array(["north", None, "south", "north", "south", "west"])
    named = queries.append_column("region", names)
    dataset = write_dataset(str(tmp_path / "named"), references, named, name="named")
    found = dataset.query_regions(np.array([5, 1, 2, 0]))
    assert found is not None
    assert found.tolist() == ["west", "", "south", "north"]
    assert dataset.query_regions(np.array([1])) is None
