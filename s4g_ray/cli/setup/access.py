"""Check what lies beyond this process: the Ray cluster, and the stores of given URIs."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from s4g_ray.cli.setup.finding import Finding
from s4g_ray.distributed import start_checks
from s4g_ray.errors import InputError, RunError, first_line

CONNECT_S = 3.0  # until a cluster's address counts as silent
CORRECT = "correct the path, or give access"


def check_address(address: str | None) -> Finding:
    """Check, without Ray, that a cluster answers at RAY_ADDRESS; None: no cluster is named."""
    name = "Ray cluster"
    if not address:
        return Finding(name, "ok", "none named: commands start Ray on this machine")
    try:
        start_checks.check_address(address, timeout_s=CONNECT_S)
    except InputError as error:
        return _to_finding(name, error, "")
    return Finding(name, "ok", f"RAY_ADDRESS={address}; --ray connects to it")


def check_token() -> Finding:
    """Check that Ray's token can be used, where tokens are asked for."""
    name = "Ray token"
    if not start_checks.uses_token():
        return Finding(
            name,
            "warning",
            f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: anyone who reaches the cluster's ports"
            " can run code there",
            "unset it, so that the cluster asks for a token",
        )
    try:
        start_checks.check_token_file()
    except InputError as error:
        return _to_finding(name, error, "")
    path = start_checks.find_token_path()
    if path is None:
        return Finding(name, "ok", "RAY_AUTH_TOKEN holds it")
    if not path.exists():
        return Finding(name, "ok", f"{path} is made when Ray starts here")
    if not os.access(path, os.R_OK):
        return Finding(name, "error", f"{path} cannot be read", f"chmod 600 {path}")
    return Finding(name, "ok", str(path))


def _to_finding(name: str, error: Exception, remedy: str) -> Finding:
    """Make a finding of an error whose message ends with a remedy; else `remedy` is taken."""
    value, _, own = first_line(error).partition("; ")
    return Finding(name, "error", value, own or remedy)


def check_ray(address: str | None) -> Finding:
    """Start Ray on this machine, or connect to the cluster that is named, and end the session."""
    from s4g_ray.config.schema import RayConfig
    from s4g_ray.distributed.session import ray_session
    from s4g_ray.storage.s3_settings import StorageConfig

    name = "Ray"
    started = time.monotonic()
    try:
        with ray_session(RayConfig(address=address), StorageConfig()) as nodes:
            seconds = time.monotonic() - started
            cpus = sum(node.cpus for node in nodes)
            gpus = sum(node.gpus for node in nodes)
    except (InputError, RunError) as error:
        return Finding(name, "error", first_line(error), "the lines above say what Ray needs")
    what = f"connected to {address}" if address else "started here"
    return Finding(
        name,
        "ok",
        f"{what} in {seconds:.1f} s: nodes {len(nodes)}, CPUs {cpus:g}, GPUs {gpus:g}",
    )


def check_store(uri: str, *, write: bool) -> Finding:
    """List a folder, local or in a store; with `write`, also write, read and remove a file there.

    Removes what it writes.
    """
    from s4g_ray.storage import files

    name = f"access {uri}"
    try:
        folder = files.absolute(uri)
        if files.is_local(folder) and not Path(folder).is_dir():
            return Finding(name, "error", "there is no such folder", CORRECT)
        entries = files.list_names(folder)
    except (OSError, InputError, RunError) as error:
        return _to_finding(name, error, CORRECT)
    value = f"{len(entries)} entries"
    if not write:
        return Finding(name, "ok", f"{value}; --write tries to write there")
    probe = files.join(folder, f".s4g-doctor-{uuid.uuid4().hex}")
    text = b"s4g doctor"
    try:
        files.write_bytes(probe, text)
        same = files.read_bytes(probe) == text
        files.remove(probe)
    except (OSError, InputError, RunError) as error:
        return Finding(
            name,
            "warning",
            f"{value}; it can be read but not written: {first_line(error)}",
            "give write access for runs and galleries; data sets need none",
        )
    if not same:
        return Finding(name, "error", f"{value}; a file reads back as another", "use another store")
    return Finding(name, "ok", f"{value}; a file was written, read and removed")
