"""Owner: the process that holds a lease, as its file describes it."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from s4g_ray.storage.ownership.processes import is_alive, name_machine, start_of

FORMAT = "s4g-owner"
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # JSON that Ray gives the driver of a submitted job


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease."""

    host: str
    machine: str  # as name_machine
    pid: int
    started: str  # as start_of
    user: str
    job: str  # of Slurm or Ray; empty for none
    since: float  # seconds since 1970, by the owner's clock
    token: str  # of this lease alone

    @classmethod
    def of_this_process(cls) -> Owner:
        """Describe this process, for a new lease."""
        return cls(
            host=socket.gethostname(),
            machine=name_machine(),
            pid=os.getpid(),
            started=start_of(os.getpid()),
            user=_find_user(),
            job=_find_job(),
            since=time.time(),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def parse(cls, data: bytes) -> Owner | None:
        """Read the file of a lease; None for one that is cut short or altered."""
        try:
            value = json.loads(data)
            if value["format"] != FORMAT:
                return None
            return cls(
                host=_printable(value["host"]),
                machine=str(value["machine"]),
                pid=int(value["pid"]),
                started=str(value["started"]),
                user=_printable(value["user"]),
                job=_printable(value["job"]),
                since=float(value["since"]),
                token=str(value["token"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def to_bytes(self, beat: int = 0) -> bytes:
        """Return the file of the lease. beat: of a store whose objects are written anew."""
        return f"{json.dumps({'format': FORMAT, **asdict(self), 'beat': beat})}\n".encode()

    def is_of(self, machine: str) -> bool:
        """Return whether this is a process of that machine, as name_machine names it."""
        return self.machine == machine

    def is_alive(self) -> bool:
        """Return whether the process is there. It must be one of this machine."""
        return is_alive(self.pid, self.started)

    def describe(self) -> str:
        """Return the process, its user, host and job."""
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}"

    def describe_since(self) -> str:
        """Return when the lease was taken."""
        try:
            return f"{datetime.fromtimestamp(self.since, UTC):%Y-%m-%d %H:%M:%S} UTC"
        except (ValueError, OverflowError, OSError):
            return "an unknown time"


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in many containers
        return f"user {os.getuid()}"


def _find_job() -> str:
    slurm = os.environ.get("SLURM_JOB_ID")
    if slurm:
        return slurm
    try:
        metadata: Any = json.loads(os.environ[RAY_JOB])["metadata"]
        return str(metadata["job_submission_id"])
    except (KeyError, TypeError, ValueError):
        return ""


def _printable(value: Any) -> str:
    """Return a text without control characters, which a terminal would obey."""
    return "".join(char for char in str(value) if char.isprintable())
