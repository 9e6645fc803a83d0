"""Ray actors that encode the parts of a collection and stay alive between embedding jobs.

The tasks that load images import this module too, to call the actors. They need no torch, so torch
and the encoder are imported when an actor starts.
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
from ray.exceptions import RayActorError, RayError, RayTaskError

from s4g_ray.arrays import Floats32, Ints
from s4g_ray.config.schema import EmbeddingConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.data.image_table import View
from s4g_ray.data.tables.embedding_table import encode_part
from s4g_ray.distributed.actors import await_some, await_start, kill
from s4g_ray.distributed.placement import Need, actor_need
from s4g_ray.distributed.placement_gate import PlacementGate
from s4g_ray.errors import GpuMemoryError, RunError, first_line, is_out_of_memory
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, open_published, read_part, write_part

if TYPE_CHECKING:
    from s4g_ray.encoder.encoder import Encoder
    from s4g_ray.encoder.precision import Numerics

RETRIES = 3  # of a part whose actor died while encoding it
QUEUE = 4  # parts that an actor holds at once: it encodes one, the others are written or wait
CANDIDATES = 4  # actors that are asked for their number of parts before one of them gets a part
ANSWER_S = 1.0  # an actor that does not answer within this time is being restarted
# seconds that actors started anew wait for others that may have no room: a node may be gone
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Encoding:
    """The settings of an embedding job that an actor needs."""

    checkpoint: str
    weights_sha256: str
    numerics: Numerics
    target: str
    batch_size: int
    dtype: str


@dataclass(frozen=True)
class Pixels:
    """The images of a part: ids[n], place_ids[n], uint8 images[n, 3, H, W] of one view."""

    name: str  # of the part's file
    view: View
    ids: Ints
    place_ids: Ints
    images: NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    """A written part, the actor that encoded it, and two times of that actor."""

    part: Part
    actor: str
    ready: float  # when the actor had loaded its weights, in seconds since the epoch
    finished: float  # when it had written the part, in seconds since the epoch


class EncoderActor:
    """Encode parts one after the other, L2-normalise the embeddings and write them.

    Builds the encoder at the first part. Reads weights only when they differ from those of the job
    before.
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
        self._weights_sha256 = ""
        self._ready = 0.0
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._held_parts: set[tuple[str, str]] = set()

    def name(self) -> str:
        """Return the actor's host and process id, as `host:pid`."""
        return self._name

    def num_parts(self) -> int:
        """Return how many parts the actor holds."""
        return len(self._held_parts)

    def encode(self, job: Encoding, pixels: Pixels) -> Encoded:
        """Encode a part's images and write the part.

        Raises RunError for embeddings that are not finite, and for a checkpoint that is unpublished
        or altered; GpuMemoryError where the GPU has no memory for a batch.
        """
        held = (job.target, pixels.name)
        self._held_parts.add(held)
        try:
            vectors = self._thread.submit(self._encode, job, pixels).result()
            _check_finite(vectors, job, pixels)
            data = encode_part(pixels.ids, pixels.place_ids, vectors, job.dtype)
            part = write_part(job.target, pixels.name, data, len(pixels.ids))
            return Encoded(part, self._name, self._ready, time.time())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise GpuMemoryError(_describe_full_gpu(job, len(pixels.images), error)) from error
        finally:
            self._held_parts.discard(held)

    def release_gpu_memory(self) -> None:
        """Free the GPU memory that torch caches for the next batch."""
        if self._device.type == "cuda":
            import torch

            self._thread.submit(torch.cuda.empty_cache).result()

    def _encode(self, job: Encoding, pixels: Pixels) -> Floats32:
        """Return the embeddings of a part's images: float32 [n, D], L2-normalised."""
        import torch

        images = pixels.images
        encoder = self._load_encoder(job)
        if not len(images):
            return np.zeros((0, encoder.dim), dtype=np.float32)
        vectors = []
        with torch.inference_mode():
            for start in range(0, len(images), job.batch_size):
                # arrays of Ray's object store are read-only, which torch does not accept: copy
                copied = images[start : start + job.batch_size].copy()
                batch = torch.from_numpy(copied).to(self._device)
                vectors.append(job.numerics.embed(encoder, batch, pixels.view))
            return torch.nn.functional.normalize(torch.cat(vectors).float(), dim=1).cpu().numpy()

    def _load_encoder(self, job: Encoding) -> Encoder:
        """Return the encoder with the job's numerics and weights; loads only changed ones."""
        from s4g_ray.encoder.weights import WEIGHTS, load_weights

        if self._encoder is None or self._encoder[0] != job.numerics:
            encoder = self._build().to(self._device).eval()
            job.numerics.prepare(encoder)
            self._encoder = (job.numerics, encoder)
            self._weights_sha256 = ""
        encoder = self._encoder[1]
        if self._weights_sha256 != job.weights_sha256:
            self._weights_sha256 = ""  # until all weights are loaded
            part = open_published(job.checkpoint, "checkpoint").part(WEIGHTS)
            if part is None or part.sha256 != job.weights_sha256:
                raise RunError(
                    f"{job.checkpoint} no longer holds the {WEIGHTS} that this job began with;"
                    " resume"
                )
            data = read_part(job.checkpoint, part)
            load_weights(encoder, data, files.join(job.checkpoint, WEIGHTS))
            self._weights_sha256 = job.weights_sha256
            self._ready = time.time()
        return encoder


def _describe_full_gpu(job: Encoding, num_images: int, error: Exception) -> str:
    """Return the message of a batch that finds no memory on its GPU, with torch's reason."""
    return (
        f"an embedding actor has no GPU memory for a batch of {min(job.batch_size, num_images)}"
        " images: lower embedding.batch_size, or have fewer actors and workers share a GPU (raise"
        " embedding.gpus_per_actor, lower embedding.num_actors or train.micro_batch_size), and"
        f" resume; torch says: {first_line(error)}"
    )


def _check_finite(vectors: Floats32, job: Encoding, pixels: Pixels) -> None:
    """Raise RunError with the id of the first embedding that is not finite."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise RunError(
            f"the embedding of {pixels.view} id {pixels.ids[bad[0]]} is not finite ({len(bad)} such"
            f" in {pixels.name}, from its batch {bad[0] // job.batch_size} on), computed with"
            f" {job.checkpoint}"
        )


class ReleasedError(RunError):
    """The actors of a job made room for workers. The job can be repeated: parts are kept."""


class EncoderPool:
    """Run embedding.num_actors EncoderActors; a context manager that stops them.

    The actors start when a job first needs them, and stay. Ray restarts an actor that dies and
    repeats its parts. gate: of the training that they run beside. They start while it is open. When
    it closes they die, and the next job starts new ones: of those, as many as find room.
    """

    def __init__(
        self,
        model: ModelConfig,
        embedding: EmbeddingConfig,
        start_timeout_s: float,
        gate: PlacementGate | None = None,
    ) -> None:
        self.actors: tuple[Any, ...] = ()
        self._model = model
        self._embedding = embedding
        self._start_timeout_s = start_timeout_s
        self._gate = gate
        self._num_releases = 0  # of the gate, when the actors were created
        self._were_complete = False  # all actors have started once
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def need(self) -> Need:
        """Return the resources that the actors take of the cluster."""
        return actor_need(self._embedding)

    @contextmanager
    def job(self) -> Iterator[tuple[Any, ...]]:
        """Yield the actors to one job at a time, once workers are placed.

        Raises RunError when they do not start within ray.start_timeout_s, and ReleasedError in
        place of a RunError of the job whose actors made room for workers.
        """
        with self._lock:
            self._check_open()
            if self._are_released():
                self.actors = ()
            if not self.actors:
                self.actors = self.start_actors()
            if self._closed.is_set():  # while they started
                kill(self.actors)
            self._check_open()
            try:
                yield self.actors
            except RunError as error:
                if self._are_released():
                    raise ReleasedError(f"the embedding actors made room: {error}") from error
                raise
            finally:
                with suppress(RayError):  # of an actor that is being restarted: its cache is empty
                    ray.get(
                        [actor.release_gpu_memory.remote() for actor in self.actors],
                        timeout=self._start_timeout_s,
                    )

    def start_first(self) -> None:
        """Start the actors where others must not start before them; returns at once elsewhere."""
        if self._gate is not None and (not self.actors or self._are_released()):
            with self.job():
                pass

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RunError("the embedding actors are stopped: the run ends")

    def _are_released(self) -> bool:
        return self._gate is not None and self._gate.has_released(self._num_releases)

    def start_actors(self) -> tuple[Any, ...]:
        """Start the actors and wait for them. Raises RunError when they do not start in time."""
        if self._gate is None:
            actors = self._create_actors()
            await_start(actors, self.need, self._start_timeout_s)
            return actors
        while True:
            self._num_releases = self._gate.wait_until_open(self._check_open)
            actors = self._create_actors()
            if not self._gate.admit(actors, self._num_releases):
                kill(actors)
                continue
            try:
                if self._were_complete:
                    return await_some(actors, self.need, self._start_timeout_s, PATIENCE_S)
                await_start(actors, self.need, self._start_timeout_s)
                self._were_complete = True
                return actors
            except RunError:
                if not self._are_released():
                    raise

    def _create_actors(self) -> tuple[Any, ...]:
        cfg = self._embedding
        need = self.need
        options: dict[str, Any] = {
            "num_cpus": cfg.cpus_per_actor,
            "num_gpus": need.gpus,
            "label_selector": cfg.label_selector,
            "scheduling_strategy": "SPREAD",
            "max_restarts": -1,
            "max_task_retries": RETRIES,
            "concurrency_groups": {"encode": QUEUE, "status": 1},
        }
        create: Any = ray.remote(**options)(EncoderActor)
        return tuple(
            create.remote(self._model, cfg.threads_per_actor, need.gpus > 0)
            for _ in range(cfg.num_actors)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        kill(self.actors)
        self.actors = ()


def ask_num_parts(actor: Any) -> Any:
    """Ask an actor for its number of parts; return a reference to the answer.

    The actor answers while it encodes. Ray does not repeat the call when the actor dies.
    """
    return actor.num_parts.options(concurrency_group="status", max_task_retries=0).remote()


def find_least_loaded(actors: Sequence[Any], number: int) -> Any:
    """Return, of a few actors, the one that holds the fewest parts; the first of equals.

    The few actors change with the part's number. (With a share fixed beforehand, fast actors would
    wait for the slowest.) An actor that is being restarted gets no part while others answer.
    """
    num_candidates = min(len(actors), CANDIDATES)
    candidates = [actors[(number + i) % len(actors)] for i in range(num_candidates)]
    calls = [ask_num_parts(actor) for actor in candidates]
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
    loads: list[tuple[int, int]] = []  # number of parts, position among the candidates
    for i, call in enumerate(calls):
        if call in answered:
            with suppress(RayError):
                loads.append((ray.get(call), i))
    if not loads:
        return candidates[0]
    return candidates[min(loads)[1]]


def encode_part_on(actor: Any, encoding: Any, pixels: Pixels, *, timeout_s: float) -> Encoded:
    """Make an actor encode a part. Ray restarts an actor that dies and gives it the part again.

    encoding: an Encoding or a reference to one. Raises RunError as EncoderActor.encode does, for an
    actor that died and does not answer within timeout_s, and for one that dies with this part
    repeatedly.
    """
    call = actor.encode.options(concurrency_group="encode").remote(encoding, pixels)
    try:
        while not ray.wait([call], timeout=timeout_s)[0]:
            if not ray.wait([ask_num_parts(actor)], timeout=timeout_s)[0]:
                raise RunError(
                    f"an embedding actor died, and did not start again within {timeout_s:g} s; free"
                    " what it asks for, or raise ray.start_timeout_s"
                )
        return ray.get(call)  # type: ignore[no-any-return]
    except RayTaskError as error:
        if isinstance(error.cause, RunError):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise RunError(
            f"embedding actors died {RETRIES + 1} times with {pixels.name} of {len(pixels.ids)}"
            " images; lower embedding.batch_size or embedding.part_rows if memory ran out"
        ) from error
