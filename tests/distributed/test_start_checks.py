"""What Ray would fail on late is one message at once."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.node import Node as RayNode

from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed import session
from s4g_ray.distributed.session import ray_session
from s4g_ray.distributed.start_checks import check_address, check_local_start, check_session
from s4g_ray.errors import InputError, RunError
from s4g_ray.storage.s3_settings import StorageConfig

LIMIT_S = 0.3
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"TMPDIR": "/tmp/" + "x" * 60},
            r"TMPDIR=/tmp/x+ is too long: the paths of Ray's sockets would have 1\d\d bytes, of at"
            r" most 107; set RAY_TMPDIR to a folder of at most \d+ bytes",
        ),
        ({"RAY_TMPDIR": "/tmp/" + "ä" * 30}, "RAY_TMPDIR=/tmp/ä+ is too long"),
        ({"TMPDIR": "/no/folder"}, "TMPDIR=/no/folder is no folder's absolute path, .*; make it"),
        ({"TMPDIR": ""}, "TMPDIR= is no folder's absolute path"),
        ({"TMPDIR": "tests"}, "TMPDIR=tests is no folder's absolute path"),
        ({"TMPDIR": "/proc"}, r"TMPDIR=/proc cannot be written \(.*\), and Ray keeps its sockets"),
        (
            {"HOME": "/proc"},
            r"HOME=/proc cannot be written \(.*\), and Ray keeps its token there.*; set HOME",
        ),
        ({"HOME": "/dev/null"}, r"HOME=/dev/null cannot be written \(Not a directory\)"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_one_message(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_local_start()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(InputError, match=message) as error,
        ray_session(RayConfig(), StorageConfig()),
    ):
        pass
    assert "\n" not in str(error.value)


def test_a_folder_as_long_as_possible_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 60)
    with pytest.raises(InputError, match="of at most") as error:
        check_local_start()
    longest = int(str(error.value).rpartition(" bytes")[0].rpartition(" ")[2])
    folder = Path("/tmp/" + "x" * (longest - len("/tmp/")))
    folder.mkdir()
    try:
        monkeypatch.setenv("TMPDIR", str(folder))
        check_local_start()
    finally:
        folder.rmdir()


def test_a_full_folder_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e9, 1e9, 5e6))
    with pytest.raises(InputError, match=r"/tmp has 5 MB free, .* take 100 MB; make room"):
        check_local_start()


@pytest.mark.parametrize(
    ("name", "value"),
    [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "{token}")],
)
def test_a_home_folder_is_wanted_for_the_token_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("abc\n")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv(name, value.format(token=tmp_path / "token"))
    check_session(RayConfig())


# what Ray 2.60's loader of tokens says of each: AuthenticationError, or a token
@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "/no/such"}, "No such file or directory"),
        ({"RAY_AUTH_TOKEN_PATH": "{empty}"}, "it is empty"),
        ({"RAY_AUTH_TOKEN_PATH": "{empty}", "RAY_AUTH_TOKEN": "  "}, "it is empty"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such", "RAY_AUTH_MODE": "TOKEN"}, "No such file"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such", "RAY_AUTH_MODE": "disabled"}, ""),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such", "RAY_AUTH_TOKEN": "x"}, ""),
        ({"RAY_AUTH_TOKEN_PATH": ""}, ""),
    ],
)
@pytest.mark.parametrize("address", [None, "auto"])
def test_a_path_that_holds_no_token_is_refused_where_ray_would(
    address: str | None,
    variables: dict[str, str],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").touch()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(empty=tmp_path / "empty"))
    if not fault:
        check_session(RayConfig(address=address))
        return
    message = rf"RAY_AUTH_TOKEN_PATH=.* holds no token \({fault}.*\); correct the path, or unset"
    with pytest.raises(InputError, match=message):
        check_session(RayConfig(address=address))


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Listen at a port and give this answer; None: give none. Yields the address."""
    kept: list[socket.socket] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.05)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                kept.append(connection)
                if answer is not None:
                    connection.sendall(answer)
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()
            for connection in kept:
                connection.close()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", r"is that of the dashboard, for `ray job submit`; unset it"),
        ("https://head", "is that of the dashboard"),
        ("head", "is not HOST:PORT; give one, such as"),
        ("head:port", "is not HOST:PORT"),
        ("head:70000", "is not HOST:PORT"),
        ("tcp://head:1", "is not HOST:PORT"),
        (
            "127.0.0.1:{free}",
            "no Ray cluster answers .* within 0.3 s: Connection refused; start it",
        ),
        ("ray://127.0.0.1:{free}", "no Ray cluster answers .*: Connection refused"),
        ("[::1]:{free}", "no Ray cluster answers .*: "),
        ("no-such-host.invalid:6379", "no-such-host.invalid has no address"),
        ("silent", "it does not answer"),
        ("other", "another server answers there"),
        ("closing", "another server answers there|Connection reset by peer"),
    ],
)
def test_an_address_without_a_cluster_is_one_message_in_time(address: str, message: str) -> None:
    answers = {"silent": None, "other": b"HTTP/1.1 400 Bad Request\r\n\r\n", "closing": b""}
    started = time.monotonic()
    with listening(answers.get(address)) as found:
        given = found if address in answers else address.format(free=free_port())
        with pytest.raises(InputError, match=message) as error:
            check_address(given, timeout_s=LIMIT_S)
    assert time.monotonic() - started < 60  # Ray took 235 s
    assert "\n" not in str(error.value)
    assert "RAY_ADDRESS" in str(error.value)


def test_a_server_of_http2_answers() -> None:
    with listening(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as address:
        check_address(address, timeout_s=LIMIT_S)
        check_address(f"ray://{address}", timeout_s=LIMIT_S)
    check_address("auto", timeout_s=LIMIT_S)


def test_the_address_of_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with (
        pytest.raises(InputError, match="the dashboard"),
        ray_session(RayConfig(), StorageConfig()),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        (
            None,
            RunError,
            r"Ray did not start on this machine within 0.1 s, .*run the command",
        ),
        ("auto", InputError, r"does not accept this command within 0\.1 s; look at"),
    ],
)
def test_a_start_that_takes_too_long_is_ended(
    address: str | None, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(**_: Any) -> None:
        while True:
            with suppress(Exception):  # as Ray does
                time.sleep(60)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", hang)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "LEAST_START_S", 0.0)
    config = RayConfig(address=address, start_timeout_s=0.1)
    with pytest.raises(kind, match=message), ray_session(config, StorageConfig()):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (Exception("The current node timed out during startup. x"), RunError, "within 0.1 s, .* b"),
        (OSError("no sockets"), RunError, "Ray cannot start on this machine: no sockets; its logs"),
    ],
)
def test_a_start_that_fails_is_one_message(
    error: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise error

    ended: list[bool] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(session, "LEAST_START_S", 0.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = RayConfig(start_timeout_s=0.1)
    with pytest.raises(kind, match=message), ray_session(config, StorageConfig()):
        pass
    assert ended == [True]  # what has started by then ends


def test_a_node_that_a_busy_machine_lets_down_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[RayNode] = []

    class Node(RayNode):
        def __init__(self) -> None:
            raise Exception("The current node timed out during startup. This could happen")

        def kill_all_processes(self, *_: Any, **__: Any) -> None:
            ended.append(self)

    def init(**_: Any) -> None:
        if len(ended) < 2:
            Node()

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session(RayConfig(), StorageConfig()) as nodes:
        assert nodes == []
    assert len(ended) == 2  # their processes do not stay beside the third


def test_a_start_that_is_too_late_leaves_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[RayNode] = []

    class Node(RayNode):
        def __init__(self) -> None:
            time.sleep(60)

        def kill_all_processes(self, *_: Any, **__: Any) -> None:
            ended.append(self)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: Node())
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(session, "LEAST_START_S", 0.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    late = RayConfig(start_timeout_s=0.1)
    with pytest.raises(RunError, match=r"within 0\.1 s"), ray_session(late, StorageConfig()):
        pass
    assert len(ended) == 1
