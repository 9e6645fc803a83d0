from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.data.tables.view_columns import SemiPositives


@pytest.mark.parametrize("num_queries", [0, 1, 30])
def test_semi_positive_places_are_found_as_by_a_loop(num_queries: int) -> None:
    rng = np.random.default_rng(num_queries)
    known = np.sort(rng.choice(100, num_queries, replace=False))
    lists = {int(query): rng.integers(0, 9, rng.integers(1, 4)).tolist() for query in known}
    lengths = np.array([len(places) for places in lists.values()], np.int64)
    flat = np.array([place for places in lists.values() for place in places], np.int64)
    semi = SemiPositives.from_lengths(known, lengths, flat)
    queries = rng.permutation(120)
    places = rng.integers(-1, 9, (120, 5))
    found = semi.contains(queries, places)
    for row, query in enumerate(queries.tolist()):
        for column in range(5):
            assert found[row, column] == (places[row, column] in lists.get(query, []))
