from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.data.sphere import wrap_longitudes


@pytest.mark.parametrize(
    ("lon", "wanted"),
    [(0, 0), (179.5, 179.5), (180, -180), (-180, -180), (190, -170), (-190, 170), (725, 5)],
)
def test_longitudes_are_taken_around_the_circle(lon: float, wanted: float) -> None:
    assert wrap_longitudes(lon) == wanted
    assert np.array_equal(wrap_longitudes([lon, lon + 360]), [wanted, wanted])
