"""Actors that encode the parts of a collection, and stay alive from one embedding job to the next.

The tasks that load images import this module too, to reach the actors: torch and the encoder are imported where an
actor starts.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import ModelConfig, RunConfig
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.distributed.actors import await_start, kill
from s4g_ray.distributed.placement import Need, actor_need
from s4g_ray.errors import RunError
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_published, read_part, write_part

if TYPE_CHECKING:
    from s4g_ray.encoder.encoder import Encoder
    from s4g_ray.encoder.precision import Numerics

RETRIES = 3  # of a part whose actor died under it
QUEUE = (
    4  # parts that an actor holds at the same time: one is encoded, the others are written or wait
)
CHOICES = 4  # actors that are asked how busy they are before one of them is given a part
ANSWER_S = 1.0  # an actor that does not say so by then is starting again


@dataclass(frozen=True)
class Encoding:
    """What an actor is told of a job."""

    checkpoint: str
    weights_sha256: str
    numerics: Numerics
    target: str
    batch_size: int
    dtype: str


@dataclass(frozen=True)
class Pixels:
    """Images of a part, as the encoder takes them: ids[n], place_ids[n], images uint8 [n, 3, H, W]."""

    name: str  # of the part's file
    ids: Ints
    place_ids: Ints
    images: NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    """A part that is written, by which actor, and when that had its weights and ended."""

    part: Part
    actor: str
    ready: float  # seconds since the epoch, as below
    finished: float


class EncoderActor:
    """Encodes parts one after the other, L2-normalises and writes them.

    The encoder is built at the first part; weights are read when a job has others than the job before.
    """

    def __init__(self, model: ModelConfig, num_threads: int, use_gpu: bool) -> None:
        import torch

        from s4g_ray.encoder.encoder import Encoder

        self._build = partial(Encoder.build, model, weights=False)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        self._thread = ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(num_threads,)
        )
        self._encoder: tuple[Numerics, Encoder] | None = None
        self._weights, self._ready = "", 0.0
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._parts: set[tuple[str, str]] = set()

    def name(self) -> str:
        """Its host and process."""
        return self._name

    def load(self) -> int:
        """How many parts it holds."""
        return len(self._parts)

    def encode(self, job: Encoding, pixels: Pixels) -> Encoded:
        """Encode a part's images and write the part.

        Raises RunError for embeddings that are not finite, and for a checkpoint that is unpublished or altered.
        """
        held = (job.target, pixels.name)
        self._parts.add(held)
        try:
            vectors = self._thread.submit(self._encode, job, pixels.images).result()
            _check_finite(vectors, job, pixels)
            data = encode_part(pixels.ids, pixels.place_ids, vectors, job.dtype)
            part = write_part(job.target, pixels.name, data, len(pixels.ids))
            return Encoded(part, self._name, self._ready, time.time())
        finally:
            self._parts.discard(held)

    def release_gpu_memory(self) -> None:
        """Give back the GPU memory that is only kept for the next batch."""
        if self._device.type == "cuda":
            import torch

            self._thread.submit(torch.cuda.empty_cache).result()

    def _encode(self, job: Encoding, images: NDArray[np.uint8]) -> Floats32:
        """images[n, 3, H, W] -> float32 [n, D], L2-normalised."""
        import torch

        encoder = self._encoder_for(job)
        if not len(images):
            return np.zeros((0, encoder.dim), dtype=np.float32)
        with torch.inference_mode():
            vectors = [  # a batch is copied: torch takes no arrays that cannot be written, as those of the store
                job.numerics.embed(
                    encoder,
                    torch.from_numpy(images[at : at + job.batch_size].copy()).to(self._device),
                )
                for at in range(0, len(images), job.batch_size)
            ]
            return torch.nn.functional.normalize(torch.cat(vectors).float(), dim=1).cpu().numpy()

    def _encoder_for(self, job: Encoding) -> Encoder:
        from s4g_ray.encoder.weights import WEIGHTS, load_weights

        if self._encoder is None or self._encoder[0] != job.numerics:
            encoder = self._build().to(self._device).eval()
            job.numerics.prepare(encoder)
            self._encoder, self._weights = (job.numerics, encoder), ""
        encoder = self._encoder[1]
        if self._weights != job.weights_sha256:
            self._weights = ""  # until all are loaded
            part = open_published(job.checkpoint, "checkpoint").part(WEIGHTS)
            if part is None or part.sha256 != job.weights_sha256:
                raise RunError(
                    f"{job.checkpoint} no longer holds the {WEIGHTS} that this job began with; resume"
                )
            data = read_part(job.checkpoint, part)
            load_weights(encoder, data, files.join(job.checkpoint, WEIGHTS))
            self._weights, self._ready = job.weights_sha256, time.time()
        return encoder


def _check_finite(vectors: Floats32, job: Encoding, pixels: Pixels) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        view = pixels.name.split("/")[0]
        raise RunError(
            f"the embedding of {view} id {pixels.ids[bad[0]]} is not finite ({len(bad)} such in {pixels.name}, from its"
            f" batch {bad[0] // job.batch_size} on), by {job.checkpoint}"
        )


class EncoderPool:
    """embedding.num_actors EncoderActors; a context manager that stops them.

    They start when a job first needs them, and stay. One that dies is started again, and its parts are done again.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._actors: tuple[Any, ...] = ()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def need(self) -> Need:
        """What the actors take of the cluster."""
        return actor_need(self._config.embedding)

    @contextmanager
    def job(self) -> Iterator[tuple[Any, ...]]:
        """The actors, for one job at a time. Raises RunError when they do not start within ray.start_timeout_s."""
        timeout_s = self._config.ray.start_timeout_s
        with self._lock:
            if self._closed.is_set():
                raise RunError("the embedding actors are stopped: the run ends")
            self._actors = self._actors or self._start(timeout_s)
            if self._closed.is_set():  # while they started
                kill(self._actors)
                raise RunError("the embedding actors are stopped: the run ends")
            try:
                yield self._actors
            finally:
                with suppress(RayError):  # of one that is starting again: its cache is empty
                    ray.get(
                        [actor.release_gpu_memory.remote() for actor in self._actors],
                        timeout=timeout_s,
                    )

    def _start(self, timeout_s: float) -> tuple[Any, ...]:
        cfg = self._config.embedding
        options: dict[str, Any] = {
            "num_cpus": cfg.cpus_per_actor,
            "num_gpus": cfg.gpus_per_actor,
            "label_selector": cfg.label_selector,
            "scheduling_strategy": "SPREAD",
            "max_restarts": -1,
            "max_task_retries": RETRIES,
            "concurrency_groups": {"encode": QUEUE, "load": 1},
        }
        create: Any = ray.remote(**options)(EncoderActor)
        setup = self._config.model, cfg.threads_per_actor, cfg.gpus_per_actor > 0
        actors = tuple(create.remote(*setup) for _ in range(cfg.num_actors))
        await_start(actors, self.need, timeout_s)
        return actors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        kill(self._actors)
        self._actors = ()


def ask_load(actor: Any) -> Any:
    """A call of an actor's load, which it answers while it encodes; not repeated when it dies."""
    return actor.load.options(concurrency_group="load", max_task_retries=0).remote()


def least_loaded(actors: Sequence[Any], number: int) -> Any:
    """Of a few actors, which change with the part's number, the one that holds the fewest parts; the first of equals.

    With a share fixed beforehand, the faster actors would wait for the slowest. One that is starting again gets none
    while others answer.
    """
    few = [actors[(number + i) % len(actors)] for i in range(min(len(actors), CHOICES))]
    calls = [ask_load(actor) for actor in few]
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
    loads: list[tuple[int, int]] = []
    for i, call in enumerate(calls):
        if call in answered:
            with suppress(RayError):
                loads.append((ray.get(call), i))
    return few[min(loads)[1] if loads else 0]
