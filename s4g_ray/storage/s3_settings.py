"""Define StorageConfig, and carry it to other processes in environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, model_validator

from s4g_ray.errors import InputError

SCHEMES = ("s3://", "s3a://", "gs://", "az://")
# Standard names where they exist. boto reads AWS_DEFAULT_REGION, other SDKs read AWS_REGION.
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "endpoint_url": ("AWS_ENDPOINT_URL_S3",),
    "profile": ("AWS_PROFILE",),
    "region": ("AWS_DEFAULT_REGION", "AWS_REGION"),
    "anonymous": ("AWS_SKIP_SIGNATURE", "GOOGLE_SKIP_SIGNATURE", "AZURE_SKIP_SIGNATURE"),
    "max_attempts": ("AWS_MAX_ATTEMPTS",),
    "timeout_s": ("S4G_S3_TIMEOUT_S",),
    "max_connections": ("S4G_S3_MAX_CONNECTIONS",),
}
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

Number = TypeVar("Number", int, float)


def is_object_store(uri: str) -> bool:
    """Return whether a URI is of S3, Google Cloud Storage or Azure."""
    return uri.startswith(SCHEMES)


def variables(config: StorageConfig) -> dict[str, str]:
    """Return the configuration as environment variables.

    Holds only values that differ from their defaults, and never a credential.
    """
    defaults = StorageConfig().model_dump()
    found = {}
    for key, value in config.model_dump().items():
        if value == defaults[key]:
            continue
        for name in VARIABLES[key]:
            found[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def is_anonymous(scheme: str) -> bool:
    """Return whether the environment asks for requests without a signature to s3, gs or az."""
    return os.environ.get(anonymous_variable(scheme), "").lower() in ("1", "true", "yes", "on")


def anonymous_variable(scheme: str) -> str:
    """Return the variable that asks for requests without a signature to s3, gs or az."""
    return VARIABLES["anonymous"][("s3", "gs", "az").index(scheme)]


def apply(config: StorageConfig) -> dict[str, str]:
    """Set the variables of this process; call it before the first read.

    Values of the configuration replace those of the environment. A value that equals its default
    counts as not given, because a run's config.yaml holds all keys. Child processes inherit the
    variables. Returns the variables that were set, for processes on other nodes; those take their
    credentials from their own environment, profile or role, too. Raises InputError for a profile
    together with AWS_ACCESS_KEY_ID, which would be used instead of the profile, and with
    anonymous requests.
    """
    given = variables(config)
    if config.profile and config.anonymous:
        raise InputError(
            f"storage.profile={config.profile!r} and storage.anonymous=true are both set, but"
            " anonymous requests have no credentials: leave one of them out"
        )
    if config.profile and os.environ.get("AWS_ACCESS_KEY_ID"):
        raise InputError(
            f"storage.profile={config.profile!r} and AWS_ACCESS_KEY_ID are both set, and the"
            " variable would be used: unset AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and"
            " AWS_SESSION_TOKEN, or leave storage.profile out"
        )
    os.environ.update(given)
    return given


def find_endpoint() -> str | None:
    """Return the address of a store other than AWS that the environment names."""
    urls = (os.environ.get(name) for name in ENDPOINTS)
    return next((url for url in urls if url), None)


def check_endpoint() -> None:
    """Raise InputError for an endpoint in the environment that is invalid or holds credentials."""
    for name in ENDPOINTS:
        url = os.environ.get(name)
        fault = fault_of_endpoint(url) if url else None
        if fault:
            raise InputError(f"{name}{fault}; fix the variable, or set storage.endpoint_url")


def fault_of_endpoint(url: str) -> str | None:
    """Return the fault of a store's address, worded to follow its name; None for a valid one.

    Does not repeat an address that may hold a secret.
    """
    if "@" in url:
        return " holds a user name or password; give credentials by AWS variables or a profile"
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number, or a bracket is not closed
        is_valid = False
    return None if is_valid else f"={url!r} is not http(s)://HOST[:PORT]"


class StorageConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Access to object stores. Endpoint, profile and region are of s3://, the limits of all.

    Values that are not given come from the standard AWS variables and files.

    `anonymous` is of s3://, gs:// and az://.

    Credentials are never part of a configuration: they come from the environment, a profile of
    ~/.aws, or the role of the machine or pod.
    """

    endpoint_url: str | None = None  # of a store other than AWS, such as http://minio:9000
    profile: str | None = None  # of ~/.aws/config and ~/.aws/credentials, on every node
    region: str | None = None
    anonymous: bool = (
        False  # sign no request, as public buckets need where there are no credentials
    )
    # attempts of a request that fails with 5xx, throttling or a timeout, with backoff
    max_attempts: int = Field(8, ge=1)
    # for a connection, between two pieces of an answer, and to send a piece of 8 MB
    timeout_s: float = Field(30, gt=0)
    max_connections: int = Field(32, ge=1)  # requests at the same time, in one process

    @model_validator(mode="after")
    def _check(self) -> Self:
        fault = None if self.endpoint_url is None else fault_of_endpoint(self.endpoint_url)
        if fault:
            raise ValueError(f"endpoint_url{fault}")
        return self


@dataclass(frozen=True)
class RetryPolicy:
    """The limits of requests to a store: attempts, seconds, connections."""

    max_attempts: int  # of one request
    timeout_s: float  # for a connection, between two pieces of an answer, and to send a piece
    max_connections: int  # requests at the same time, in this process

    @classmethod
    def read(cls) -> RetryPolicy:
        """Read the policy from the environment; variables that are not set have the defaults.

        Raises InputError for a value that is not a number above 0.
        """
        defaults = StorageConfig()
        return cls(
            max_attempts=_read_number("max_attempts", int, defaults.max_attempts),
            timeout_s=_read_number("timeout_s", float, defaults.timeout_s),
            max_connections=_read_number("max_connections", int, defaults.max_connections),
        )


def _read_number(key: str, kind: type[Number], default: Number) -> Number:
    """Read a number above 0 from the environment variable of a key."""
    (name,) = VARIABLES[key]
    text = os.environ.get(name) or str(default)
    try:
        number = kind(text)
    except ValueError as error:
        raise InputError(f"{name}={text!r} is not a number; set one above 0") from error
    if number <= 0:
        raise InputError(f"{name}={text} is not above 0; set a number above 0")
    return number
