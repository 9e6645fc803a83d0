"""Define the keys of the sections `model` and `train`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from s4g_ray.config.section import Section


class ModelConfig(Section):
    """The shared encoder: a timm backbone with global average pooling, without further layers."""

    name: str = "convnext_base.fb_in22k_ft_in1k_384"
    # true: weights of timm's hub; false: random weights; else the state dict at a path, s3://... or
    # package://PACKAGE/FILE
    pretrained: bool | str = True
    freeze_batch_norm: bool = True  # batch statistics would depend on the number of workers
    # compute activations again in the backward pass: less memory, more time
    grad_checkpointing: bool = False
    temperature: float = Field(0.07, gt=0)  # initial; learned as logit_scale = log(1 / temperature)


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
    weight_decay: float = Field(0.01, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    clip_value: float = Field(100.0, gt=0)  # largest absolute value of a gradient's element
    # of the encoder's passes. auto: fp32 or bf16, measured once at the start of a run; fp16: with a
    # gradient scaler
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
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
    log_every_steps: int = Field(5, ge=1)

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
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} exceeds epochs={self.epochs}")
        return self
