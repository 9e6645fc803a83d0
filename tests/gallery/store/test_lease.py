"""One process at a time writes a gallery."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from s4g_ray.errors import InputError, StoreError
from s4g_ray.gallery.store import lease as leases
from s4g_ray.gallery.store.lease import Lease, writing
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from tests.support.faulty_s3 import Store


@pytest.fixture(autouse=True)
def settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLE_S", 0.05)


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def reporter(lines: io.StringIO) -> Reporter:
    return Reporter(Console(file=lines, width=500))


def write_lease(folder: Path, **changed: object) -> None:
    value = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "token": "other",
        "heartbeat": time.time(),
        **changed,
    }
    (folder / "writer.json").write_text(json.dumps(value))


def wait_for(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_writer_is_refused_and_the_first_goes_on(
    tmp_path: Path, reporter: Reporter
) -> None:
    with writing(str(tmp_path), reporter) as first:
        message = rf"is being written by process {os.getpid()} on \S+ \(last sign \d+ s ago\)"
        with pytest.raises(InputError, match=message), writing(str(tmp_path), reporter):
            pass
        first.check()
    assert list(tmp_path.iterdir()) == []
    with writing(str(tmp_path), reporter):
        pass


@pytest.mark.parametrize(
    ("age_s", "changed", "reason"),
    [
        (500, {"host": "elsewhere"}, "it gave no sign for "),
        (30, {"pid": 2**22 + 1}, "it has ended"),
        (0, {"heartbeat": None}, "its lease is damaged"),
    ],
)
def test_a_stale_lease_is_taken_over_with_a_message(
    tmp_path: Path,
    reporter: Reporter,
    lines: io.StringIO,
    age_s: float,
    changed: dict[str, object],
    reason: str,
) -> None:
    write_lease(tmp_path, **{"heartbeat": time.time() - age_s, **changed})
    with writing(str(tmp_path), reporter) as lease:
        lease.check()
    assert f"took over {tmp_path} from process" in lines.getvalue()
    assert reason in lines.getvalue()


@pytest.mark.parametrize(("host", "age_s"), [("elsewhere", 20), (socket.gethostname(), 5)])
def test_a_writer_of_another_host_or_container_is_alive_while_it_gives_signs(
    tmp_path: Path, reporter: Reporter, host: str, age_s: float
) -> None:
    write_lease(tmp_path, host=host, pid=2**22 + 1, heartbeat=time.time() - age_s)
    with pytest.raises(InputError, match=f"on {host}"), writing(str(tmp_path), reporter):
        pass
    assert json.loads((tmp_path / "writer.json").read_text())["token"] == "other"


def test_a_store_that_fails_does_not_end_a_lease(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    read_json = files.read_json
    failures = 0

    def fail(_: str) -> None:
        nonlocal failures
        failures += 1
        raise StoreError("s3://data/written cannot be read: 503")

    def read_beat() -> float:
        return float(read_json(f"{tmp_path}/writer.json")["heartbeat"])

    with writing(str(tmp_path), reporter) as lease:
        monkeypatch.setattr(files, "read_json", fail)
        wait_for(lambda: failures > 2)
        with pytest.raises(StoreError, match="503"):
            lease.check()
        with pytest.raises(StoreError, match="503"), writing(str(tmp_path), reporter):
            pass  # a lease that cannot be read is not taken as damaged
        monkeypatch.setattr(files, "read_json", read_json)
        first = read_beat()
        wait_for(lambda: read_beat() > first)
        lease.check()


def test_a_writer_that_lost_its_lease_does_not_publish(tmp_path: Path, reporter: Reporter) -> None:
    lease = Lease(str(tmp_path))
    lease.acquire(reporter)
    write_lease(tmp_path)
    message = rf"was taken over by process {os.getpid()} on \S+; nothing was published"
    with pytest.raises(InputError, match=message):
        lease.check()
    lease.check(every_s=60)  # of a check that is not due
    lease.release()
    assert (tmp_path / "writer.json").exists()  # that of the other


def test_the_heartbeat_goes_on(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    with writing(str(tmp_path), reporter):
        first = (tmp_path / "writer.json").read_text()
        wait_for(lambda: (tmp_path / "writer.json").read_text() != first)


@pytest.mark.s3
def test_an_object_store_has_one_writer_too(store: Store, reporter: Reporter) -> None:
    with (
        writing("s3://data/written", reporter),
        pytest.raises(InputError, match="is being written by"),
        writing("s3://data/written", reporter),
    ):
        pass
    with writing("s3://data/written", reporter):
        pass


def test_a_file_system_without_links_has_one_writer_too(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("links are not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with writing(str(tmp_path), reporter) as first:
        with (
            pytest.raises(InputError, match="is being written by"),
            writing(str(tmp_path), reporter),
        ):
            pass
        first.check()
    assert list(tmp_path.iterdir()) == []
