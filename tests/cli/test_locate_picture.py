from __future__ import annotations

import pytest

from s4g_ray.cli.galleries.locate_picture import find_near_bounds
from s4g_ray.data.sphere import metres_between
from s4g_ray.gallery.answer import Answer

WHOLE = (9.0, 59.0, 11.0, 61.0)


@pytest.mark.parametrize("radius_m", [None, 200.0, 5000.0])
@pytest.mark.parametrize("truth", [(60.0, 10.01), (60.02, 9.9)])
def test_the_enlarged_part_holds_the_circle_and_the_truth(
    radius_m: float | None, truth: tuple[float, float]
) -> None:
    answer = Answer("a.jpg", lat=60.0, lon=10.0, radius_90_m=radius_m, is_located=True)
    bounds = find_near_bounds(answer, truth, WHOLE)
    assert bounds is not None
    west, south, east, north = bounds
    assert west < truth[1] < east
    assert south < truth[0] < north
    for edge in ((60.0, west), (60.0, east), (south, 10.0), (north, 10.0)):
        assert metres_between(60.0, 10.0, *edge) > (radius_m or 0.0)


def test_an_answer_without_a_position_has_no_enlarged_part() -> None:
    assert find_near_bounds(Answer("a.jpg"), (60.0, 10.0), WHOLE) is None


def test_beyond_the_antimeridian_the_enlarged_part_is_in_the_turn_of_the_map() -> None:
    answer = Answer("a.jpg", lat=0.0, lon=-179.9, is_located=True)
    bounds = find_near_bounds(answer, (0.0, -179.89), (179.0, -1.0, 181.0, 1.0))
    assert bounds is not None
    assert bounds[0] < 180.1 < 180.11 < bounds[2]
