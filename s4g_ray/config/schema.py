"""The configuration of a run: frozen pydantic models, read from YAML plus `key=value` overrides."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from s4g_ray.storage.s3_settings import StorageConfig


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EmbeddingConfig(Section):
    """The Ray Data job that turns a collection into an embedding table."""

    num_actors: int = Field(2, ge=1)
    cpus_per_actor: float = Field(0.25, gt=0)  # logical
    gpus_per_actor: float = Field(0, ge=0)
    threads_per_actor: int = Field(1, ge=1)
    label_selector: dict[str, str] = Field(
        default_factory=dict
    )  # Ray labels of the nodes that actors may run on
    batch_size: int = Field(128, ge=1)  # images in one forward pass
    part_rows: int = Field(512, ge=1)  # images in one part of the table
    dtype: Literal["float16", "float32"] = "float32"


class EvaluationConfig(Section):
    """When the test region is evaluated: always after training, and on this schedule."""

    every_epochs: int = Field(4, ge=1)
    before_training: bool = True  # the untrained encoder, as the first point of the curve
    radii_m: tuple[Annotated[float, Field(ge=0)], ...] = (
        25,
        50,
        100,
    )  # recall@k within so many metres
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
    metrics_port: int | None = Field(
        None, ge=1, le=65535
    )  # of /metrics of one started here; none: a free one
    start_timeout_s: float = Field(120, gt=0)  # for workers and actors to start, in each try
    # for nodes that an autoscaler is asked for when a command does not fit on those there are; 0: it is refused at once
    nodes_timeout_s: float = Field(0, ge=0)


Probability = float
Size = tuple[int, int]  # height, width in pixels


class DataConfig(Section):
    """The data set and what to do with its images."""

    uri: str  # a canonical data set: a folder or s3://...
    train_split: str = "train"
    test_split: str = "test"
    val_split: str | None = (
        None  # evaluated when the test split is; the best checkpoint is chosen by it, or none is
    )
    query_size: Size = (384, 384)
    reference_size: Size = (384, 384)
    antialias: bool = True  # of resizing, which is bilinear; the published code goes without
    query_cut: float = Field(
        0, ge=0, lt=0.5
    )  # share of a query's height cut off at its top and at its bottom
    # panoramas: turned so that the centre column looks north by its heading_deg (known), turned at random (random)
    query_heading: Literal["as_is", "known", "random"] = "as_is"
    query_fov_deg: float = Field(
        360, gt=0, le=360
    )  # panoramas: the field of view that is left, around the centre
    on_bad_image: Literal["fail", "skip"] = (
        "fail"  # skip: counted, listed in the run folder, left out
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("query_size", "reference_size"):
            if min(getattr(self, name)) < 8:
                raise ValueError(f"{name}={list(getattr(self, name))} is below 8 pixels")
        if self.visible_query_size[1] < 8:
            raise ValueError(
                f"query_fov_deg={self.query_fov_deg:g} leaves {self.visible_query_size[1]} pixels of width"
            )
        return self

    @property
    def visible_query_size(self) -> Size:
        """Height and width of a query as the encoder sees it: query_size, less what the field of view leaves out."""
        return self.query_size[0], round(self.query_size[1] * self.query_fov_deg / 360)


class AugmentConfig(Section):
    """Training augmentation (Sample4Geo, supplementary; FIELD values as defaults). Probabilities are per image
    or, for flip and rotation, per pair."""

    jpeg_probability: Probability = Field(0.5, ge=0, le=1)
    jpeg_quality: tuple[int, int] = (90, 100)
    color_probability: Probability = Field(0.5, ge=0, le=1)
    color_strength: float = Field(0.15, ge=0, le=0.5)  # brightness, contrast, saturation, hue
    blur_probability: Probability = Field(0.3, ge=0, le=1)  # blur or sharpen, one of the two
    dropout_probability: Probability = Field(
        0.3, ge=0, le=1
    )  # grid or coarse dropout, one of the two
    flip_probability: Probability = Field(0.5, ge=0, le=1)  # both views of a pair together
    rotate_probability: Probability = Field(0.75, ge=0, le=1)
    # rotation by k * 90 degrees, k in 1..3. panorama: the reference turns and the query's columns roll with
    # it; planar: both turn; reference, query: that view alone (the orientation of the other is not known)
    rotate: Literal["none", "panorama", "planar", "reference", "query"] = "none"

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.jpeg_quality
        if not 1 <= low <= high <= 100:
            raise ValueError(f"jpeg_quality={[low, high]} must be two rising values within 1..100")
        return self


class ModelConfig(Section):
    """The shared encoder: a timm backbone with global average pooling and nothing behind it."""

    name: str = "convnext_base.fb_in22k_ft_in1k_384"
    # true: timm's hub; false: random; a path, s3://... or package://PACKAGE/FILE to a state dict
    pretrained: bool | str = True
    freeze_batch_norm: bool = True  # batch statistics would differ with the number of workers
    grad_checkpointing: bool = (
        False  # activations are computed again in the backward pass: less memory, more time
    )
    temperature: float = Field(0.07, gt=0)  # initial; learned as logit_scale = log(1 / temperature)


class TrainConfig(Section):
    """Optimisation and the workers that do it."""

    epochs: int = Field(40, ge=1)
    batch_size: int = Field(128, ge=2)  # pairs, over all workers
    # [min, max]: elastic; training goes on with fewer workers after a loss, and grows back
    num_workers: (
        Annotated[int, Field(ge=1)]
        | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    ) = 2
    # pairs of one worker in one pass, the gradient being that of the whole batch (GradCache); none: all of its pairs
    micro_batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    clip_value: float = Field(100.0, gt=0)  # gradient value clip
    # of the encoder's passes. auto: fp32 or bf16, measured once at the start of a run; fp16: with a gradient scaler
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    cpus_per_worker: float = Field(0.5, gt=0)  # logical, for Ray's scheduler
    use_gpu: bool = False
    gpus_per_worker: float = Field(
        1, gt=0, le=1
    )  # with use_gpu; below 1 leaves a share to the embedding actors
    threads_per_worker: int = Field(1, ge=1)
    loader_processes: int = Field(
        2, ge=0
    )  # of one worker, which load batches ahead; 0: threads of its own process
    label_selector: dict[str, str] = Field(
        default_factory=dict
    )  # Ray labels of the nodes that workers may run on
    placement: Literal["PACK", "SPREAD"] = (
        "SPREAD"  # of workers: on as few nodes as hold them, or over the nodes
    )
    max_failures: int = Field(
        3, ge=0
    )  # losses of workers after which training goes on by itself; 0: the run stops
    resize_every_s: float = Field(
        60, gt=0
    )  # elastic: seconds between two looks for room for more workers
    log_every_steps: int = Field(5, ge=1)

    @property
    def gpus(self) -> float:
        """GPUs of one worker."""
        return self.gpus_per_worker if self.use_gpu else 0.0

    @property
    def workers(self) -> tuple[int, int]:
        """The least and the most workers."""
        return (
            self.num_workers
            if isinstance(self.num_workers, tuple)
            else (self.num_workers, self.num_workers)
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        least, most = self.workers
        if not least <= most <= self.batch_size:
            raise ValueError(
                f"num_workers={list(self.workers)} must be [min, max] with min <= max <= batch_size={self.batch_size}"
            )
        if (
            least == most and self.batch_size % most
        ):  # elastic workers take what is left over as empty slots
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by num_workers={most}; "
                f"{self.batch_size - self.batch_size % most or most} is"
            )
        if self.use_gpu and most > 1 and self.gpus_per_worker <= 0.5:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} would put two workers on one GPU, which NCCL refuses;"
                " above 0.5 each has its own"
            )
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} exceeds epochs={self.epochs}")
        return self


class SamplingConfig(Section):
    """How batches are built. similarity: geographic until the first mining round, then mined."""

    mode: Literal["random", "geographic", "similarity"] = "similarity"
    num_hard_negatives: int = Field(
        64, ge=2
    )  # neighbors that join an anchor: half nearest, half drawn
    neighbor_pool_size: int = Field(128, ge=2)  # nearest places that they are drawn from
    # metres; strict protocol: places that near each other never share a batch, as semi-positives never do
    exclude_radius_m: float = Field(0, ge=0)
    # references without a query that join each batch as negatives of its queries, over all workers; 0: none
    gallery_negatives: int = Field(0, ge=0)
    # where those references are taken from
    gallery_splits: tuple[Literal["train", "gallery"], ...] = Field(("train",), min_length=1)
    max_pairs_per_cell: int = Field(
        20_000_000, ge=2
    )  # planned in one pass; more are divided into geographic cells

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_hard_negatives > self.neighbor_pool_size:
            raise ValueError(
                f"num_hard_negatives={self.num_hard_negatives} exceeds neighbor_pool_size="
                f"{self.neighbor_pool_size}; lower the first or raise the second"
            )
        return self


class MiningConfig(Section):
    """When neighbors are recomputed from embeddings."""

    every_epochs: int = Field(4, ge=1)
    # sync: training waits for the round; overlap: it goes on meanwhile, and a graph mined after epoch e is first used
    # by epoch e + 1 + lag_epochs
    schedule: Literal["sync", "overlap"] = "sync"
    lag_epochs: int = Field(1, ge=0)  # overlap
    # overlap, for a graph that is late. wait: training waits for it; reuse: it goes on with the newest that is there,
    # until that is max_staleness_epochs old
    when_late: Literal["wait", "reuse"] = "wait"
    # the oldest graph that is reused or stands in for a failed round, in epochs since it was mined (the geographic one:
    # since epoch 0); none: 2 every_epochs + lag_epochs
    max_staleness_epochs: int | None = Field(None, ge=1)
    max_retries: int = Field(2, ge=0)  # of a round that failed
    # auto: the most exact kind that index_memory_gb holds and that searches in reasonable time
    index_kind: Literal["auto", "flat", "sqfp16", "ivf_sq8", "ivf_rabitq", "hnsw"] = "auto"
    # limit of one version over all shards; none: no limit. While one is built, shards hold up to three
    index_memory_gb: float | None = Field(None, gt=0)
    index_threads: int = Field(2, ge=1)  # of one shard
    # exact search: the faster of faiss and torch, measured once a run (auto)
    exact_engine: Literal["auto", "faiss", "torch", "torch_bf16"] = "auto"
    nprobe: int | None = Field(
        None, ge=1
    )  # IVF: lists that a query visits; none: as many as min_recall needs
    ef_search: int | None = Field(
        None, ge=1
    )  # HNSW: length of a query's candidate list; none: as min_recall needs
    min_recall: float = Field(
        0.9, ge=0, le=1
    )  # of the index against exact search; a round below it fails
    recall_sample: int = Field(256, ge=1)  # queries that recall is measured on
    num_shards: int = Field(1, ge=1)  # actors that hold the index, each a range of the references
    cpus_per_shard: float = Field(0, ge=0)  # logical
    gpus_per_shard: float = Field(0, ge=0)
    shard_placement: Literal["SPREAD", "DEFAULT"] = "SPREAD"  # over the nodes, or as Ray packs them
    label_selector: dict[str, str] = Field(
        default_factory=dict
    )  # Ray labels of the nodes that shards may run on
    query_block: int = Field(1000, ge=1)  # queries in one request to the index
    num_searchers: int = Field(2, ge=1)  # tasks that ask the index at the same time
    part_queries: int = Field(
        20_000, ge=1
    )  # queries in one part of the job, which is what a resumed job keeps
    # filters of likely false negatives; each is counted in metrics.jsonl
    max_score: float | None = Field(None, ge=-1, le=1)  # drop what scores above this
    relative_margin: float | None = Field(
        None, ge=0
    )  # m: drop above p - |p| m, p the best positive's score
    range_min: int = Field(0, ge=0)  # drop each query's first so many other places
    max_candidates: int = Field(
        1024, ge=1
    )  # a query whose candidates are filtered away asks for more, up to this many

    @property
    def lag(self) -> int:
        """Epochs that begin between the end of a mining epoch and the first use of its graph."""
        return self.lag_epochs if self.schedule == "overlap" else 0

    @property
    def staleness_bound(self) -> int:
        """The oldest that a graph may be when an epoch uses it, in epochs since it was mined."""
        return self.max_staleness_epochs or 2 * self.every_epochs + self.lag

    @model_validator(mode="after")
    def _check(self) -> Self:
        least = self.every_epochs + self.lag - 1
        if self.staleness_bound < least:
            raise ValueError(
                f"max_staleness_epochs={self.max_staleness_epochs} is below every_epochs + lag_epochs - 1 = {least},"
                " the age that each graph reaches before the next is due"
            )
        return self


class RunConfig(Section):
    """Everything that determines a run."""

    run_dir: str  # a folder or s3://...
    seed: int = Field(0, ge=0)
    # paper: as published, for its tables. Batches keep the order in which they are built, semi-positives serve as
    # negatives, ties count for the query, galleries have no distractors
    protocol: Literal["strict", "paper"] = "strict"
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        least, most = self.train.workers
        if least == most and self.sampling.gallery_negatives % most:
            raise ValueError(
                f"sampling.gallery_negatives={self.sampling.gallery_negatives} is not divisible by train.num_workers="
                f"{most}: each worker takes the same share"
            )
        if (least < most or self.train.micro_batch_size) and not self.model.freeze_batch_norm:
            raise ValueError(
                "train.micro_batch_size and elastic train.num_workers need model.freeze_batch_norm=true: batch"
                " statistics would be those of a part, or of empty slots"
            )
        if self.data.val_split in (self.data.test_split, self.data.train_split):
            raise ValueError(
                f"data.val_split={self.data.val_split!r} is the test or the train split; choose another"
            )
        turned = {"none": (), "planar": ("query_size", "reference_size"), "query": ("query_size",)}
        for name in turned.get(self.augment.rotate, ("reference_size",)):
            height, width = getattr(self.data, name)
            if height != width:
                raise ValueError(
                    f"data.{name}={[height, width]} is not square, but augment.rotate={self.augment.rotate}"
                    " turns it by 90 degrees; make it square, or set augment.rotate=none"
                )
        return self
