"""One process at a time writes a folder."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from s4g_ray.errors import InputError, OwnershipLostError, RunError, StoreError
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.ownership import lease as leases
from s4g_ray.storage.ownership import lease_files
from s4g_ray.storage.ownership.lease import Lease, owning
from s4g_ray.storage.ownership.owner import Owner
from s4g_ray.storage.store_filesystem import StoreFileSystem
from tests.support.faulty_s3 import Fault, Store

LIMIT_S = 60.0
GARBAGE = [b"", b"{", b"[]", b"null", b'{"format": "s4g-owner"}', b"\xff\x00", b"[" * 10_000]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_files, "SETTLE_S", 0.05)
    monkeypatch.setattr(leases, "POLL_S", 0.02)


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def reporter(lines: io.StringIO) -> Reporter:
    return Reporter(Console(file=lines, width=500))


def elsewhere() -> Owner:
    """Return a process of another machine."""
    return replace(Owner.of_this_process(), host="elsewhere", machine="another", pid=7, token="t")


def write_lease(folder: Path, owner: Owner, age_s: float = 0.0) -> Path:
    path = folder / files.LEASE
    path.write_bytes(owner.to_bytes())
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def wait_for(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_lost(lease: Lease) -> bool:
    try:
        lease.watch()
    except OwnershipLostError:
        return True
    return False


HOLD = """
import sys, time
from s4g_ray.storage.ownership import lease as leases
leases.BEAT_S = 0.5
with leases.owning(sys.argv[1], interrupts="interrupts" in sys.argv) as lease:
    print("on", flush=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if "interrupts" in sys.argv:
            time.sleep(120)
        lease.watch()
        time.sleep(0.02)
"""


@contextmanager
def holding(folder: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run another process that holds the lease of a folder until it is stolen or killed."""
    command = [sys.executable, "-c", HOLD, folder, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_one_that_was_killed_is_replaced_at_once(
    tmp_path: Path, reporter: Reporter, lines: io.StringIO
) -> None:
    with holding(str(tmp_path)) as process:
        message = (
            rf"{tmp_path} is being written by process {process.pid} of \S+ on"
            rf" {socket.gethostname()}.* since 20\d\d-\d\d-\d\d .* UTC, last sign of life \d+ s"
            r" ago; wait until it ends.* --steal"
        )
        with pytest.raises(InputError, match=message), owning(str(tmp_path), reporter):
            pass
        assert process.poll() is None
        process.kill()
        process.wait()
    with owning(str(tmp_path), reporter) as lease:
        lease.check()
    assert f"took over {tmp_path} from process {process.pid}" in lines.getvalue()
    assert "it has ended" in lines.getvalue()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["asks", "interrupts"])
def test_a_process_whose_lease_is_stolen_stops(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.5)
    with holding(str(tmp_path), way) as process:
        with owning(str(tmp_path), reporter, steal=True) as lease:
            assert process.wait(timeout=LIMIT_S) == 1
            lease.check()
        assert process.stderr is not None
        told = process.stderr.read().decode()
    assert f"was taken over by process {os.getpid()} of" in told
    assert told.strip().splitlines()[-1].startswith("s4g_ray.errors.OwnershipLostError: ")
    assert issubclass(OwnershipLostError, RunError)  # exit code 1
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_id_is_not_the_owner(
    tmp_path: Path, reporter: Reporter, lines: io.StringIO
) -> None:
    write_lease(tmp_path, replace(Owner.of_this_process(), started="1", token="t"))
    with owning(str(tmp_path), reporter):
        pass
    assert "it has ended" in lines.getvalue()


def test_a_process_that_nobody_has_asked_for_has_ended(tmp_path: Path, reporter: Reporter) -> None:
    with holding(str(tmp_path)) as process:
        os.kill(process.pid, 9)
        wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z")
        with owning(str(tmp_path), reporter):
            pass


@pytest.mark.parametrize("data", GARBAGE)
def test_a_damaged_lease_is_taken_over(
    tmp_path: Path, reporter: Reporter, lines: io.StringIO, data: bytes
) -> None:
    (tmp_path / files.LEASE).write_bytes(data)
    with owning(str(tmp_path), reporter) as lease:
        lease.check()
    assert "from a process whose lease is damaged: its lease is damaged" in lines.getvalue()


def test_a_lease_of_another_machine_is_stale_by_the_clock_of_the_disk(
    tmp_path: Path, reporter: Reporter, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lease(tmp_path, elsewhere(), age_s=500)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock of this machine does not matter
    with owning(str(tmp_path), reporter):
        pass
    assert "from process 7 of" in lines.getvalue()
    assert "it gave no sign of life for 500 s" in lines.getvalue()


@pytest.mark.parametrize("beats", [True, False])
def test_a_process_of_another_machine_is_alive_while_it_gives_signs(
    tmp_path: Path,
    reporter: Reporter,
    lines: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    beats: bool,
) -> None:
    path = write_lease(tmp_path, elsewhere())
    monkeypatch.setattr(leases, "STALE_S", LIMIT_S if beats else 0.3)
    ended = threading.Event()

    def beat() -> None:
        while beats and not ended.wait(0.01):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        if beats:
            with (
                pytest.raises(InputError, match=r"process 7 of .* on elsewhere"),
                owning(str(tmp_path), reporter),
            ):
                pass
        else:
            with owning(str(tmp_path), reporter) as lease:
                lease.check()
    finally:
        ended.set()
        thread.join()
    assert "waiting up to " in lines.getvalue()
    assert ("took over" in lines.getvalue()) is not beats


def test_a_store_that_fails_does_not_end_a_lease(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    failures = 0

    def fail(*_: object) -> None:
        nonlocal failures
        failures += 1
        raise StoreError("s3://data/written cannot be read: 503")

    with owning(str(tmp_path), reporter) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(lease_files.LocalLeaseFile, "beat", fail)
            patch.setattr(lease_files.LocalLeaseFile, "read", fail)
            wait_for(lambda: failures > 2)
            with pytest.raises(StoreError, match="503"):
                lease.check()
            lease.watch()
            patch.setattr(leases, "STALE_S", 0.0)
            lease.watch()  # reads the lease itself, in vain
        with pytest.raises(InputError), owning(str(tmp_path), reporter):
            pass
        lease.check()


def test_a_process_that_was_halted_notices_by_itself(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", LIMIT_S)  # no heartbeat notices it
    with owning(str(tmp_path), reporter) as lease:
        write_lease(tmp_path, elsewhere())
        lease.watch()
        monkeypatch.setattr(leases, "STALE_S", 0.0)
        with pytest.raises(OwnershipLostError, match="was taken over by process 7"):
            lease.watch()
    assert (tmp_path / files.LEASE).exists()  # that of the other


def test_an_interrupt_while_a_lease_is_awaited_is_no_loss(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    write_lease(tmp_path, elsewhere())
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt), owning(str(tmp_path), reporter):
        pytest.fail("it is another process's")


@pytest.mark.parametrize("beat_s", [0.01, 100.0])  # a heartbeat finds out, or who asks
def test_a_lease_that_only_another_user_may_read_is_lost(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch, beat_s: float
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(leases, "BEAT_S", beat_s)
    with owning(str(tmp_path), reporter) as lease, monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        if beat_s < 1:
            wait_for(lambda: is_lost(lease))
        with pytest.raises(OwnershipLostError):
            lease.check()


def test_a_removed_lease_is_lost(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    with owning(str(tmp_path / "new"), reporter) as lease:
        (tmp_path / "new" / files.LEASE).unlink()
        wait_for(lambda: is_lost(lease))
        with pytest.raises(OwnershipLostError, match="another process, which has ended"):
            lease.check()


def test_a_folder_that_was_made_in_vain_is_removed(tmp_path: Path, reporter: Reporter) -> None:
    with owning(str(tmp_path / "a" / "b"), reporter):
        assert (tmp_path / "a" / "b" / files.LEASE).exists()
    assert list(tmp_path.iterdir()) == []
    with owning(str(tmp_path / "a" / "b"), reporter):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, reporter: Reporter, name: str
) -> None:
    (tmp_path / "file").touch()
    message = r"is a file; choose another|cannot write to .*: Not a directory"
    with pytest.raises(InputError, match=message), owning(str(tmp_path / name), reporter):
        pass


def test_a_file_system_without_links_has_one_owner_too(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("links are not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with owning(str(tmp_path), reporter) as first:
        with pytest.raises(InputError, match="is being written"), owning(str(tmp_path), reporter):
            pass
        first.check()
    assert list(tmp_path.iterdir()) == []


def try_at_once(folder: str, count: int) -> list[str]:
    """Have threads take the lease at the same moment; return what came of each."""
    barrier = threading.Barrier(count)
    found: list[str] = []
    all_tried = threading.Barrier(count)

    def take() -> None:
        reporter = Reporter(Console(file=io.StringIO()))
        barrier.wait()
        try:
            with owning(folder, reporter) as lease:
                found.append("owns")
                all_tried.wait(LIMIT_S)
                lease.check()
        except InputError:
            found.append("refused")
            all_tried.wait(LIMIT_S)

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)


def test_of_processes_that_start_at_once_one_owns_the_folder(tmp_path: Path) -> None:
    assert try_at_once(str(tmp_path), 6) == ["owns", *["refused"] * 5]
    dead = replace(Owner.of_this_process(), started="1", token="t")
    write_lease(tmp_path, dead)
    found = try_at_once(str(tmp_path), 6)
    assert found.count("owns") <= 1  # a stale one that all of them find may be left to nobody


KINDS: list[Literal["conditional", "unsupported", "unconditional"]] = [
    "conditional",
    "unsupported",
    "unconditional",
]


@pytest.fixture(params=KINDS)
def any_store(request: pytest.FixtureRequest, store: Store) -> Store:
    """Return a store that knows conditional writes, refuses them, or does not heed them."""
    kind = request.param

    def rule(operation: str, *_: object) -> Fault | None:
        return None if kind == "conditional" or operation != "PUT_IF" else kind

    store.proxy.reset(rule)
    return store


@pytest.mark.s3
def test_an_object_store_has_one_owner_too(
    any_store: Store, reporter: Reporter, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.5)
    folder = "s3://data/written"
    with holding(folder) as process:
        with pytest.raises(InputError, match="is being written by"), owning(folder, reporter):
            pass
        with owning(folder, reporter, steal=True) as lease:
            assert process.wait(timeout=LIMIT_S) == 1
            lease.check()
    with holding(folder) as process:
        process.kill()
        process.wait()
        with owning(folder, reporter):
            pass
    assert "it has ended" in lines.getvalue()
    for data in GARBAGE[:3]:
        files.write_bytes(f"{folder}/{files.LEASE}", data)
        with owning(folder, reporter):
            pass
    assert files.list_names(folder) == []


@pytest.mark.s3
def test_conditions_leave_exactly_one_owner(store: Store) -> None:
    assert try_at_once("s3://data/written", 4) == ["owns", *["refused"] * 3]


@pytest.mark.s3
def test_a_lease_of_another_machine_is_stale_by_the_clock_of_the_store(
    any_store: Store, reporter: Reporter, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "s3://data/written"
    files.write_bytes(f"{folder}/{files.LEASE}", elsewhere().to_bytes())
    monkeypatch.setattr(leases, "STALE_S", 0.5)
    written: list[str] = []
    pipe_file = StoreFileSystem.pipe_file

    def remember(self: Any, path: str, *values: Any, **options: Any) -> None:
        written.append(path.rpartition("/")[2])
        pipe_file(self, path, *values, **options)

    monkeypatch.setattr(StoreFileSystem, "pipe_file", remember)
    with owning(folder, reporter) as lease:
        lease.check()
    assert "it gave no sign of life for " in lines.getvalue()
    assert files.list_names(folder) == []
    # who looks into the folder meanwhile ignores such names
    probes = set(written) - {files.LEASE}
    assert probes
    assert all(re.fullmatch(r"\..*\.tmp", name) for name in probes)


@pytest.mark.s3
def test_an_answer_that_is_lost_does_not_lose_the_lease(
    store: Store, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)

    def rule(operation: str, key: str, number: int) -> Fault | None:
        return "cut" if operation == "PUT_IF" and number % 3 == 1 else None

    store.proxy.reset(rule)
    with owning("s3://data/written", reporter) as lease:
        wait_for(lambda: store.proxy.faults["cut"] > 3)
        lease.watch()
        lease.check()
    assert files.list_names("s3://data/written") == []


@pytest.mark.s3
def test_a_heartbeat_is_one_request(
    store: Store, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    with owning("s3://data/written", reporter) as lease:
        store.proxy.reset()
        wait_for(lambda: len(store.proxy.requests) > 5)
        for _ in range(1000):
            lease.watch()
        assert {operation for operation, _ in store.proxy.requests} == {"PUT_IF"}


def test_the_heartbeat_goes_on(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    path = tmp_path / files.LEASE
    with owning(str(tmp_path), reporter) as lease:
        first = path.stat()
        wait_for(lambda: path.stat().st_mtime_ns > first.st_mtime_ns)
        assert path.stat().st_ino == first.st_ino  # no new file a beat
        lease.watch()
