"""What a command must know when it runs as a Ray job. Ray is not imported."""

from __future__ import annotations

import json
import os
from pathlib import Path

from s4g_ray.errors import InputError

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # seconds from the SIGTERM of `ray job stop` to its SIGKILL
DEFAULT_STOP_WAIT_S = 3  # Ray's


def in_job() -> bool:
    """Whether this process is the driver of a submitted job: Ray gives it the job's settings as JSON."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_kept(what: str, uri: str) -> None:
    """Raises InputError for results that would lie in a job's unpacked working directory, which Ray removes."""
    from s4g_ray.storage import files  # fsspec and pydantic with it, which `s4g --help` needs not

    uri = files.absolute(uri)
    if not in_job() or not files.is_local(uri):
        return
    settings = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])
    shipped = (settings.get("runtime_env") or {}).get("working_dir")
    if shipped and Path(uri).resolve().is_relative_to(Path.cwd().resolve()):
        raise InputError(
            f"{what} {uri} lies in this job's copy of the working directory, which Ray removes; give s3://... or an"
            " absolute path that all nodes reach"
        )


def stop_note(grace_s: float) -> str | None:
    """What to say where `ray job stop` kills a run before it may have published its last checkpoint.

    Raises InputError for a time that is no number of seconds.
    """
    wait_s = _stop_wait_s()
    if not in_job() or wait_s >= grace_s:
        return None
    variables = json.dumps({"env_vars": {STOP_WAIT: f"{grace_s + 15:.0f}"}})
    return (
        f"`ray job stop` leaves {wait_s} s for a last checkpoint, below checkpoint.grace_s={grace_s:g}; for more,"
        f" submit with --runtime-env-json '{variables}'"
    )


def _stop_wait_s() -> int:
    """As Ray reads it: whole seconds."""
    value = os.environ.get(STOP_WAIT) or str(DEFAULT_STOP_WAIT_S)
    try:
        return int(value)
    except ValueError:
        raise InputError(
            f"{STOP_WAIT}={value!r} is no whole number of seconds; give one, such as 45"
        ) from None
