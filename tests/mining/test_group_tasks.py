from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.errors import RunError
from s4g_ray.mining.group_tasks import check_finite


def test_a_query_whose_embedding_is_not_finite_is_named() -> None:
    vectors = np.ones((4, 3), np.float16)
    check_finite("table", np.arange(4), vectors)
    vectors[2, 1] = np.inf
    vectors[3, 0] = np.nan
    with pytest.raises(RunError, match=r"table: the embedding of query 70 is not finite \(2 such"):
        check_finite("table", np.array([50, 60, 70, 80]), vectors)
