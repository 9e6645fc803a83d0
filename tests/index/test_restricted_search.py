"""Searches among some ids or within an area, against brute force over the allowed vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.data.area import Area
from s4g_ray.index.faiss_library import faiss
from s4g_ray.index.plan import Kind
from s4g_ray.index.vector_index import VectorIndex
from tests.support.search_oracle import KINDS, Array, brute_force, clustered, recall

COUNT = 6000
VECTORS = clustered(COUNT)
QUERIES = clustered(25, seed=1)
IDS = np.random.default_rng(3).permutation(COUNT) * 3
COORDINATES = np.random.default_rng(4).uniform([-60, -180], [60, 180], (COUNT, 2))
BUILT: dict[str, VectorIndex] = {}


def index_of(kind: Kind) -> VectorIndex:
    if kind not in BUILT:
        BUILT[kind] = VectorIndex.build(
            VECTORS, IDS, coordinates=COORDINATES, kind=kind, num_threads=2
        )
    return BUILT[kind]


def expected(rows: Array, k: int) -> list[list[int]]:
    return brute_force(VECTORS[rows], IDS[rows], QUERIES, k)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 20, 300, 5500])
def test_the_nearest_of_some_ids_are_found(kind: Kind, count: int) -> None:
    rows = np.sort(np.random.default_rng(count).choice(COUNT, count, replace=False))
    k = min(count, 10)
    index = index_of(kind)
    ids, scores = index.search(QUERIES, k, ids=np.sort(IDS[rows]))
    assert np.isin(ids, IDS[rows]).all()
    assert (np.diff(scores) <= 0).all()
    least = {"flat": 1.0, "sqfp16": 0.97, "ivf_rabitq": 0.85}.get(kind, 0.9)
    assert recall(ids, expected(rows, k)) >= least


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "area",
    [
        Area.bounds(170, -30, -150, 30),
        Area.circle(10, 20, 1_500_000),
        Area.polygon([[[0, 0], [90, 0], [90, 50], [0, 50]]]),
    ],
)
def test_the_nearest_within_an_area_are_found(kind: Kind, area: Area) -> None:
    rows = np.flatnonzero(area.contains(*COORDINATES.T))
    assert 50 < len(rows) < COUNT / 4
    ids, _ = index_of(kind).search(QUERIES, 10, area=area)
    assert np.isin(ids, IDS[rows]).all()
    assert recall(ids, expected(rows, 10)) >= (0.85 if kind == "ivf_rabitq" else 0.95)
    some = np.sort(IDS[:4000])
    both = np.flatnonzero(area.contains(*COORDINATES[:4000].T))
    ids, _ = index_of(kind).search(QUERIES, 10, ids=some, area=area)
    assert np.isin(ids, IDS[both]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_missing_results_are_padded_where_fewer_than_k_vectors_are_allowed(kind: Kind) -> None:
    index = index_of(kind)
    allowed = np.sort(IDS[:4])
    for ids, scores in (
        index.search(QUERIES, 7, ids=allowed),
        index.search_padded(QUERIES, 7, ids=allowed),
    ):
        assert (np.sort(ids[:, :4], axis=1) == allowed).all()
        assert (ids[:, 4:] == -1).all()
        assert (scores[:, 4:] == -np.inf).all()
    for nothing in (np.array([1]), np.empty(0, np.int64)):  # no vector has id 1
        ids, _ = index.search(QUERIES, 3, ids=nothing)
        assert (ids == -1).all()
    ids, _ = index.search_padded(QUERIES, COUNT + 5)
    assert (ids[:, COUNT:] == -1).all()


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_rabitq"])
def test_one_query_and_many_have_the_same_answers(kind: Kind) -> None:
    """Many queries copy the codes that are allowed, one passes over the others."""
    index = index_of(kind)
    allowed = np.sort(IDS[:700])
    many = np.repeat(QUERIES, 40, axis=0)  # 1000 x 6000 vectors, in 128 lists
    ids, scores = index.search(many, 10, ids=allowed)
    for row in range(3):
        one = index.search(QUERIES[row : row + 1], 10, ids=allowed)
        np.testing.assert_array_equal(one[0][0], ids[40 * row])
        np.testing.assert_allclose(one[1][0], scores[40 * row], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_exact_kinds_equal_brute_force_for_any_ids(data: Any) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    kind = data.draw(st.sampled_from(["flat", "hnsw"]))
    count = data.draw(st.sampled_from([1, 2, 50, 1000]))
    k = data.draw(st.integers(1, 30))
    rows = np.sort(rng.choice(COUNT, count, replace=False))
    ids, _ = index_of(kind).search(QUERIES[:3], k, ids=np.sort(IDS[rows]))
    found = min(k, count)
    assert ids[:, :found].tolist() == expected(rows, found)[:3]


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_rabitq", "hnsw"])
def test_one_pass_at_a_given_effort_leaves_gaps_and_never_searches_on(kind: Kind) -> None:
    index = index_of(kind)
    stats = faiss.cvar.indexIVF_stats
    stats.reset()
    padded, scores = index.search_padded(QUERIES, 2000, effort=1)
    visited = stats.nlist / len(QUERIES)
    if kind != "hnsw":  # whose candidate list is at least k long
        assert visited == 1
        assert (padded == -1).any()
    assert ((padded == -1) == (scores == -np.inf)).all()
    assert (np.diff(np.where(padded < 0, -9, scores)) <= 0).all()
    found, _ = index.search(QUERIES, 2000)
    assert found.min() >= 0


def test_few_ids_are_compared_one_by_one_whatever_their_lists() -> None:
    """Counts the codes that a query is compared with: as many as are allowed, at the most."""
    index = index_of("ivf_sq8")
    stats = faiss.cvar.indexIVF_stats
    usual = (index.effort or 0) / index.plan.num_lists * COUNT
    for count in (10, 400, 5500):
        stats.reset()
        index.search(QUERIES, 10, ids=np.sort(IDS[:count]))
        assert stats.ndis / len(QUERIES) <= min(count, 4 * usual) * 1.01


def test_searches_that_cannot_be_restricted_are_refused() -> None:
    index = index_of("flat")
    no_ids: list[Any] = [np.array([[3]]), np.array([3.5]), ["3"]]
    for ids in no_ids:
        with pytest.raises(ValueError, match="are no list of whole numbers; convert them"):
            index.search(QUERIES, 1, ids=ids)
    for ids in (np.array([5, 3]), np.array([3, 3])):
        with pytest.raises(ValueError, match=r"must ascend, each once: use numpy\.unique"):
            index.search(QUERIES, 1, ids=ids)
    some: Any = sorted(IDS[:3].tolist())
    among_a_list = index.search(QUERIES, 3, ids=some)
    np.testing.assert_array_equal(among_a_list, index.search(QUERIES, 3, ids=np.array(some)))
    bare = VectorIndex.build(VECTORS[:9], IDS[:9])
    with pytest.raises(ValueError, match="no coordinates to search an area by; give them when"):
        bare.search(QUERIES, 1, area=Area.circle(0, 0, 5))
    with pytest.raises(ValueError, match="k=0 is below 1"):
        bare.search_padded(QUERIES, 0)
    with pytest.raises(ValueError, match="have no coordinates; add others alike"):
        bare.add(VECTORS[9:10], IDS[9:10], COORDINATES[:1])
    with pytest.raises(ValueError, match="have coordinates; add others alike"):
        index.add(VECTORS[:1], np.array([10**6]))
    with pytest.raises(ValueError, match=r"coordinates\[2, 2\] are not lat and lon of each of 9"):
        VectorIndex.build(VECTORS[:9], IDS[:9], coordinates=COORDINATES[:2])
    with pytest.raises(ValueError, match="give lat, then lon"):
        VectorIndex.build(VECTORS[:1], IDS[:1], coordinates=np.array([[120.0, 5.0]]))
