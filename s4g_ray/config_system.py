"""Parts of the configuration that say where and how the work runs, rather than what is learned."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EmbeddingConfig(Section):
    """The Ray Data job that turns a collection into an embedding table."""

    num_actors: int = Field(2, ge=1)
    cpus_per_actor: float = Field(0.25, gt=0)  # logical
    gpus_per_actor: float = Field(0, ge=0)
    threads_per_actor: int = Field(1, ge=1)
    label_selector: dict[str, str] = Field(default_factory=dict)  # Ray labels of the nodes that actors may run on
    batch_size: int = Field(128, ge=1)  # images in one forward pass
    part_rows: int = Field(512, ge=1)  # images in one part of the table
    dtype: Literal["float16", "float32"] = "float32"


class EvaluationConfig(Section):
    """When the test region is evaluated: always after training, and on this schedule."""

    every_epochs: int = Field(4, ge=1)
    before_training: bool = True  # the untrained encoder, as the first point of the curve
    radii_m: tuple[Annotated[float, Field(ge=0)], ...] = (25, 50, 100)  # recall@k within so many metres
    correlation_baseline: bool = False  # gradient correlation, a hand-made method, beside it
    # on data.val_split, in the run's protocol: the checkpoint with the highest is the best
    best_metric: Literal["recall@1", "recall@5", "recall@10", "recall@1%", "ap"] = "recall@1"


class CheckpointConfig(Section):
    """What is published of the training's state; after each epoch in any case."""

    every_steps: int | None = Field(None, ge=1)  # within an epoch too
    keep: int = Field(2, ge=1)  # the newest; the best and the untrained stay beside them
    grace_s: float = Field(25, gt=0)  # SIGTERM: seconds in which a last checkpoint may be published


class RayConfig(Section):
    """Where the work runs. address none: the running cluster of RAY_ADDRESS, else one on this machine."""

    address: str | None = None
    num_cpus: int | None = Field(None, ge=1)  # logical CPUs of a cluster started here
    metrics_port: int | None = Field(None, ge=1, le=65535)  # of /metrics of one started here; none: a free one
    start_timeout_s: float = Field(120, gt=0)  # for workers and actors to start, in each try
    # for nodes that an autoscaler is asked for when a command does not fit on those there are; 0: it is refused at once
    nodes_timeout_s: float = Field(0, ge=0)


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


class StorageConfig(Section):
    """How s3:// is reached; what is not given comes from the standard AWS variables and files.

    Credentials are never part of a configuration: they come from the environment, a profile of ~/.aws, or the role
    of the machine or pod.
    """

    endpoint_url: str | None = None  # of a store that is not AWS's, such as http://minio:9000
    profile: str | None = None  # of ~/.aws/config and ~/.aws/credentials, on every node
    region: str | None = None
    max_attempts: int = Field(8, ge=1)  # of a request that fails with 5xx, throttling or a timeout, with backoff
    timeout_s: float = Field(30, gt=0)  # for a connection, and between two pieces of an answer
    max_connections: int = Field(32, ge=1)  # of one process at the same time

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.endpoint_url is not None and (fault := fault_of_endpoint(self.endpoint_url)):
            raise ValueError(f"endpoint_url{fault}")
        return self
