from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from s4g_ray.arrays import Ints
from s4g_ray.evaluation.gallery_parts import GalleryPart, cut_gallery
from s4g_ray.evaluation.gallery_search import QuerySide
from s4g_ray.evaluation.metrics import Retrieval, retrieve_parts


def ranked_loop(scores: NDArray[np.float64], own: NDArray[np.bool_]) -> list[int]:
    """All references of one query: by score; of equal ones its own last, then by row."""
    return sorted(range(len(scores)), key=lambda row: (-scores[row], own[row], row))


def search(queries: Ints, gallery: Ints, places: tuple[Ints, Ints], count: int) -> Retrieval:
    side = QuerySide(queries.astype(np.float32), places[0])
    parts = cut_gallery(GalleryPart(gallery.astype(np.float32), places[1]))
    return retrieve_parts(side, parts, has_distractors=False, num_top=count)["strict"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s4g_ray.evaluation.gallery_parts.ROWS_AT_ONCE", 70)
    monkeypatch.setattr("s4g_ray.evaluation.gallery_search.BLOCK_SCORES", 300)


@pytest.mark.parametrize("count", [1, 5, 40, 300])
@pytest.mark.parametrize("seed", range(3))
def test_the_lists_are_the_first_of_a_plain_sort_with_own_references_behind_ties(
    seed: int, count: int, small_blocks: None
) -> None:
    """Rows of 0 and 1 with two ones have length sqrt 2: scores are 0, 1/2 or 1, many are equal."""
    rng = np.random.default_rng(seed)
    vectors = np.zeros((260, 6), np.int64)
    for row in vectors:
        row[rng.choice(6, 2, replace=False)] = 1
    places = (rng.integers(0, 60, 20), rng.integers(0, 60, 240))
    found = search(vectors[:20], vectors[20:], places, count)
    assert found.listed is not None
    assert found.own_best is not None
    scores = vectors[:20] @ vectors[20:].T / 2
    for query in range(20):
        own = places[1] == places[0][query]
        order = ranked_loop(scores[query], own)
        num = min(count, 240)
        assert found.listed.rows[query, :num].tolist() == order[:num]
        assert (found.listed.rows[query, num:] == -1).all()
        np.testing.assert_allclose(found.listed.scores[query, :num], scores[query, order[:num]])
        assert (found.own_best[query] == -1) == (not own.any())
        rank = found.ranks[0, query]
        if 0 < rank <= count:
            assert found.listed.rows[query, rank - 1] == found.own_best[query]


def test_near_ties_of_float32_are_ordered_by_their_float64_scores(small_blocks: None) -> None:
    """Differences of 1e-8 between scores near 1 are below the steps of float32."""
    rng = np.random.default_rng(0)
    near = np.linspace(0, 4e-4, 200)
    gallery = np.stack([np.cos(near), np.sin(near), np.zeros(200)], axis=1).astype(np.float32)
    gallery = gallery[rng.permutation(200)]
    side = QuerySide(np.array([[1.0, 0, 0]], np.float32), np.array([-1]))
    parts = cut_gallery(GalleryPart(gallery, np.arange(200)))
    listed = retrieve_parts(side, parts, has_distractors=False, num_top=12)["strict"].listed
    assert listed is not None
    exact = gallery.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    unit = exact.astype(np.float32).astype(np.float64)  # as the search holds them
    assert len(np.unique(unit[:, 0].astype(np.float32))) < 6
    best = unit[listed.rows[0], 0]
    assert (np.diff(best) <= 0).all()
    assert sorted(best) == sorted(np.sort(unit[:, 0])[-12:])


def test_a_gallery_of_equal_vectors_is_listed_in_its_order(small_blocks: None) -> None:
    """More near-ties than are compared one by one: 900 in parts of 70 and, at last, in one."""
    gallery = np.ones((900, 4), np.int64)
    places = (np.array([3, 899]), np.arange(900))
    found = search(np.ones((2, 4), np.int64), gallery, places, 6)
    assert found.listed is not None
    assert found.listed.rows.tolist() == [[0, 1, 2, 4, 5, 6], [0, 1, 2, 3, 4, 5]]
    assert found.ranks[0].tolist() == [900, 900]


def test_more_near_ties_than_are_kept_in_one_block_are_compared_from_all_scores() -> None:
    gallery = np.ones((3000, 4), np.int64)
    gallery[2500:, 0] = 2
    found = search(np.ones((1, 4), np.int64), gallery, (np.array([7]), np.arange(3000)), 3)
    assert found.listed is not None
    assert found.listed.rows.tolist() == [[0, 1, 2]]
