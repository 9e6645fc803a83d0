"""Define every key of a run's configuration with its type, unit, default and bounds.

Each section is a frozen pydantic model, and RunConfig holds them all. loading.py reads them from
YAML and `key=value` overrides. The comment of a key is its documentation.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from s4g_ray.config.data_schema import TURNED_SIZES, AugmentConfig, DataConfig
from s4g_ray.config.section import Section
from s4g_ray.config.training_schema import ModelConfig, TrainConfig
from s4g_ray.storage.s3_settings import StorageConfig


class EmbeddingConfig(Section):
    """The job that turns a collection of images into an embedding table."""

    # [min, max]: so many start and stay; more join a job while the cluster has room for them
    num_actors: (
        Annotated[int, Field(ge=1)]
        | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    ) = 2
    cpus_per_actor: float = Field(0.25, gt=0)  # logical, for Ray's scheduler
    # none: with train.use_gpu, a share of what workers leave of their GPUs (a GPU of its own where
    # gpus_per_worker is 1); without GPUs, 0
    gpus_per_actor: float | None = Field(None, ge=0)
    on_cpu: bool = False  # embed on CPUs although the workers use GPUs
    threads_per_actor: int = Field(1, ge=1)  # of the encoder, on CPUs
    # threads of an actor that read and decode images ahead; none: 2 on CPUs, 8 beside a GPU
    decoders_per_actor: int | None = Field(None, ge=1)
    # decoded images that wait in an actor, in megabytes; at least one batch. Less than three
    # batches leave a GPU idle
    decode_ahead_mb: float = Field(256, gt=0)
    label_selector: dict[str, str] = Field(default_factory=dict)  # Ray labels of the actors' nodes
    batch_size: int = Field(128, ge=1)  # images in one forward pass
    part_mb: float = Field(32, gt=0)  # of a part of the table, at least; the last may be smaller
    dtype: Literal["float16", "float32"] = "float16"  # of the table
    # tables that stay in a run beyond those that it needs: of rounds that are not done, and of the
    # last evaluation
    keep: int = Field(0, ge=0)

    @property
    def actors(self) -> tuple[int, int]:
        """Return the smallest and the largest number of actors."""
        if isinstance(self.num_actors, tuple):
            return self.num_actors
        return self.num_actors, self.num_actors

    @property
    def decoders(self) -> int:
        """Return the decoding threads of an actor; of RunConfig.placed_embedding."""
        return self.decoders_per_actor or (8 if self.gpus_per_actor else 2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.actors[0] > self.actors[1]:
            raise ValueError(f"num_actors={list(self.actors)} must be [min, max] with min <= max")
        return self


class EvaluationConfig(Section):
    """When the test split is evaluated: always after training, and on this schedule."""

    every_epochs: int = Field(4, ge=1)
    before_training: bool = True  # the untrained encoder, as the first point of the curve
    # recall@k within so many metres
    radii_m: tuple[Annotated[float, Field(ge=0)], ...] = (25, 50, 100)
    # sdm@k, sdm_m@k and dis@k of DenseUAV and GTA-UAV, for these k
    sdm_ranks: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = ()
    # also evaluate gradient correlation, a method without learning
    correlation_baseline: bool = False
    # the best checkpoint has the highest value, on data.val_split and in the run's protocol
    best_metric: Literal["recall@1", "recall@5", "recall@10", "recall@1%", "ap"] = "recall@1"


class CheckpointConfig(Section):
    """When checkpoints are published: after each epoch, and on this schedule."""

    every_steps: int | None = Field(None, ge=1)  # within an epoch too
    # how many of the newest stay; the best and the untrained one stay in addition
    keep: int = Field(2, ge=1)
    grace_s: float = Field(25, gt=0)  # seconds after SIGTERM to publish a last checkpoint


class RayConfig(Section):
    """The Ray cluster to connect to, or the one to start on this machine."""

    # none: the running cluster of RAY_ADDRESS, else one started on this machine
    address: str | None = None
    num_cpus: int | None = Field(None, ge=1)  # logical CPUs of a cluster started here
    # port of /metrics of a cluster started here; none: a free port
    metrics_port: int | None = Field(None, ge=1, le=65535)
    start_timeout_s: float = Field(120, gt=0)  # for workers and actors to start, in each attempt
    # seconds to wait for nodes that an autoscaler adds when a command does not fit on the present
    # ones; 0: the command is refused at once
    nodes_timeout_s: float = Field(0, ge=0)


class SamplingConfig(Section):
    """The choice of the pairs that meet in a batch."""

    # similarity: geographic neighbors until the first mining round, then mined ones; geographic:
    # never mined; random: no hard negatives
    mode: Literal["random", "geographic", "similarity"] = "similarity"
    # neighbors that join an anchor in its batch: half the nearest, half drawn from the pool
    num_hard_negatives: int = Field(64, ge=2)
    neighbor_pool_size: int = Field(128, ge=2)  # nearest places that they are drawn from
    # metres; strict protocol: places within it, like semi-positives, never share a batch
    exclude_radius_m: float = Field(0, ge=0)
    # references without a query that join each batch as negatives of its queries, over all workers;
    # 0: none
    gallery_negatives: int = Field(0, ge=0)
    # the splits that those references are taken from
    gallery_splits: tuple[Literal["train", "gallery"], ...] = Field(("train",), min_length=1)
    # mode=similarity, strict protocol, places with several queries: so much of the harder half of a
    # place's queries, by the last round's scores, come twice an epoch, in place of as many of the
    # easier half. 0: each once
    hard_positives: float = Field(0.0, ge=0, le=1)
    # more are divided into geographic cells: a plan of so many, from a pool of 128 neighbors, takes
    # 0.6 GB of the driver
    max_pairs_per_cell: int = Field(1_000_000, ge=2)
    # plans that stay in a run beyond those of the last finished epoch and of later ones
    keep_plans: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_hard_negatives > self.neighbor_pool_size:
            raise ValueError(
                f"num_hard_negatives={self.num_hard_negatives} exceeds neighbor_pool_size="
                f"{self.neighbor_pool_size}; lower the first or raise the second"
            )
        if self.hard_positives and self.mode != "similarity":
            raise ValueError(
                f"hard_positives={self.hard_positives:g} needs the scores of mining rounds, but"
                f" mode={self.mode} has none; set mode=similarity, or hard_positives=0"
            )
        return self


class MiningConfig(Section):
    """The rounds that compute neighbors from embeddings: schedule, index, search and filters."""

    every_epochs: int = Field(4, ge=1)
    # sync: training waits for the round; overlap: training continues beside it, and a graph mined
    # after epoch e is first used by epoch e + 1 + lag_epochs
    schedule: Literal["sync", "overlap"] = "sync"
    lag_epochs: int = Field(1, ge=0)  # overlap
    # overlap, when a graph is late. wait: training waits for it; reuse: training continues with the
    # newest finished graph, until that one is max_staleness_epochs old
    when_late: Literal["wait", "reuse"] = "wait"
    # largest age of a graph that is reused or replaces that of a failed round, in epochs since it
    # was mined (the geographic graph: since epoch 0); none: 2 every_epochs + lag_epochs
    max_staleness_epochs: int | None = Field(None, ge=1)
    max_retries: int = Field(2, ge=0)  # of a round that failed
    # auto: the most exact kind that fits in memory and searches within max_search_hours
    index_kind: Literal["auto", "flat", "sqfp16", "ivf_sq8", "ivf_rabitq", "hnsw"] = "auto"
    # memory limit of one version over all shards; none: what the nodes have. A shard holds two
    # versions while it swaps them
    index_memory_gb: float | None = Field(None, gt=0)
    # expected time of one round's search that auto may take, in index_kind and num_shards
    max_search_hours: float = Field(4.0, gt=0)
    index_threads: int = Field(2, ge=1)  # of one shard
    # for exact search. auto: the faster of faiss and torch, measured once a run
    exact_engine: Literal["auto", "faiss", "torch", "torch_bf16"] = "auto"
    # search effort of IVF: lists that a query visits; none: as many as min_recall needs
    nprobe: int | None = Field(None, ge=1)
    # search effort of HNSW: length of a query's candidate list; none: as long as min_recall needs
    ef_search: int | None = Field(None, ge=1)
    min_recall: float = Field(0.9, ge=0, le=1)  # against exact search; a round below it fails
    recall_sample: int = Field(256, ge=1)  # queries that recall is measured on
    # actors that hold the index, each a part of the references. auto: as few as memory and
    # max_search_hours need
    num_shards: int | Literal["auto"] = "auto"
    cpus_per_shard: float = Field(0, ge=0)  # logical, for Ray's scheduler
    gpus_per_shard: float = Field(0, ge=0)
    # SPREAD: over the nodes; DEFAULT: as Ray packs them
    shard_placement: Literal["SPREAD", "DEFAULT"] = "SPREAD"
    label_selector: dict[str, str] = Field(default_factory=dict)  # Ray labels of the shards' nodes
    query_block: int = Field(1000, ge=1)  # queries in one request to the index
    num_searchers: int = Field(2, ge=1)  # tasks that search the index at the same time
    cpus_per_searcher: float = Field(0.25, gt=0)  # logical, of such a task
    # megabytes in a part of the graph, at least; a resumed job keeps its finished parts
    part_mb: float = Field(32, gt=0)
    # global: a place's candidates are all references. cells: those of its own and the adjoining
    # geographic cells, and a random few of all; the cost then grows with the places, not with their
    # square, and there is no index
    scope: Literal["global", "cells"] = "global"
    cell_places: int = Field(4096, ge=2)  # places in a cell, at most
    # references of anywhere that are candidates of a cell's queries too, drawn anew in each round
    far_references: int = Field(4096, ge=0)
    # Filters of likely false negatives. metrics.jsonl counts the candidates that each drops.
    max_score: float | None = Field(None, ge=-1, le=1)  # drop candidates that score above it
    # m: drop candidates that score above p - |p| m, where p is the best positive's score
    relative_margin: float | None = Field(None, ge=0)
    range_min: int = Field(0, ge=0)  # drop so many of each query's nearest other places
    # a query that keeps too few candidates searches for more, up to this many
    max_candidates: int = Field(1024, ge=1)
    # whether a place with several queries has the neighbors of all of them; false: those of the
    # query with the highest id. none: false only with protocol=paper
    merge_queries: bool | None = None
    # full: each round embeds and mines all places; rotate: each round after the first takes a share
    # of them, whole geographic blocks, and carries on the previous graph of the others. A share is
    # searched among its own references alone, as scores of two models cannot be compared
    refresh: Literal["full", "rotate"] = "full"
    # of rotate: the share of the places in a round; after 1 / share rounds each was taken once
    refresh_share: float = Field(0.25, gt=0, le=1)
    # graphs that stay in a run beyond those that its epochs, rounds and branches need
    keep: int = Field(1, ge=0)

    @property
    def least_shards(self) -> int:
        """Return the number of shards that is certain before the index is planned."""
        return 1 if self.num_shards == "auto" else self.num_shards

    @property
    def lag(self) -> int:
        """Return the epochs that begin between a mining epoch and the first use of its graph."""
        return self.lag_epochs if self.schedule == "overlap" else 0

    @property
    def staleness_bound(self) -> int:
        """Return the largest age of a graph that an epoch uses, in epochs since it was mined."""
        return self.max_staleness_epochs or 2 * self.every_epochs + self.lag

    @field_validator("num_shards", mode="before")
    @classmethod
    def _check_shards(cls, value: object) -> object:
        """Refuse other values here: pydantic would name each member of the union."""
        if value == "auto" or (str(value).isdecimal() and int(str(value)) > 0):
            return value
        raise ValueError(f"{value!r} is neither a whole number of 1 or more nor auto")

    @model_validator(mode="after")
    def _check(self) -> Self:
        age_when_due = self.every_epochs + self.lag - 1
        if self.staleness_bound < age_when_due:
            raise ValueError(
                f"max_staleness_epochs={self.max_staleness_epochs} is below"
                f" every_epochs + lag_epochs - 1 = {age_when_due}, the age that each graph reaches"
                " before the next is due"
            )
        return self


LoggerName = Literal["tensorboard", "wandb", "mlflow"]


def share_rest(train: TrainConfig, num_actors: int) -> float:
    """Return the GPUs of an embedding actor, as many on each worker's GPU, in Ray's units of 1e-4.

    1 where workers take whole GPUs.
    """
    left = 10_000 - round(train.gpus_per_worker * 10_000)
    if not left:
        return 1.0
    num_beside = -(-num_actors // train.workers[0])
    return left // num_beside / 10_000


class RunConfig(Section):
    """The whole configuration of a run."""

    run_dir: str  # a folder or s3://...
    seed: int = Field(0, ge=0)
    # paper: as published, for the paper's tables. Batches keep the order in which they are built,
    # semi-positives may be negatives, a place has the neighbors of its last query, ties count for
    # the query, galleries have no distractors, images are augmented in the published form
    protocol: Literal["strict", "paper"] = "strict"
    # tools that show metrics.jsonl while the run goes on, each an extra of s4g-ray: [tensorboard,
    # wandb, mlflow]. The environment gives projects, addresses and keys (WANDB_PROJECT,
    # MLFLOW_TRACKING_URI ...)
    loggers: tuple[LoggerName, ...] = ()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    mining: MiningConfig = MiningConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ray: RayConfig = RayConfig()
    storage: StorageConfig = StorageConfig()

    @property
    def decays_norms(self) -> bool:
        """Return whether weight decay acts on norms, biases and the logit scale too."""
        if self.train.decay_norms is None:
            return self.protocol == "paper"
        return self.train.decay_norms

    @property
    def augmentation(self) -> AugmentConfig:
        """Return section `augment` with `published` as a bool."""
        published = self.augment.published
        if published is None:
            published = self.protocol == "paper"
        return self.augment.model_copy(update={"published": published})

    @property
    def settled_mining(self) -> MiningConfig:
        """Return section `mining` with `merge_queries` as a bool."""
        merges = self.mining.merge_queries
        if merges is None:
            merges = self.protocol != "paper"
        return self.mining.model_copy(update={"merge_queries": merges})

    @property
    def placed_embedding(self) -> EmbeddingConfig:
        """Return section `embedding` with the GPUs of an actor as a number."""
        gpus = self.embedding.gpus_per_actor
        if gpus is None:
            gpus = 0.0
            if self.train.use_gpu and not self.embedding.on_cpu:
                gpus = share_rest(self.train, self.embedding.actors[1])
        return self.embedding.model_copy(update={"gpus_per_actor": gpus})

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_workers()
        self._check_splits()
        self._check_rotation()
        self._check_loggers()
        self._check_protocol()
        return self

    def _check_workers(self) -> None:
        min_workers, max_workers = self.train.workers
        is_elastic = min_workers < max_workers
        if not is_elastic and self.sampling.gallery_negatives % max_workers:
            raise ValueError(
                f"sampling.gallery_negatives={self.sampling.gallery_negatives} is not divisible by"
                f" train.num_workers={max_workers}: each worker takes the same share"
            )
        is_split = is_elastic or self.train.micro_batch_size
        if is_split and not self.model.freeze_batch_norm:
            raise ValueError(
                "train.micro_batch_size and elastic train.num_workers need"
                " model.freeze_batch_norm=true: batch statistics would be those of a part of the"
                " batch, or of empty slots"
            )

    def _check_splits(self) -> None:
        if self.data.val_split in (self.data.test_split, self.data.train_split):
            raise ValueError(
                f"data.val_split={self.data.val_split!r} is the test or the train split;"
                " choose another"
            )

    def _check_loggers(self) -> None:
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError(f"loggers={list(self.loggers)} names one twice; name each once")

    def _check_protocol(self) -> None:
        """Raise ValueError for signals of learning that the published method does not have."""
        if self.protocol != "paper":
            return
        signals = {
            "train.soft_labels": (self.train.soft_labels, 0.0),
            "sampling.hard_positives": (self.sampling.hard_positives, 0.0),
            "augment.query_shift": (self.augment.query_shift, 0.0),
            "augment.query_scale": (self.augment.query_scale, (1.0, 1.0)),
        }
        for key, (value, off) in signals.items():
            if value != off:
                raise ValueError(
                    f"{key}={value} is no part of the published method; leave it out, or use"
                    " protocol=strict"
                )

    def _check_rotation(self) -> None:
        """Raise ValueError for an image that is turned by 90 degrees and not square.

        Also for a panorama that would be shifted: its place is no window of the picture.
        """
        data = self.data
        is_panorama = (
            self.augment.rotate == "panorama"
            or data.query_heading != "as_is"
            or data.fov_range[0] < 360
        )
        if self.augment.shifts_queries and is_panorama:
            raise ValueError(
                "augment.query_shift and query_scale are for overhead queries, but one of"
                f" augment.rotate={self.augment.rotate}, data.query_heading={data.query_heading}"
                f" and data.query_fov_deg={data.query_fov_deg} is for panoramas; leave them out"
            )
        for name in TURNED_SIZES[self.augment.rotate]:
            height, width = getattr(self.data, name)
            if height != width:
                raise ValueError(
                    f"data.{name}={[height, width]} is not square, but"
                    f" augment.rotate={self.augment.rotate} turns it by 90 degrees; make it square,"
                    " or set augment.rotate=none"
                )
