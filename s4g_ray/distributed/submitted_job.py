"""Check the settings of a command that runs as a Ray job. Does not import Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path

from s4g_ray.errors import InputError

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # seconds from the SIGTERM of `ray job stop` to its SIGKILL
DEFAULT_STOP_WAIT_S = 3  # Ray's
JOB_SETTINGS = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # JSON that Ray gives the driver of a job


def in_job() -> bool:
    """Return whether this process is the driver of a submitted job."""
    return JOB_SETTINGS in os.environ


def check_kept(what: str, uri: str) -> None:
    """Check that the results at `uri` outlive a job; `what` names them.

    Raises InputError for results in the job's unpacked working directory, which Ray removes.
    """
    from s4g_ray.storage import files  # imports fsspec and pydantic: too slow for `s4g --help`

    uri = files.absolute(uri)
    if not in_job() or not files.is_local(uri):
        return
    settings = json.loads(os.environ[JOB_SETTINGS])
    has_working_dir = bool((settings.get("runtime_env") or {}).get("working_dir"))
    if has_working_dir and Path(uri).resolve().is_relative_to(Path.cwd().resolve()):
        raise InputError(
            f"{what} {uri} lies in this job's copy of the working directory, which Ray removes;"
            " give s3://... or an absolute path that all nodes reach"
        )


def stop_note(grace_s: float) -> str | None:
    """Return a note when `ray job stop` may kill a run before its last checkpoint is published.

    The note gives the setting that leaves grace_s seconds. Raises InputError when the configured
    time to stop is not a whole number.
    """
    wait_s = _stop_wait_s()
    if not in_job() or wait_s >= grace_s:
        return None
    variables = json.dumps({"env_vars": {STOP_WAIT: f"{grace_s + 15:.0f}"}})
    return (
        f"`ray job stop` leaves {wait_s} s for a last checkpoint, below"
        f" checkpoint.grace_s={grace_s:g}; for more, submit with --runtime-env-json '{variables}'"
    )


def _stop_wait_s() -> int:
    """Read the seconds as Ray does: a whole number; an empty value is the default."""
    value = os.environ.get(STOP_WAIT) or str(DEFAULT_STOP_WAIT_S)
    try:
        return int(value)
    except ValueError:
        raise InputError(
            f"{STOP_WAIT}={value!r} is not a whole number of seconds; give one, such as 45"
        ) from None
