"""Define the keys of the sections `model` and `train`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from s4g_ray.config.section import Section

OptionValue = bool | int | float | str | list[bool | int | float | str]
# keywords of timm.create_model that model.options must not set, with what sets them instead
RESERVED_OPTIONS = {
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.pretrained",
    "pretrained_cfg": "model.name, as in NAME.TAG",
    "pretrained_cfg_overlay": "model.name, as in NAME.TAG",
    "num_classes": "the encoder, which has no classifier",
    "in_chans": "the encoder, whose images have 3 channels",
    "features_only": "the encoder, which pools the features",
    "scriptable": "nothing, as models are not compiled to TorchScript",
    "exportable": "nothing, as models are not compiled to TorchScript",
    "no_jit": "nothing, as models are not compiled to TorchScript",
}


class ModelConfig(Section):
    """The encoder: a timm backbone for both views, or one for each, and the layer after it."""

    name: str = "convnext_base.fb_in22k_ft_in1k_384"
    # true: weights of timm's hub; false: random weights; else the state dict at a path, s3://... or
    # package://PACKAGE/FILE
    pretrained: bool | str = True
    # more keywords of timm.create_model, such as drop_path_rate, global_pool or img_size. Models
    # that can take images of any size do so, unless img_size, dynamic_img_size or strict_img_size
    # is given
    options: dict[str, OptionValue] = Field(default_factory=dict)
    # true: one backbone for both views; false: one for each view, with the same initial weights
    shared: bool = True
    # none: the pooled output of the backbone; linear: a linear layer after it, to embedding_dim
    # values; gem: generalised-mean pooling with a learned exponent in place of the model's pooling
    head: Literal["none", "linear", "gem"] = "none"
    embedding_dim: int | None = Field(None, ge=1)  # of head=linear
    # leading stages (of a convolutional net) or blocks (of a ViT) that do not train, and the stem
    # before them; 0: all train
    freeze: int = Field(0, ge=0)
    freeze_batch_norm: bool = True  # batch statistics would depend on the number of workers
    # compute activations again in the backward pass: less memory, more time
    grad_checkpointing: bool = False
    temperature: float = Field(0.07, gt=0)  # initial; learned as logit_scale = log(1 / temperature)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.options:
            if name in RESERVED_OPTIONS:
                raise ValueError(
                    f"options.{name} is set by {RESERVED_OPTIONS[name]}; remove it from the options"
                )
        if self.head == "linear" and self.embedding_dim is None:
            raise ValueError("head=linear needs embedding_dim, the number of values that it gives")
        if self.head != "linear" and self.embedding_dim is not None:
            raise ValueError(
                f"embedding_dim={self.embedding_dim} needs head=linear; head={self.head} keeps the"
                " width of the backbone"
            )
        return self


class TrainConfig(Section):
    """The optimisation, and the workers that run it."""

    epochs: int = Field(40, ge=1)
    batch_size: int = Field(128, ge=2)  # pairs, over all workers
    # [min, max]: elastic; training continues with fewer workers after a loss, and grows back
    num_workers: (
        Annotated[int, Field(ge=1)]
        | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    ) = 2
    # pairs of one worker in one pass, with the gradient of the whole batch (GradCache); none: all
    # pairs of the worker
    micro_batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    # of the rate after the warm-up: half a cosine, a constant, or a power of the share that is left
    schedule: Literal["cosine", "constant", "polynomial"] = "cosine"
    schedule_power: float = Field(1.0, gt=0)  # of polynomial; 1: a straight line
    end_learning_rate: float = Field(0.0, ge=0)  # that cosine and polynomial end at
    warmup_epochs: float = Field(1.0, ge=0)
    # learning rate of each layer relative to that of the layer after it; 1: the same for all
    layer_decay: float = Field(1.0, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    # whether weight_decay acts on norms, biases and logit_scale too; none: only with protocol=paper
    decay_norms: bool | None = None
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    # strict protocol. 0: a query's target is its own tile. Above: other tiles of the batch that
    # show the same ground share it, and count so much times as their share of common ground; needs
    # size_m, and sampling.exclude_radius_m below the distance of such tiles
    soft_labels: float = Field(0.0, ge=0, le=1)
    # common ground over the ground that either shows, below which tiles do not share a target
    soft_label_min_share: float = Field(0.1, ge=0, le=1)
    clip_value: float = Field(100.0, gt=0)  # largest absolute value of a gradient's element
    clip_norm: float | None = Field(None, gt=0)  # largest norm of the whole gradient; none: any
    max_logit_scale: float | None = Field(None, gt=0)  # largest 1 / temperature; none: any
    # weights that are averaged over steps, each worth so much of the average before it; published,
    # mined with and evaluated in place of the trained ones. none: no average
    ema_decay: float | None = Field(None, gt=0, lt=1)
    # steps in a row whose gradients are not finite, after which the run stops; they are skipped
    max_skipped_steps: int = Field(30, ge=1)
    # of the encoder's passes. auto: fp32 or bf16, measured once at the start of a run; fp16: with a
    # gradient scaler
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    tf32: bool = True  # CUDA: fp32 products, those of the loss too, with 10 bits of mantissa
    compile: bool = False  # torch.compile the encoder; the first step takes minutes longer
    gradient_compression: Literal["none", "bf16"] = "none"  # of the sum over workers
    cpus_per_worker: float = Field(0.5, gt=0)  # logical, for Ray's scheduler
    use_gpu: bool = False
    # with use_gpu; for Ray's scheduler. Above 0.5 each worker has a GPU of its own, and below 1 it
    # leaves a share of it to the embedding actors. Ray counts by the sum of a node's GPUs: several
    # nodes, and elastic workers, need more than n / (n + 1) for nodes of n GPUs (0.9: up to 8)
    gpus_per_worker: float = Field(0.9, gt=0, le=1)
    threads_per_worker: int = Field(1, ge=1)
    # processes of one worker that load batches ahead; 0: threads of the worker load them
    loader_processes: int = Field(2, ge=0)
    label_selector: dict[str, str] = Field(default_factory=dict)  # Ray labels of workers' nodes
    # PACK: workers on as few nodes as hold them, which talk fastest; SPREAD: over the nodes
    placement: Literal["PACK", "SPREAD"] = "PACK"
    # environment variables of the workers, such as {NCCL_SOCKET_IFNAME: eth0}; on GPUs, NCCL_DEBUG
    # is WARN unless it is set
    env: dict[str, str] = Field(default_factory=dict)
    # seconds that a worker waits for the others in a collective operation, then it counts as lost
    collective_timeout_s: float = Field(600, gt=0)
    # losses of workers after which training continues by itself; 0: the run stops at the first.
    # Nodes that announce their end (Ray drains them) do not count
    max_failures: int = Field(3, ge=0)
    # elastic: seconds between two checks for room for more workers
    resize_every_s: float = Field(60, gt=0)
    # steps between two lines in metrics.jsonl. Workers meet only then: a stop waits as long
    log_every_steps: int = Field(5, ge=1)
    # [first, last]: steps of the run that each worker records with torch's profiler
    profile_steps: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None

    @property
    def gpus(self) -> float:
        """Return the GPUs of one worker."""
        return self.gpus_per_worker if self.use_gpu else 0.0

    @property
    def workers(self) -> tuple[int, int]:
        """Return the smallest and the largest number of workers."""
        if isinstance(self.num_workers, tuple):
            return self.num_workers
        return self.num_workers, self.num_workers

    @model_validator(mode="after")
    def _check(self) -> Self:
        min_workers, max_workers = self.workers
        is_elastic = min_workers != max_workers
        if not min_workers <= max_workers <= self.batch_size:
            raise ValueError(
                f"num_workers={list(self.workers)} must be [min, max] with"
                f" min <= max <= batch_size={self.batch_size}"
            )
        num_left = self.batch_size % max_workers
        if num_left and not is_elastic:  # elastic workers fill up with empty slots
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by num_workers={max_workers}; "
                f"{self.batch_size - num_left} is"
            )
        if self.use_gpu and max_workers > 1 and self.gpus_per_worker <= 0.5:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} would put two workers on one GPU, which"
                " NCCL refuses; with more than 0.5 each has its own"
            )
        if self.end_learning_rate > self.learning_rate:
            raise ValueError(
                f"end_learning_rate={self.end_learning_rate:g} exceeds"
                f" learning_rate={self.learning_rate:g}; lower it"
            )
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps={list(self.profile_steps)} must be [first, last]")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} exceeds epochs={self.epochs}")
        return self
