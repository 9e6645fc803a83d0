"""One process at a time writes a gallery."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console

from s4g_ray.errors import InputError
from s4g_ray.gallery.store import lease as leases
from s4g_ray.gallery.store.lease import Lease, writing
from s4g_ray.progress import Reporter
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


def test_the_second_writer_is_refused_and_the_first_goes_on(
    tmp_path: Path, reporter: Reporter
) -> None:
    with writing(str(tmp_path), reporter) as first:
        message = rf"is being written by process {os.getpid()} on \S+ \(last sign 0 s ago\)"
        with pytest.raises(InputError, match=message), writing(str(tmp_path), reporter):
            pass
        first.check()
    assert list(tmp_path.iterdir()) == []
    with writing(str(tmp_path), reporter):
        pass


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"heartbeat": time.time() - 500, "host": "elsewhere"}, "it gave no sign for "),
        ({"pid": 2**22 + 1}, "it has ended"),
        ({"heartbeat": None}, "its lease is damaged"),
    ],
)
def test_a_stale_lease_is_taken_over_with_a_message(
    tmp_path: Path,
    reporter: Reporter,
    lines: io.StringIO,
    changed: dict[str, object],
    reason: str,
) -> None:
    write_lease(tmp_path, **changed)
    with writing(str(tmp_path), reporter) as lease:
        lease.check()
    assert f"took over {tmp_path} from process" in lines.getvalue()
    assert reason in lines.getvalue()


def test_a_writer_on_another_host_is_alive_while_it_gives_signs(
    tmp_path: Path, reporter: Reporter
) -> None:
    write_lease(tmp_path, host="elsewhere", pid=2**22 + 1, heartbeat=time.time() - 20)
    with pytest.raises(InputError, match="on elsewhere"), writing(str(tmp_path), reporter):
        pass
    assert json.loads((tmp_path / "writer.json").read_text())["host"] == "elsewhere"


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
        first = json.loads((tmp_path / "writer.json").read_text())["heartbeat"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / "writer.json").read_text())["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


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
