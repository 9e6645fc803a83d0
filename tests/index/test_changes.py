"""Adding, replacing and removing vectors, against a dict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.data.area import Area
from s4g_ray.index.plan import Kind, plan_index
from s4g_ray.index.vector_index import VectorIndex
from tests.support.search_oracle import KINDS, Array, brute_force, clustered, recall

DIM = 8
POOL = clustered(500, DIM, seed=7)
PLACES = np.random.default_rng(0).uniform(-90, 90, (500, 2))
WEST = Area.bounds(-180, -90, 0, 90)
TEMPLATES: dict[str, bytes] = {}
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["add", "replace", "remove", "reload"]),
        st.integers(0, 10**6),
        st.integers(1, 60),
    ),
    min_size=1,
    max_size=8,
)


def empty(kind: Kind) -> VectorIndex:
    plan = plan_index(400, DIM, kind=kind)
    if kind not in TEMPLATES:
        TEMPLATES[kind] = VectorIndex.template(plan, POOL)
    return VectorIndex.empty(plan, TEMPLATES[kind], num_threads=1)


def check(index: VectorIndex, model: dict[int, int]) -> None:
    """Compare with a dict of the row of POOL that each id stands for."""
    assert len(index) == len(model)
    ids = np.array(sorted(model), np.int64)
    rows = np.array([model[i] for i in ids.tolist()], np.int64)
    assert index.holds(ids).all()
    assert not index.holds(np.array([10**7])).any()
    if not len(ids):
        return
    queries = POOL[:6] + 0.01
    k = min(len(ids), 5)
    found, scores = index.search(queries, k)
    wanted, cosines = brute_force(POOL[rows], ids, queries, k)
    assert np.isin(found, ids).all()
    assert all(len(set(row)) == k for row in found.tolist())
    if index.plan.is_exact:
        np.testing.assert_allclose(scores, cosines, atol=2e-3)
    if index.kind == "flat":
        assert found.tolist() == wanted or len(set(rows.tolist())) < len(rows)
    every, _ = index.search(queries, len(ids))
    assert (np.sort(every, axis=1) == ids).all()
    some = ids[::3]
    within, _ = index.search(queries, len(some), ids=some)
    assert (np.sort(within, axis=1) == some).all()
    inside = ids[PLACES[rows, 1] <= 0]
    found, _ = index.search(queries, len(ids), area=WEST)
    assert (np.sort(found, axis=1)[:, len(ids) - len(inside) :] == inside).all()
    assert ((found == -1).sum(axis=1) == len(ids) - len(inside)).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(changes=CHANGES)
def test_any_changes_leave_what_a_dict_holds(
    kind: Kind, changes: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    index = empty(kind)
    model: dict[int, int] = {}
    for change, seed, size in changes:
        rng = np.random.default_rng(seed)
        rows = rng.choice(500, size, replace=False)
        known = rng.permutation(np.array(sorted(model), np.int64))[: size // 2]
        if change == "reload" and len(index):
            folder = str(tmp_path_factory.mktemp("index") / "i")
            index.save(folder)
            index = VectorIndex.load(folder, num_threads=1)
        elif change == "remove":
            unknown = np.array([10**7])
            assert index.remove(np.concatenate([known, unknown])) == len(known)
            for i in known.tolist():
                del model[i]
        elif change in ("add", "replace"):
            first = max(model, default=0) + 1
            ids = np.arange(first, first + size)
            if change == "replace":
                ids[: len(known)] = known
                ids = rng.permutation(ids)
                assert index.replace(POOL[rows], ids, PLACES[rows]) == len(known)
            else:
                index.add(POOL[rows], ids, PLACES[rows])
            model.update(zip(ids.tolist(), rows.tolist(), strict=True))
        check(index, model)


@pytest.mark.parametrize("kind", ["flat", "sqfp16", "ivf_sq8", "ivf_rabitq"])
def test_a_removed_vector_leaves_no_trace(kind: Kind, tmp_path: Path) -> None:
    """Files are equal, bit by bit, with and without vectors that were added and removed."""
    kept = np.random.default_rng(0).permutation(500)[:300]
    kept.sort()
    gone = np.setdiff1d(np.arange(500), kept)
    index = empty(kind)
    index.add(POOL, np.arange(500), PLACES)
    assert index.remove(gone) == 200
    never = empty(kind)
    never.add(POOL[kept], kept, PLACES[kept])
    index.save(str(tmp_path / "removed"))
    never.save(str(tmp_path / "never"))
    files = [(tmp_path / name / "index.bin").read_bytes() for name in ("removed", "never")]
    assert files[0] == files[1]


def test_a_graph_leaves_removed_vectors_out_and_is_built_anew_when_half_are_gone(
    tmp_path: Path,
) -> None:
    vectors = clustered(20_000, DIM)
    queries = clustered(20, DIM, seed=1)
    index = VectorIndex.build(vectors, np.arange(20_000), kind="hnsw", num_threads=2)
    for count, rows in ((1500, 20_000), (9000, 20_000), (10_500, 9500)):
        index.remove(np.arange(count))
        assert (len(index), len(index.store)) == (20_000 - count, rows)
        index.save(str(tmp_path / str(count)))
        wanted = brute_force(vectors[count:], np.arange(count, 20_000), queries[:3], 10)[0]
        for one in (index, VectorIndex.load(str(tmp_path / str(count)))):
            found, _ = one.search(queries, 10)
            assert found.min() >= count
            assert recall(found[:3], wanted) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_replacement_changes_nothing(kind: Kind) -> None:
    index = empty(kind)
    index.add(POOL[:400], np.arange(400))
    before = index.search(POOL[:5], 400)
    bad = np.full((1, DIM), np.nan)
    new: Array = POOL[:2]
    for vectors, ids, places in (
        (bad, np.array([3]), None),
        (new, np.array([3, 3]), None),
        (new, np.array([3, 4]), PLACES[:2]),
        (new[:, :3], np.array([3, 4]), None),
    ):
        with pytest.raises(ValueError, match=r"finite|unique|coordinates|fit"):
            index.replace(vectors, ids, places)
    np.testing.assert_array_equal(index.search(POOL[:5], 400)[0], before[0])
    assert index.remove(np.arange(400)) == 400
    assert len(index) == 0
    assert (index.search_padded(POOL[:5], 3)[0] == -1).all()
