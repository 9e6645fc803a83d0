"""Check what Ray would fail on after minutes, or with a traceback: its address, folders and token.

Does not import Ray.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from s4g_ray.amounts import format_bytes
from s4g_ray.config.schema import RayConfig
from s4g_ray.errors import InputError

SOCKET_LIMIT = 107 if sys.platform.startswith("linux") else 103  # bytes of a socket's path
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
LEAST_BYTES = 100e6  # of the temporary folder, for logs and sockets
CONNECT_S = 10.0  # for an address to answer: a head may be starting
POLL_S = 0.5
# begins HTTP/2, by which all servers of Ray speak: its preface, and empty SETTINGS
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def check_session(cluster: RayConfig) -> None:
    """Check what a session of Ray needs, unless this process has one.

    Commands call this before they import Ray, which takes seconds; ray_session calls it again.
    Raises InputError as check_token_file, check_address and check_local_start, and for a port that
    is taken.
    """
    if is_connected():
        return
    check_token_file()
    address = find_address(cluster)
    if address:
        check_address(address, timeout_s=cluster.start_timeout_s)
        return
    _check_free(cluster.metrics_port)
    check_local_start()


def is_connected() -> bool:
    """Return whether this process has a Ray session."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def find_address(cluster: RayConfig) -> str | None:
    """Return the address of the cluster that is to be used; None: one started on this machine."""
    return cluster.address or os.environ.get("RAY_ADDRESS")


def _check_free(port: int | None) -> None:
    """Raise InputError for a port that is taken: Ray's agent and with it the session would die."""
    if port is None:
        return
    with socket.socket() as trial:
        # a port that was released a moment ago counts as free
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise InputError(
                f"ray.metrics_port={port} cannot be used: {error.strerror}; choose another"
            ) from error


def check_local_start() -> None:
    """Check that Ray can start on this machine.

    Raises InputError for a temporary folder that is missing, full, not writable or too long for
    the paths of sockets, and for a home folder that cannot hold Ray's token.
    """
    variable, folder = _temporary_folder()
    said = f"{variable}={folder}" if variable else folder
    length = len(os.fsencode(folder + SOCKET.format(pid=os.getpid())))
    if length > SOCKET_LIMIT:
        longest = SOCKET_LIMIT - (length - len(os.fsencode(folder)))
        raise InputError(
            f"{said} is too long: the paths of Ray's sockets would have {length} bytes, of at most"
            f" {SOCKET_LIMIT}; set RAY_TMPDIR to a folder of at most {longest} bytes, such as /tmp"
        )
    if not Path(folder).is_absolute() or not Path(folder).is_dir():
        raise InputError(
            f"{said} is no folder's absolute path, and Ray keeps its sockets and logs there; make"
            " it, or set RAY_TMPDIR to one that exists, such as /tmp"
        )
    fault = _find_write_fault(folder)
    if fault:
        raise InputError(
            f"{said} cannot be written ({fault}), and Ray keeps its sockets and logs there; make"
            " room or give write access, or set RAY_TMPDIR to another folder"
        )
    free = shutil.disk_usage(folder).free
    if free < LEAST_BYTES:
        raise InputError(
            f"{said} has {format_bytes(free)} free, and Ray's sockets and logs take"
            f" {format_bytes(LEAST_BYTES)}; make room, or set RAY_TMPDIR to another folder"
        )
    _check_token()


def _temporary_folder() -> tuple[str, str]:
    """Return the folder that Ray takes, and the variable that names it (empty: none)."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if variable in os.environ:
            return variable, os.environ[variable]
    return "", "/tmp"


def _find_write_fault(folder: str) -> str:
    """Return why a folder cannot be written; empty where it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def home_folder() -> Path:
    """Return the user's home; a path that does not exist where there is none."""
    return Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.home() fails where there is none)


def uses_token() -> bool:
    """Return whether Ray asks for a token, as clusters that are started here do."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def find_token_path() -> Path | None:
    """Return the file of Ray's token, as Ray looks for it; None where RAY_AUTH_TOKEN holds it."""
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home_folder() / ".ray" / "auth_token")


def check_token_file() -> None:
    """Raise InputError where RAY_AUTH_TOKEN_PATH names no token: Ray neither makes nor skips it."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = find_token_path()
    if not uses_token() or not named or path is None:
        return
    fault = ""
    try:
        if not path.read_bytes().strip():
            fault = "it is empty"
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise InputError(
            f"RAY_AUTH_TOKEN_PATH={named} holds no token ({fault}); correct the path, or unset it,"
            " make a token with `ray get-auth-token --generate`, and move it there"
        )


def _check_token() -> None:
    """Check that Ray finds a token, or can make one in the home folder."""
    path = find_token_path()
    if not uses_token() or path is None or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    if path.is_file():
        return
    home = home_folder()
    folder = path.parent
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        fault = error.strerror or str(error)
    else:
        fault = _find_write_fault(str(folder))
    if fault:
        raise InputError(
            f"HOME={home} cannot be written ({fault}), and Ray keeps its token there, in"
            " .ray/auth_token; set HOME to a folder with write access, or RAY_AUTH_TOKEN_PATH to"
            " the file of a token"
        )


def check_address(address: str, *, timeout_s: float) -> None:
    """Check that a Ray cluster answers at HOST:PORT or ray://HOST:PORT, within timeout_s.

    Raises InputError for another form of address, where nothing answers, and where another server
    does. Checks nothing for `auto`, which Ray looks up, nor for what answers where Ray uses TLS.
    """
    if address in ("auto", "local"):
        return
    named = f"the Ray address {address} (ray.address or RAY_ADDRESS)"
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{named} is that of the dashboard, for `ray job submit`; unset it to use this machine,"
            " or give HOST:PORT of the cluster's head, such as 10.0.0.5:6379"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = host.strip("[]")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{named} is not HOST:PORT; give one, such as 10.0.0.5:6379")
    limit_s = min(timeout_s, CONNECT_S)
    fault = _find_silence(host, int(port), limit_s)
    if fault:
        raise InputError(
            f"no Ray cluster answers at {named} within {limit_s:g} s: {fault}; start it, correct"
            " the address, or unset it to use this machine"
        )


def _find_silence(host: str, port: int, limit_s: float) -> str:
    """Return why no server of Ray answers; empty where one does. Tries until limit_s is over."""
    deadline = time.monotonic() + limit_s
    while True:
        left_s = max(deadline - time.monotonic(), 0.05)
        try:
            with socket.create_connection((host, port), timeout=left_s) as connection:
                return _find_other_server(connection)
        except TimeoutError:
            return "it does not answer"
        except socket.gaierror as error:
            return f"{host} has no address ({error.strerror})"
        except OSError as error:
            if time.monotonic() + POLL_S > deadline:
                return error.strerror or str(error)
        time.sleep(POLL_S)


def _find_other_server(connection: socket.socket) -> str:
    """Return what answers when it is no server of HTTP/2; empty when it is."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return ""
    connection.sendall(PREFACE)
    found = connection.recv(9)
    is_settings = len(found) >= 4 and found[3] == 4
    return "" if is_settings else "another server answers there"
