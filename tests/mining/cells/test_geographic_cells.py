from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s4g_ray.data.places import Places
from s4g_ray.data.sphere import unit_sphere
from s4g_ray.mining.cells.geographic_cells import NUM_ADJOINING, GeoCells


def draw_places(count: int, seed: int) -> Places:
    """Places in a few towns, one of them on the 180th meridian."""
    rng = np.random.default_rng(seed)
    centres = np.array([[48.0, 2.0], [48.3, 2.4], [-17.0, 180.0], [70.0, -150.0]])
    around = centres[rng.integers(4, size=count)] + rng.normal(0, 0.05, (count, 2))
    lon = (around[:, 1] + 180) % 360 - 180
    return Places(np.arange(count) * 3, around[:, 0], lon)


@given(st.integers(1, 300), st.integers(2, 80), st.integers(0, 5))
def test_each_place_is_in_one_cell_and_no_cell_is_too_large(
    count: int, max_places: int, seed: int
) -> None:
    cells = GeoCells.from_places(draw_places(count, seed), max_places)
    assert np.bincount(cells.cell_of, minlength=len(cells)).tolist() == cells.sizes.tolist()
    assert cells.sizes.sum() == count
    assert cells.sizes.max() <= max_places
    assert count <= max_places or 2 * cells.sizes.min() >= max_places // 2
    assert cells.adjoining.shape == (len(cells), min(NUM_ADJOINING, len(cells) - 1))


def test_adjoining_cells_are_those_of_the_nearest_boxes() -> None:
    places = draw_places(900, 1)
    cells = GeoCells.from_places(places, 40)
    xyz = unit_sphere(places.lat, places.lon).astype(np.float32)
    boxes = [xyz[cells.cell_of == cell] for cell in range(len(cells))]
    lows = np.array([box.min(axis=0) for box in boxes])
    highs = np.array([box.max(axis=0) for box in boxes])
    for cell in range(len(cells)):
        between = np.maximum(lows - highs[cell], lows[cell] - highs)
        gaps = np.square(np.maximum(between, 0)).sum(axis=1)
        others = cells.adjoining[cell].tolist()
        assert cell not in others
        assert len(set(others)) == NUM_ADJOINING
        left = np.setdiff1d(np.arange(len(cells)), [cell, *others])
        assert gaps[others].max() <= gaps[left].min() + 1e-12


def test_cells_of_a_lattice_hold_and_adjoin_nearly_all_nearest_places() -> None:
    side = 64
    row, column = np.divmod(np.arange(side * side), side)
    lat = 45 + row * 1e-3
    lon = 179.97 + column * 1e-3
    places = Places(np.arange(side * side), lat, (lon + 180) % 360 - 180)
    cells = GeoCells.from_places(places, 64)
    beside = np.flatnonzero(column < side - 1)
    pairs = [(beside, beside + 1)]  # across the 180th meridian too
    above = np.flatnonzero(row < side - 1)
    pairs.append((above, above + side))
    num_together = 0
    num_pairs = 0
    for first, second in pairs:
        around = [set(cells.around(np.array([cell])).tolist()) for cell in range(len(cells))]
        together = [
            cells.cell_of[b] in around[cells.cell_of[a]] for a, b in zip(first, second, strict=True)
        ]
        num_together += sum(together)
        num_pairs += len(together)
    assert num_together / num_pairs == pytest.approx(1, abs=0.01)


def test_the_same_places_give_the_same_cells() -> None:
    places = draw_places(500, 2)
    first, second = (GeoCells.from_places(places, 30) for _ in range(2))
    assert first.cell_of.tolist() == second.cell_of.tolist()
    assert first.adjoining.tolist() == second.adjoining.tolist()
