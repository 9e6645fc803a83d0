"""Requests that are particular: of Google's and Azure's stores, of stalled answers."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError

from s4g_ray.errors import StoreError
from s4g_ray.storage import files, object_store
from s4g_ray.storage.byte_ranges import Range, read_ranges
from s4g_ray.storage.manifest import open_part, open_published, publish, read_part, write_part
from tests.conftest import ATTEMPTS
from tests.support.azure_server import azure_server
from tests.support.faulty_s3 import PASSING, Store, objects, seeded

pytestmark = pytest.mark.s3


@pytest.fixture
def google(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same server and proxy, as gs://: Google's store has the same XML requests."""
    account = {
        "gcs_base_url": store.proxy.endpoint,
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
        "private_key_id": "",
    }
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    return store


def test_googles_objects_are_written_listed_read_moved_and_removed_through_faults(
    google: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "20")
    google.proxy.reset(seeded(4, 0.3))
    large = os.urandom(11 << 20)
    seen = []
    for root in ("gs://data/google", str(tmp_path)):
        parts = [write_part(f"{root}/old", "part", large, 1)]
        publish(f"{root}/old", "thing", parts)
        files.write_bytes(f"{root}/odd [1]*?.bin", b"odd")
        files.move(f"{root}/old", f"{root}/new")
        part = open_published(f"{root}/new", "thing").parts[0]
        assert read_part(f"{root}/new", part) == large
        with open_part(f"{root}/new", part) as file:
            file.seek(100)
            assert file.read(50) == large[100:150]
        wanted: list[Range] = [(f"{root}/new/part", 7, 10), (f"{root}/odd [1]*?.bin", None, None)]
        names = [files.list_names(f"{root}/{folder}".rstrip("/")) for folder in ("", "new", "old")]
        files.remove(f"{root}/new")
        files.remove(f"{root}/none")
        seen.append((read_ranges(wanted[1:]), names, files.list_names(root)))
    assert seen[0] == seen[1]
    assert seen[0][2] == ["odd [1]*?.bin"]
    assert set(google.proxy.faults) == set(PASSING)
    assert objects(google.client, "data", "google/") == {"google/odd [1]*?.bin": b"odd"}


def test_a_missing_bucket_of_google_is_named(google: Store) -> None:
    with pytest.raises(StoreError, match=r"gs://none/x: NoSuchBucket .*make the bucket"):
        files.read_bytes("gs://none/x")
    with pytest.raises(FileNotFoundError, match="gs://data/none is not there"):
        files.read_bytes("gs://data/none")


def test_azures_objects_are_written_listed_read_moved_and_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    monkeypatch.setattr(object_store, "LONGEST_WAIT_S", 0.02)
    large = os.urandom(11 << 20)
    seen = []
    with azure_server() as server:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.address)
        for root in ("az://container/azure", str(tmp_path)):
            server.num_refused = 3
            publish(f"{root}/old", "thing", [write_part(f"{root}/old", "part", large, 1)])
            files.write_bytes(f"{root}/a b&ü.bin", b"0123")
            files.move(f"{root}/old", f"{root}/new")
            part = open_published(f"{root}/new", "thing").parts[0]
            assert read_part(f"{root}/new", part) == large
            wanted: list[Range] = [(f"{root}/a b&ü.bin", 1, 2), (f"{root}/a b&ü.bin", 4, None)]
            names = [files.list_names(f"{root}/{name}".rstrip("/")) for name in ("", "new", "old")]
            there = [files.exists(f"{root}/{name}") for name in ("new", "new/part", "old")]
            files.remove(f"{root}/new")
            files.remove(f"{root}/none")
            seen.append((read_ranges(wanted), names, there, files.list_names(root)))
        assert seen[0] == seen[1]
        assert seen[0][0] == [b"12", b""]
        assert server.blobs == {"azure/a b&ü.bin": b"0123"}
        assert server.requests.count("PUT block") == 3 + 3  # pieces, and those refused
        with pytest.raises(FileNotFoundError, match="az://container/none is not there"):
            files.read_bytes("az://container/none")
        with pytest.raises(StoreError, match=r"az://other/x: ContainerNotFound .*make the bucket"):
            files.read_bytes("az://other/x")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(StoreError, match=r"^az://container: .*Account.*AZURE_STORAGE_ACCOUNT_NAME"):
        files.read_bytes("az://container/x")


def test_an_answer_that_stalls_is_given_up_after_the_timeout_and_asked_for_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_bytes("s3://data/stalled", b"there")
    monkeypatch.setenv("S4G_S3_TIMEOUT_S", "0.5")
    over = threading.Event()

    def stall(operation: str, key: str, number: int) -> None:
        if number == 1:
            over.wait(60)

    store.proxy.reset(stall)
    assert files.read_bytes("s3://data/stalled") == b"there"
    assert 2 <= len(store.proxy.requests) <= ATTEMPTS
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store.proxy.reset(stall)
    with pytest.raises(StoreError, match=r"s3://data/stalled: ReadTimeoutError .*get_object"):
        files.read_bytes("s3://data/stalled")
    over.set()


def test_a_signal_is_handled_while_the_store_does_not_answer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGTERM before a machine is taken away."""

    class StoppedError(Exception): ...

    def stop(*_: object) -> None:
        raise StoppedError

    over = threading.Event()
    answered: list[bool] = []
    store.proxy.reset(lambda operation, key, number: answered.append(over.wait(60)))
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(StoppedError):
            files.read_bytes("s3://data/x")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert answered == []
    over.set()


def test_reads_and_uploads_of_large_objects_share_few_connections(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None waits for what another holds."""
    monkeypatch.setenv("S4G_S3_MAX_CONNECTIONS", "2")
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    large = os.urandom(11 << 20)
    uris = [f"s3://data/shared/{number}" for number in range(4)]
    for uri in uris:
        files.write_bytes(uri, large)
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(files.read_bytes, uri) for uri in uris * 3]
        for uri in uris:
            files.write_bytes(f"{uri}/again", large)
            assert read_ranges([(uri, 0, None), (f"{uri}/again", 1, len(large) - 1)])[0] == large
        assert all(read.result(60) == large for read in reads)


def test_objects_move_to_another_bucket_and_large_ones_piece_by_piece(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.client.create_bucket(Bucket="other")
    files.write_bytes("s3://data/travel/x", b"1")
    files.move("s3://data/travel", "s3://other/travel")
    monkeypatch.setattr(object_store, "MAX_COPY", 10)
    monkeypatch.setattr(object_store, "PIECE", 5 << 20)
    large = os.urandom(11 << 20)
    files.write_bytes("s3://other/travel/large", large)
    files.move("s3://other/travel", "s3://other/home")
    assert objects(store.client, "other") == {"home/x": b"1", "home/large": large}
    assert objects(store.client, "data", "travel/") == {}


def test_a_listing_of_several_pages_that_is_cut_short_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"pages/{number}" for number in range(9)]
    for name in names:
        files.write_bytes(f"s3://data/{name}", b"x")
    listing = obstore.list
    offsets: list[str | None] = []

    def list_pages(*arguments: Any, offset: str | None = None, **_: Any) -> Iterator[Any]:
        """Yield pages of 4; the connection breaks twice, after the first page."""
        offsets.append(offset)
        for number, page in enumerate(listing(*arguments, offset=offset, chunk_size=4)):
            if number == 1 and len(offsets) < 3:
                raise GenericError("Generic S3 error: HTTP error: request or response body error")
            yield page

    monkeypatch.setattr(obstore, "list", list_pages)
    filesystem, path = files.filesystem_of("s3://data/pages")
    assert filesystem.find(path) == [f"data/{name}" for name in names]
    assert offsets == [None, names[3], names[7]]
