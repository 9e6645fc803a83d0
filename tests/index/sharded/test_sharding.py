from __future__ import annotations

import dataclasses
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s4g_ray.arrays import spread_rows
from s4g_ray.data.tables.embedding_table import (
    read_embedding_parts,
    read_embeddings,
    read_groups,
)
from s4g_ray.errors import RunError
from s4g_ray.index.sharded.sharding import (
    DEALS_PER_SHARD,
    PartCount,
    RowRange,
    TablePart,
    check_ids,
    check_vectors,
    deal_rows,
    fingerprint_ids,
    kept_rows,
    open_sources,
    pick_rows,
    read_ranges,
    sorted_ids,
)
from s4g_ray.storage.manifest import Part
from tests.support.embedding_tables import (
    STAMP,
    random_unit,
    write_table,
)


def fake_sources(count: int) -> list[TablePart]:
    return [
        TablePart("/t", Part(f"references/part-{i:05d}.parquet", 0, 0, "")) for i in range(count)
    ]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=8), st.integers(1, 6)
)
def test_dealt_ranges_hold_each_kept_row_once_and_the_shards_are_even(
    counts: list[list[int]], num_shards: int
) -> None:
    sources = fake_sources(len(counts))
    every = [
        (part, group, row)
        for part, groups in enumerate(counts)
        for group, count in enumerate(groups)
        for row in range(count)
    ]
    if len(every) < num_shards:
        with pytest.raises(
            RunError, match=rf"{len(every)} references cannot fill mining.num_shards={num_shards}"
        ):
            deal_rows(sources, counts, num_shards)
        return
    shares = deal_rows(sources, counts, num_shards)
    held = [
        (piece.first + row - piece.start, (sources.index(piece.source), piece.group, row))
        for share in shares
        for piece in share
        for row in range(piece.start, piece.stop)
    ]
    assert sorted(held) == list(enumerate(every))
    sizes = [sum(map(len, share)) for share in shares]
    longest = max(len(piece) for share in shares for piece in share)
    assert max(sizes) - min(sizes) <= longest
    assert longest <= max(1, len(every) // (num_shards * DEALS_PER_SHARD))
    for share in shares:
        assert [piece.first for piece in share] == sorted(piece.first for piece in share)


def test_each_stretch_of_a_large_table_is_dealt_evenly_and_row_groups_stay_whole() -> None:
    counts = [[1000] * 16] * 60
    shares = deal_rows(fake_sources(60), counts, 8)
    pieces = [piece for share in shares for piece in share]
    assert {(piece.start, piece.stop) for piece in pieces} == {(0, 1000)}
    for start in range(0, 960_000, 32_000):  # 32 row groups: as many as an IVF query visits
        ends = (start, start + 32_000)
        near = [sum(ends[0] <= piece.first < ends[1] for piece in share) for share in shares]
        assert near == [4] * 8


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 99))
def test_a_sample_takes_one_row_of_each_equal_range(num_rows: int, size: int, seed: int) -> None:
    rows = spread_rows(num_rows, size, seed)
    assert rows.tolist() == spread_rows(num_rows, size, seed).tolist()
    if size >= num_rows:
        assert rows.tolist() == list(range(num_rows))
        return
    for i, row in enumerate(rows.tolist()):
        assert num_rows * i // size <= row < num_rows * (i + 1) // size


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=10), st.sets(st.integers(0, 20), min_size=1))
def test_kept_rows_are_those_whose_id_is_wanted(ids: list[int], wanted: set[int]) -> None:
    found = kept_rows(np.array(ids, dtype=np.int64), np.array(sorted(wanted)))
    assert found.tolist() == [row for row, i in enumerate(ids) if i in wanted]


def test_ranges_are_read_as_by_filtering_and_cutting_the_whole_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(1000)[:230]
    vectors = random_unit(rng, 230)
    sources, _ = open_sources([write_table(tmp_path / "e", ids, vectors, group_rows=20)])
    wanted = np.sort(rng.choice(ids, 120, replace=False))
    is_kept = np.isin(ids, wanted)
    kept = np.flatnonzero(is_kept)
    edges = [[0, 20, 40, 50], [50, 70, 90, 100], [100, 120, 140, 150], [150, 170, 190, 200]]
    edges.append([200, 220, 230])
    counts = [[int(is_kept[a:b].sum()) for a, b in pairwise(part)] for part in edges]
    row_of = {int(i): row for row, i in enumerate(ids[kept])}
    picked = np.array([0, 3, 17, 39, 40, 90, 119])
    found: list[int] = []
    for share in deal_rows(sources, counts, 3):
        read = list(read_ranges(share, wanted))
        own = [row_of[i] for i in np.concatenate([i for i, _ in read]).tolist()]
        np.testing.assert_array_equal(np.concatenate([v for _, v in read]), vectors[kept][own])
        rows = pick_rows(share, picked)
        assert rows.tolist() == sorted(set(own) & set(picked.tolist()))
        some = [i.tolist() for i, _ in read_ranges(share, wanted, picked)]
        assert list(chain(*some)) == ids[kept][rows].tolist()
        found.extend(own)
    assert sorted(found) == list(range(120))


def test_row_groups_are_read_alone_and_altered_pages_are_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = random_unit(rng, 400)
    table = write_table(tmp_path / "e", np.arange(400), vectors, part_rows=400, group_rows=100)
    part = open_sources([table])[0][0].part
    file = tmp_path / "e" / part.name
    third = read_groups(table, part, [2])[0]
    assert third.ids.tolist() == list(range(200, 300))
    np.testing.assert_array_equal(third.vectors, vectors[200:300])
    data = bytearray(file.read_bytes())
    data[data.find(vectors[250].tobytes())] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(RunError, match=r"part-00000\.parquet differs from the published file"):
        read_groups(table, part, [2])
    assert read_groups(table, part, [3])[0].ids.tolist() == list(range(300, 400))


def test_float16_parts_are_read_as_float32_part_by_part_as_in_one_call(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(120)
    vectors = random_unit(rng, 120).astype(np.float16)
    table = write_table(tmp_path / "e", ids, vectors, stamp=None)
    parts = list(read_embedding_parts(table, "references"))
    assert [len(part) for part in parts] == [50, 50, 20]
    whole = read_embeddings(table, "references")
    assert whole.vectors.dtype == np.float32
    np.testing.assert_array_equal(whole.vectors, vectors.astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([part.vectors for part in parts]), whole.vectors)
    assert whole.place_ids.tolist() == (ids + 1).tolist()


def test_ids_that_repeat_are_negative_or_missing_are_refused_by_name() -> None:
    sources = fake_sources(3)
    check_ids(np.array([5, 1, 9]), [1, 0, 2], sources, np.array([1, 5, 9]))
    with pytest.raises(
        RunError, match=r"id 7 occurs twice, in /t/\S*00000\S* and in /t/\S*00002\S* \(1 repeated"
    ):
        check_ids(np.array([7, 3, 4, 7]), [2, 0, 2], sources, None)
    with pytest.raises(RunError, match=r"id -4 is negative"):
        check_ids(np.array([7, -4]), [1, 1, 0], sources, None)
    with pytest.raises(RunError, match=r"2 of 4 ids to index are not in /t, the first is 2; "):
        check_ids(np.array([1, 9]), [1, 1, 0], sources, np.array([1, 2, 8, 9]))
    for ids in ([3, 4, 3], []):
        with pytest.raises(
            RunError, match=rf"the {len(ids)} ids to index hold {len(set(ids))} different ones"
        ):
            sorted_ids(np.array(ids, dtype=np.int64))


def test_vectors_of_another_width_or_type_are_refused_by_file() -> None:
    sources = fake_sources(2)
    good = PartCount((3,), 16, "float32")
    assert check_vectors(sources, [good, good], STAMP) == 16
    with pytest.raises(
        RunError,
        match=r"/t/\S*00001\S* holds vectors of D=8, float32, where D=16, float32 is wanted",
    ):
        check_vectors(sources, [good, PartCount((3,), 8, "float32")], None)
    with pytest.raises(
        RunError, match=r"/t/\S*00000\S* holds vectors of D=16, float16, where D=16, float32"
    ):
        check_vectors(sources, [PartCount((3,), 16, "float16")] * 2, STAMP)


def test_embeddings_from_two_checkpoints_are_refused_naming_both_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    later = dataclasses.replace(STAMP, weights_sha256="w8")
    one = write_table(tmp_path / "a", np.arange(10), random_unit(rng, 10))
    other = write_table(tmp_path / "b", np.arange(10, 20), random_unit(rng, 10), stamp=later)
    unstamped = write_table(tmp_path / "c", np.arange(20, 30), random_unit(rng, 10), stamp=None)
    with pytest.raises(
        RunError,
        match=r"two checkpoints in one index: \S*/a was made with weights_sha256 'w7',"
        r" \S*/b with 'w8'",
    ):
        open_sources([one, other])
    with pytest.raises(RunError, match=r"\S*/a was made with step 7, \S*/c with None"):
        open_sources([one, unstamped])
    with pytest.raises(RunError, match=r"made with weights_sha256 'w8', but 'w7' is wanted"):
        open_sources([other], STAMP)
    with pytest.raises(RunError, match="holds no published embeddings"):
        open_sources([str(tmp_path / "none")])
    with pytest.raises(RunError, match="no embedding table is given"):
        open_sources([])


def test_vectors_to_index_that_are_not_finite_are_refused_by_file_and_id(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    vectors = random_unit(rng, 100)
    vectors[70, 3] = np.nan
    sources, _ = open_sources([write_table(tmp_path / "e", np.arange(100) + 500, vectors)])
    ranges = [RowRange(source, 0, 0, 50, 50 * i) for i, source in enumerate(sources)]
    with pytest.raises(
        RunError, match=r"part-00001\.parquet: the embedding of id 570 is not finite \(1 such\)"
    ):
        list(read_ranges(ranges, None))
    wanted = np.array([i for i in range(500, 600) if i != 570])
    without_570 = [ranges[0], RowRange(sources[1], 0, 0, 49, 50)]
    assert sum(len(ids) for ids, _ in read_ranges(without_570, wanted)) == 99


def test_a_fingerprint_tells_other_ids_apart_and_not_their_order() -> None:
    ids = np.array([5, 2, 9])
    assert fingerprint_ids(ids) == fingerprint_ids(np.array([9, 5, 2], dtype=np.int32))
    assert fingerprint_ids(ids) != fingerprint_ids(ids[:2])
    assert fingerprint_ids(None) is None
