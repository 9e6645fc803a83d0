from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.train_split import TrainSplit
from tests.conftest import tables, tiny_config


@pytest.fixture
def row_of_places(tmp_path: Path) -> GeoDataset:
    """Write 24 places, 100 to 123, about 111 m apart in a row.

    The query of 100 has 105 as semi-positive, and that of 101 has 100.
    """
    references, queries = tables(24)
    for name, values in (("lat", np.arange(24) * 1e-3), ("lon", np.zeros(24))):
        references = references.set_column(
            references.column_names.index(name), name, pa.array(values)
        )
        queries = queries.set_column(queries.column_names.index(name), name, pa.array(values))
    semi = pa.array([[105], [100], *[None] * 22], pa.list_(pa.int64()))
    return write_dataset(
        str(tmp_path / "d"), references, queries.append_column("semi_positives", semi), name="row"
    )


@pytest.mark.parametrize("radius", [0, 120, 250])
def test_semi_positives_and_near_places_are_excluded_both_ways_but_not_in_the_paper_protocol(
    row_of_places: GeoDataset, tmp_path: Path, radius: float
) -> None:
    config = tiny_config(tmp_path / "r", row_of_places.uri, sampling={"exclude_radius_m": radius})
    found = TrainSplit.read(config, row_of_places).exclusions
    assert found is not None
    reach = {0: 0, 120: 1, 250: 2}[int(radius)]
    wanted = {(a, b) for a in range(100, 124) for b in range(100, 124) if 0 < abs(a - b) <= reach}
    wanted |= {(100, 105), (105, 100), (100, 101), (101, 100)}
    ids = np.arange(100, 124)
    excluded = found.contains(ids[:, None], ids) & (ids[:, None] != ids)
    assert {(int(ids[a]), int(ids[b])) for a, b in np.argwhere(excluded)} == wanted
    assert found.max_partners == max(sum(a == place for a, _ in wanted) for place in ids)
    paper = config.model_copy(update={"protocol": "paper"})
    assert TrainSplit.read(paper, row_of_places).exclusions is None
