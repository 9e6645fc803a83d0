"""Files on an S3 server in another process, behind a proxy that counts requests and can fail."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from s4g_ray.datasets.packing.tar_shards import new_object
from s4g_ray.errors import RunError, StoreError, WriteError
from s4g_ray.storage import files, manifest, object_store
from s4g_ray.storage.byte_ranges import NEAR, Range, read_ranges
from s4g_ray.storage.manifest import (
    is_published,
    latest_version,
    open_part,
    open_published,
    publish,
    published_versions,
    read_part,
    write_part,
)
from tests.conftest import ATTEMPTS
from tests.support.faulty_s3 import PASSING, Fault, Rule, Store, objects, pieces_left, seeded

pytestmark = pytest.mark.s3


def test_objects_are_written_listed_read_and_removed_like_files(
    store: Store, tmp_path: Path
) -> None:
    seen = []
    # consoles of object stores make such markers
    store.client.put_object(Bucket="data", Key="tree/a/", Body=b"")
    for root in (str(tmp_path / "tree"), "s3://data/tree"):
        for name in ("a/x", "a/y", "a/b/z", "ab/x", "odd [1]*?.bin"):
            files.write_bytes(f"{root}/{name}", name.encode())
        publish(f"{root}/a", "thing", [])
        before = [files.list_names(f"{root}/{folder}".rstrip("/")) for folder in ("", "a", "none")]
        there = [files.exists(f"{root}/{name}") for name in ("a", "a/x", "a/b", "a/none", "b")]
        published = [is_published(f"{root}/{name}") for name in ("a", "ab", "none")]
        for name in ("a", "odd [1]*?.bin", "none"):
            files.remove(f"{root}/{name}")
        after = files.list_names(root), files.exists(f"{root}/a"), files.read_bytes(f"{root}/ab/x")
        seen.append((before, there, published, after))
    assert seen[0] == seen[1]
    assert seen[1][3] == (["ab"], False, b"ab/x")


def test_a_folder_moves_and_an_interrupted_move_is_completed_by_repeating_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = "s3://data/moved"
    store.client.put_object(Bucket="data", Key="moved/old/", Body=b"")
    parts = [write_part(f"{root}/old", name, name.encode(), 1) for name in ("x", "b/y")]
    publish(f"{root}/old", "thing", parts)
    files.write_bytes(f"{root}/older", b"stays")
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", lambda uri: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.move(f"{root}/old", f"{root}/kept/deep/old")
    assert is_published(f"{root}/old")
    # a removal that is interrupted takes the manifest first
    filesystem, path = files.filesystem_of(f"{root}/old")
    filesystem.rm_file(f"{path}/{files.MANIFEST}")
    for _ in range(2):
        files.move(f"{root}/old", f"{root}/kept/deep/old")
        found = open_published(f"{root}/kept/deep/old", "thing")
        assert [read_part(f"{root}/kept/deep/old", part) for part in found.parts] == [b"x", b"b/y"]
        assert files.list_names(root) == ["kept", "older"]
    files.move(f"{root}/older", f"{root}/kept/older")
    assert files.read_bytes(f"{root}/kept/older") == b"stays"
    assert not files.exists(f"{root}/older")


def random_ranges(rng: np.random.Generator, lengths: dict[str, int]) -> list[Range]:
    """Draw ranges within, at the end of and past the end of objects, and whole objects."""
    found: list[Range] = []
    for uri, length in lengths.items():
        found += [(uri, None, None), (uri, length, 4), (uri, max(0, length - 3), 4), (uri, None, 1)]
        for _ in range(5):
            start = int(rng.integers(0, length + 1))
            found.append((uri, start, int(rng.integers(1, NEAR))))
    return [found[i] for i in rng.permutation(len(found))]


def test_ranges_equal_those_of_files_with_one_request_each_and_none_for_lengths(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object larger than a piece is requested piece by piece."""
    monkeypatch.setattr(object_store, "PIECE", 100_000)
    rng = np.random.default_rng(2)
    lengths = {"empty": 0, "small": 10, "piece": 100_000, "large": 350_001}
    for name, length in lengths.items():
        data = rng.bytes(length)
        files.write_bytes(str(tmp_path / name), data)
        store.client.put_object(Bucket="data", Key=f"ranges/{name}", Body=data)
    wanted = random_ranges(rng, lengths)
    remote = read_ranges([(f"s3://data/ranges/{name}", at, size) for name, at, size in wanted])
    local = read_ranges([(f"{tmp_path}/{name}", at, size) for name, at, size in wanted])
    for one, other in zip(remote, local, strict=True):
        assert (one == other) if isinstance(other, bytes) else isinstance(one, EOFError)
    assert {operation for operation, _ in store.proxy.requests} == {"GET"}
    store.proxy.reset()
    assert files.read_bytes("s3://data/ranges/large") == (tmp_path / "large").read_bytes()
    assert store.proxy.requests == [("GET", "data/ranges/large")] * 4
    store.proxy.reset()
    assert (
        files.read_bytes("s3://data/ranges/piece", 5, 20) == (tmp_path / "piece").read_bytes()[5:25]
    )
    assert store.proxy.requests == [("GET", "data/ranges/piece")]


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("size", [1000, 12_000_000])
def test_requests_that_fail_for_a_while_succeed_in_the_end(
    store: Store, monkeypatch: pytest.MonkeyPatch, fault: Fault, size: int
) -> None:
    """Every request fails until its third attempt. A large object has several parts."""
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    store.proxy.reset(lambda operation, key, number: fault if number < 3 else None)
    folder = f"s3://data/{fault}/{size}"
    data = os.urandom(size)
    publish(folder, "thing", [write_part(folder, "part", data, 1)])
    manifest = open_published(folder, "thing")
    assert read_part(folder, manifest.parts[0]) == data
    assert read_ranges([(f"{folder}/part", 7, 10), (f"{folder}/part", 0, size)]) == [
        data[7:17],
        data,
    ]
    with open_part(folder, manifest.parts[0]) as file:
        file.seek(100)
        assert file.read(50) == data[100:150]
    assert is_published(folder)
    assert not files.exists(f"{folder}/none")
    assert files.list_names(folder) == [files.MANIFEST, "part"]
    files.remove(folder)
    assert objects(store.client, "data", f"{fault}/{size}/") == {}
    assert store.proxy.faults[fault] > 10
    assert pieces_left(store.client, "data") == []


def send(uri: str, data: bytes) -> None:
    with new_object(uri) as file:
        file.write(data)


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("size", [0, 1000, 12_000_000])
def test_a_file_is_sent_although_requests_fail_for_a_while(
    store: Store, monkeypatch: pytest.MonkeyPatch, fault: Fault, size: int
) -> None:
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    store.proxy.reset(lambda operation, key, number: fault if number < 3 else None)
    data = os.urandom(size)
    send("s3://data/sent/file", data)
    assert objects(store.client, "data", "sent/") == {"sent/file": data}
    assert pieces_left(store.client, "data") == []


@pytest.mark.parametrize("write", [send, files.write_bytes])
def test_a_large_object_is_whole_when_only_the_answer_to_its_completion_was_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch, write: Callable[[str, bytes], None]
) -> None:
    """The store then no longer has the upload."""
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    faults: dict[int, Fault] = {1: "cut", 2: "gone"}
    store.proxy.reset(
        lambda operation, key, number: faults.get(number) if operation == "END_UPLOAD" else None
    )
    data = os.urandom(6 << 20)
    write("s3://data/lost", data)
    assert files.read_bytes("s3://data/lost") == data
    assert Counter(operation for operation, _ in store.proxy.requests)["PUT_PART"] == 2
    store.proxy.reset(
        lambda operation, key, number: "gone" if operation == "END_UPLOAD" and number == 1 else None
    )
    write("s3://data/lost", data[::-1])  # the older object does not count as this one
    assert files.read_bytes("s3://data/lost") == data[::-1]


@pytest.mark.parametrize("write", [send, files.write_bytes])
@pytest.mark.parametrize("aborts", [True, False])
def test_no_piece_follows_a_failed_one_and_the_error_names_the_request(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[str, bytes], None],
    aborts: bool,
) -> None:
    """The error is that of the piece, or of aborting when this fails too."""
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    monkeypatch.setattr(object_store, "PIECES_AT_ONCE", 2)
    failing = ("PUT_PART",) if aborts else ("PUT_PART", "ABORT_UPLOAD")
    store.proxy.reset(lambda operation, key, number: "deny" if operation in failing else None)
    request = "upload_part" if aborts else "abort_multipart_upload"
    with pytest.raises(RunError, match=rf"s3://data/given-up.*AccessDenied .* to {request}"):
        write("s3://data/given-up", bytes(26 << 20))
    counts = Counter(operation for operation, _ in store.proxy.requests)
    assert counts["BEGIN_UPLOAD"] == counts["ABORT_UPLOAD"] == 1
    assert counts.total() == 2 + counts["PUT_PART"] <= 4  # the second is under way, or given up
    for upload in store.client.list_multipart_uploads(Bucket="data").get("Uploads", []):
        store.client.abort_multipart_upload(
            Bucket="data", Key=upload["Key"], UploadId=upload["UploadId"]
        )


def test_an_object_that_is_replaced_while_it_is_read_is_read_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PIECE", 100)
    old = b"a" * 1000
    new = b"b" * 900

    def replace(operation: str, key: str, number: int) -> None:
        if number == 2:
            store.client.put_object(Bucket="data", Key="replaced", Body=new)

    store.client.put_object(Bucket="data", Key="replaced", Body=old)
    store.proxy.reset(replace)
    assert files.read_bytes("s3://data/replaced") == new
    writes = iter(range(10_000))

    def replace_always(operation: str, key: str, number: int) -> None:
        store.client.put_object(Bucket="data", Key="replaced", Body=b"%04d" % next(writes) * 200)

    store.proxy.reset(replace_always)
    with pytest.raises(StoreError, match="s3://data/replaced: PreconditionFailed"):
        files.read_bytes("s3://data/replaced")


def test_a_bulk_delete_that_leaves_a_key_is_repeated(store: Store) -> None:
    files.write_bytes("s3://data/bulk/a", b"a")
    store.proxy.reset(
        lambda operation, key, number: (
            "partial" if operation == "DELETE_MANY" and number == 1 else None
        )
    )
    files.remove("s3://data/bulk")
    assert store.proxy.faults == {"partial": 1}
    assert objects(store.client, "data", "bulk/") == {}


def test_a_range_that_cannot_be_read_does_not_affect_the_others(store: Store) -> None:
    names = [f"s3://data/apart/{i}" for i in range(20)]
    for name in names:
        files.write_bytes(name, name.encode())
    store.proxy.reset(lambda operation, key, number: "slow_down" if key.endswith("/7") else None)
    found = read_ranges([(name, None, None) for name in [*names, "s3://data/apart/none"]])
    assert [data for i, data in enumerate(found[:20]) if i != 7] == [
        n.encode() for i, n in enumerate(names) if i != 7
    ]
    assert isinstance(found[7], StoreError)
    assert isinstance(found[20], FileNotFoundError)
    assert Counter(store.proxy.requests)["GET", "data/apart/7"] == ATTEMPTS


def test_requests_at_the_same_time_stay_within_the_configured_number(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S4G_S3_MAX_CONNECTIONS", "3")
    names = [f"s3://data/many/{i}" for i in range(40)]
    for name in names:
        files.write_bytes(name, b"x")
    store.proxy.max_running = 0
    with ThreadPoolExecutor(4) as pool:
        wanted: list[Range] = [(name, None, None) for name in names]
        found = list(pool.map(read_ranges, [wanted] * 4))
    assert found == [[b"x"] * 40] * 4
    assert 1 < store.proxy.max_running <= 3


def test_a_whole_object_that_is_wanted_several_times_is_one_request(store: Store) -> None:
    files.write_bytes("s3://data/whole", b"0123")
    store.proxy.reset()
    wanted: list[Range] = [
        ("s3://data/whole", 0, None),
        ("s3://data/whole", 1, 2),
        ("s3://data/whole", None, None),
    ]
    assert read_ranges(wanted) == [b"0123", b"12", b"0123"]
    assert store.proxy.requests == [("GET", "data/whole")] * 2


def deny_only(chosen: int) -> Rule:
    """Return a rule by which a single request fails: the chosen one in the order of all."""
    numbers = itertools.count()
    return lambda operation, key, number: "deny" if next(numbers) == chosen else None


def test_readers_never_see_a_half_published_folder_whichever_request_fails(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large part is uploaded in pieces. A failed upload leaves neither object nor pieces."""
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    data = {"small": b"s" * 10, "large": os.urandom(11 << 20)}

    def publish() -> None:
        parts = [write_part("s3://data/half/v=0002", name, data[name], 1) for name in data]
        manifest.publish("s3://data/half/v=0002", "thing", parts)

    manifest.publish("s3://data/half/v=0001", "thing", [])
    publish()
    writes = [operation for operation, key in store.proxy.requests if "v=0002" in key]
    assert Counter(writes) == {
        "PUT": 2,
        "BEGIN_UPLOAD": 1,
        "PUT_PART": 3,
        "END_UPLOAD": 1,
    }
    for failing in range(len(writes)):
        files.remove("s3://data/half/v=0002")
        store.proxy.reset(deny_only(failing))
        with pytest.raises(WriteError, match=r"s3://data/half/v=0002/"):
            publish()
        store.proxy.reset()
        assert latest_version("s3://data/half", "v") == 1
        assert published_versions("s3://data/half", "v") == [1]
        with pytest.raises(RunError, match="no published thing"):
            open_published("s3://data/half/v=0002", "thing")
        there = objects(store.client, "data", "half/v=0002/")
        assert all(data[key.rpartition("/")[2]] == value for key, value in there.items())
        assert pieces_left(store.client, "data") == []
    publish()
    assert published_versions("s3://data/half", "v") == [1, 2]


def test_spawned_processes_and_threads_read_after_the_parent_has_read(store: Store) -> None:
    uri = "s3://data/apart/process"
    files.write_bytes(uri, b"there")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(files.read_bytes, (uri,)).get(300) == b"there"
    store.proxy.reset(seeded(3, 0.3))
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(files.read_bytes, [uri] * 100)) == [b"there"] * 100
    assert store.proxy.faults.total() > 10


def test_a_forked_process_reads_unless_its_parent_has_used_a_store_and_never_waits_for_ever(
    store: Store,
) -> None:
    files.write_bytes("s3://data/apart/forked", b"there")
    with (
        multiprocessing.get_context("fork").Pool(1) as pool,
        pytest.raises(RunError, match=r"forked from one that has used an object store.*spawn"),
    ):
        pool.apply_async(files.read_bytes, ("s3://data/apart/forked",)).get(300)
    script = """
import multiprocessing
from s4g_ray.storage import files, store_filesystem
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.apply_async(files.read_bytes, ("s3://data/apart/forked",)).get(300))
print(files.read_bytes("s3://data/apart/forked"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300)
    assert done.stdout == b"b'there'\n" * 2, done.stderr
