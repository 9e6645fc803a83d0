from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.data.exclusions import Exclusions, PlacePairs, check_radius
from s4g_ray.data.places import Places
from s4g_ray.errors import InputError
from s4g_ray.row_lookup import rows_of
from tests.support.sphere_oracle import KINDS, haversine_loop, points

NO_PAIRS = PlacePairs.from_arrays(np.zeros(0, np.int64), np.zeros(0, np.int64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_places_within_the_radius_equal_a_plain_loop(kind: str, share: float) -> None:
    lat, lon = points(kind)
    metres = haversine_loop(lat, lon)
    # Not exactly the distance of a pair.
    radius = float(np.quantile(metres[metres > 1e-3], share)) * (1 + 1e-6)
    ids = np.arange(len(lat)) * 7 + 3
    exclusions = Exclusions(Places(ids, lat, lon), NO_PAIRS, radius)
    wanted = metres <= radius
    assert exclusions.near(ids[:, None], ids).tolist() == wanted.tolist()
    assert exclusions.contains(*np.broadcast_arrays(ids[:, None], ids)).tolist() == wanted.tolist()
    known = np.isfinite(lat)
    assert exclusions.max_partners == wanted[known].sum(axis=1).max() - 1
    assert not exclusions.near(ids, np.full(len(ids), 4)).any()  # no such place
    assert not Exclusions(Places(ids, lat, lon), NO_PAIRS, 0).near(ids, ids).any()


def test_max_partners_counts_each_other_place_once() -> None:
    """Places in a row, 1 degree apart, each near its neighbors.

    Pairs of 3 and 4, and of 9, which has no position, are named too.
    """
    row = Places(np.arange(6), np.arange(6.0), np.zeros(6))
    pairs = PlacePairs.from_arrays(np.array([3, 3, 3, 9]), np.array([4, 5, 9, 5]))
    assert Exclusions(row, pairs, 112_000).max_partners == 4
    assert Exclusions(row, pairs, 0).max_partners == 3
    elsewhere = PlacePairs.from_arrays(np.array([7, 7, 7]), np.array([8, 9, 3]))
    assert Exclusions(row, elsewhere, 112_000).max_partners == 3
    no_places = Places(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    assert Exclusions(no_places, NO_PAIRS, 50).max_partners == 0


def test_a_set_of_pairs_is_symmetric() -> None:
    pairs = PlacePairs.from_arrays(np.array([5, 5, 9, 5]), np.array([9, 2, 5, 5]))
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [
        (2, 5),
        (5, 2),
        (5, 9),
        (9, 5),
    ]
    first = np.array([[5, 5], [9, 7]])
    second = np.array([[2, -1], [5, 5]])
    assert pairs.contains(first, second).tolist() == [[True, False], [True, False]]
    assert pairs.contains(np.array([[5], [2]]), np.array([9, 5, 2])).tolist() == [
        [True, False, True],
        [False, True, False],
    ]
    starts, ends = pairs.ranges(np.array([5, 3, 9]))
    assert [pairs.second[a:b].tolist() for a, b in zip(starts, ends, strict=True)] == [
        [2, 9],
        [],
        [5],
    ]
    assert len(NO_PAIRS) == 0
    assert not NO_PAIRS.contains(first, second).any()


@pytest.mark.parametrize(
    "ids", [[], [4], [0, 1, 2, 3], [-9, -8, 3, 700, 2**62], [-(2**63), 0, 2**63 - 1]]
)
def test_rows_of_ids_equal_a_dictionary(ids: list[int]) -> None:
    wanted = np.array([*ids, 5, -1, 699, 1, 2**61, -(2**62)]).reshape(-1, 1)
    rows = {value: row for row, value in enumerate(ids)}
    found = rows_of(np.array(ids, np.int64), wanted)
    assert found.shape == wanted.shape
    assert found[:, 0].tolist() == [rows.get(value, -1) for value in wanted[:, 0].tolist()]


def test_a_radius_around_too_many_places_is_refused_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line of 2,000 places 111 m apart: 100 others within 5.6 km, except at the ends."""
    line = Places(np.arange(2000), np.arange(2000.0) * 1e-3, np.zeros(2000))
    check_radius(line, 2.1e7)  # 2,000 places are few enough for any radius
    monkeypatch.setattr("s4g_ray.data.exclusions.MAX_NEAR_PLACES", 100)
    check_radius(line, 5_620)
    check_radius(line, 0)
    with pytest.raises(
        InputError, match=r"exclude_radius_m=5740 .* 102 of 1,999 others.* at most 100 .*lower it"
    ):
        check_radius(line, 5_740)
    # 1,500 or 500 places close together, the others far apart
    crowd, few = (np.append(line.lat[:n], np.linspace(30, 60, 2000 - n)) for n in (1500, 500))
    with pytest.raises(InputError, match="exclude_radius_m"):
        check_radius(Places(line.ids, crowd, line.lon), 5_740)
    check_radius(Places(line.ids, few, line.lon), 5_740)
    check_radius(Places(line.ids, np.where(line.ids % 2, np.nan, line.lat), line.lon), 5_740)
    check_radius(Places(line.ids, np.full(2000, np.nan), line.lon), 5_740)


def test_the_number_of_near_places_is_estimated_well_from_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Places(np.arange(20_000), np.arange(20_000.0) * 1e-3, np.zeros(20_000))
    monkeypatch.setattr("s4g_ray.data.exclusions.SAMPLED_PLACES", 2_000)
    monkeypatch.setattr("s4g_ray.data.exclusions.MAX_NEAR_PLACES", 900)
    check_radius(line, 50 * 800)
    with pytest.raises(InputError, match=r" (9\d\d|1,0\d\d) of 19,999 others"):
        check_radius(line, 111.2 * 500)
