"""StorageConfig and the environment variables that carry it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, model_validator

from s4g_ray.errors import InputError

SCHEMES = ("s3://", "s3a://")
# the standard names, where there are such; AWS_REGION is that of other SDKs than boto
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "endpoint_url": ("AWS_ENDPOINT_URL_S3",),
    "profile": ("AWS_PROFILE",),
    "region": ("AWS_DEFAULT_REGION", "AWS_REGION"),
    "max_attempts": ("AWS_MAX_ATTEMPTS",),
    "timeout_s": ("S4G_S3_TIMEOUT_S",),
    "max_connections": ("S4G_S3_MAX_CONNECTIONS",),
}


def is_object_store(uri: str) -> bool:
    """Whether a URI is of S3."""
    return uri.startswith(SCHEMES)


def variables(config: StorageConfig) -> dict[str, str]:
    """The configuration as variables of the environment: what is not at its default, and never a credential."""
    defaults, given = StorageConfig().model_dump(), config.model_dump()
    changed = {key: value for key, value in given.items() if value != defaults[key]}
    return {name: str(value) for key, value in changed.items() for name in VARIABLES[key]}


def apply(config: StorageConfig) -> dict[str, str]:
    """Set the variables of this process before its first read.

    What the configuration gives goes before the environment; a value that equals its default counts as not given, as
    a run's config.yaml holds all keys. Processes that it starts have the variables too. Gives what was set, for
    processes elsewhere; they, too, have credentials from their own environment, profile or role. Raises InputError
    for a profile beside AWS_ACCESS_KEY_ID, which would be used in its place.
    """
    given = variables(config)
    if config.profile and os.environ.get("AWS_ACCESS_KEY_ID"):
        raise InputError(
            f"storage.profile={config.profile!r} and AWS_ACCESS_KEY_ID are both set, and the variable would be used:"
            " unset AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or leave storage.profile out"
        )
    os.environ.update(given)
    return given


def check_endpoint() -> None:
    """Raises InputError for an endpoint in the environment that is none, or holds credentials."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        url = os.environ.get(name)
        if url and (fault := fault_of_endpoint(url)):
            raise InputError(f"{name}{fault}; mend it, or storage.endpoint_url")


def fault_of_endpoint(url: str) -> str | None:
    """What is wrong with the address of a store, to be said after its name; what may hold a secret is not repeated."""
    if "@" in url:
        return " holds a user name or password; give credentials by AWS variables or a profile"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that are not closed
        good = False
    return None if good else f"={url!r} is not http(s)://HOST[:PORT]"


class StorageConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How s3:// is reached; what is not given comes from the standard AWS variables and files.

    Credentials are never part of a configuration: they come from the environment, a profile of ~/.aws, or the role
    of the machine or pod.
    """

    endpoint_url: str | None = None  # of a store that is not AWS's, such as http://minio:9000
    profile: str | None = None  # of ~/.aws/config and ~/.aws/credentials, on every node
    region: str | None = None
    max_attempts: int = Field(
        8, ge=1
    )  # of a request that fails with 5xx, throttling or a timeout, with backoff
    timeout_s: float = Field(30, gt=0)  # for a connection, and between two pieces of an answer
    max_connections: int = Field(32, ge=1)  # of one process at the same time

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.endpoint_url is not None and (fault := fault_of_endpoint(self.endpoint_url)):
            raise ValueError(f"endpoint_url{fault}")
        return self
