"""Define every setting of the service, with its unit, default and bounds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from s4g_ray.config.section import Section
from s4g_ray.errors import InputError

MB = 1_000_000
Count = Annotated[int, Field(ge=1)]
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")
SHORTEST_TOKEN = 16  # characters: a shorter one may be guessed


class ServeConfig(Section):
    """The service of one gallery: replicas, limits and port."""

    gallery: str  # a folder or s3://...
    host: str = "127.0.0.1"  # 0.0.0.0: reachable from other machines; then set token_env
    # names by which requests may call the service, without the port; none: those of this machine
    # where host is one of them (a page of another site cannot ask by a name of its own), else any
    hosts: tuple[str, ...] = ()
    port: int = Field(8000, ge=0, le=65535)  # 0: a free one
    # replicas, each with the encoder and the index; [min, max]: Ray Serve adds and removes them
    replicas: Count | tuple[Count, Count] = 1
    requests_per_replica: float = Field(8, gt=0)  # in progress; more start a replica, if allowed
    upscale_after_s: float = Field(5, ge=0)  # of more requests, until a replica is added
    downscale_after_s: float = Field(120, ge=0)  # of fewer requests, until one is removed
    cpus_per_replica: float = Field(1, ge=0)  # logical, for Ray's scheduler
    cpus_of_front: float = Field(0.5, ge=0)  # of the application behind Serve's own proxies
    gpus_per_replica: float = Field(0, ge=0)
    # of the encoder, on CPUs; none: the processors of the node, shared by its replicas
    threads_per_replica: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)  # photos that a replica encodes together
    # of Ray's /metrics, where Ray starts on this machine; none: a free port
    metrics_port: int | None = Field(None, ge=1, le=65535)
    token_env: str | None = None  # the environment variable that holds the bearer token
    reload_s: float = Field(5, gt=0)  # seconds between looks for a new version of the gallery
    start_timeout_s: float = Field(300, gt=0)  # for all replicas to open the gallery
    retries: int = Field(3, ge=0)  # of a request whose replica dies

    max_photo_mb: float = Field(20, gt=0)  # of a photo's file
    max_photos: int = Field(16, ge=1)  # of a request
    max_request_mb: float = Field(40, gt=0)  # of a request's body
    max_megapixels: float = Field(64, gt=0)  # of a photo; its pixels take 3 bytes each
    max_buffered_mb: float = Field(400, gt=0)  # bodies that are held at one time
    max_queue: int = Field(64, ge=1)  # requests that wait or are answered; more are refused (503)
    max_upload_s: float = Field(20, gt=0)  # to receive a request's body (408)
    max_answer_s: float = Field(30, gt=0)  # to answer a request that has been received (503)

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Return the names by which requests may call a service on `host`; none: any."""
        if self.hosts or self.host not in LOCAL_HOSTS:
            return self.hosts
        return LOCAL_HOSTS

    @property
    def replica_range(self) -> tuple[int, int]:
        """Return the smallest and the largest number of replicas."""
        if isinstance(self.replicas, tuple):
            return self.replicas
        return self.replicas, self.replicas

    @model_validator(mode="after")
    def _check(self) -> Self:
        least, most = self.replica_range
        if least > most:
            raise ValueError(f"replicas={[least, most]} must be [min, max] with min <= max")
        if self.max_photo_mb > self.max_request_mb:
            raise ValueError(
                f"max_photo_mb={self.max_photo_mb:g} exceeds max_request_mb="
                f"{self.max_request_mb:g}; lower the first or raise the second"
            )
        if self.max_request_mb > self.max_buffered_mb:
            raise ValueError(
                f"max_request_mb={self.max_request_mb:g} exceeds max_buffered_mb="
                f"{self.max_buffered_mb:g}; lower the first or raise the second"
            )
        return self


def make_config(values: dict[str, Any], overrides: Sequence[str] = ()) -> ServeConfig:
    """Make a configuration of values and `key=value` texts, whose values are YAML.

    Raises InputError with one line a fault: unknown keys and impossible values.
    """
    tree = dict(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError(f"{override!r} is not of the form key=value")
        try:
            tree[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{override!r}: the value is not valid YAML") from error
    unknown = sorted(set(tree) - set(ServeConfig.model_fields))
    if unknown:
        raise InputError("\n".join(_describe_unknown(key) for key in unknown))
    try:
        return ServeConfig.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_describe_fault(fault) for fault in error.errors())
        raise InputError("\n".join(lines)) from error


def read_token(config: ServeConfig) -> str | None:
    """Return the bearer token. Raises InputError for a variable that is not set, or is empty."""
    if config.token_env is None:
        return None
    token = os.environ.get(config.token_env, "").strip()
    if not token:
        raise InputError(
            f"the environment variable {config.token_env} holds no token; set it, or leave"
            " --token-env away"
        )
    if len(token) < SHORTEST_TOKEN or not token.isascii():
        raise InputError(
            f"the token in the environment variable {config.token_env} has {len(token)} characters;"
            f" give at least {SHORTEST_TOKEN} of ASCII, such as those of `openssl rand -hex 16`"
        )
    return token


def _describe_unknown(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, ServeConfig.model_fields, n=1, cutoff=0.5)
    hint = (
        f"; did you mean {near[0]!r}?"
        if near
        else f"; there are {', '.join(ServeConfig.model_fields)}"
    )
    return f"unknown setting of the service {key!r}{hint}"


def _describe_fault(fault: Any) -> str:
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not fault["loc"]:
        return message
    return f"{fault['loc'][0]}={fault['input']!r}: {message[0].lower()}{message[1:]}"
