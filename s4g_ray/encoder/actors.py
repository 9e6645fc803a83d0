"""Ray actors that encode the blocks of a collection and stay alive between embedding jobs.

Torch and the encoder are imported when an actor starts: the driver's other processes that get a
handle of an actor import this module too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import RayError

from s4g_ray.config.schema import EmbeddingConfig
from s4g_ray.config.training_schema import ModelConfig
from s4g_ray.distributed.actors import await_some, await_start, kill
from s4g_ray.distributed.placement import Need, actor_need
from s4g_ray.distributed.placement_gate import PlacementGate
from s4g_ray.errors import RunError
from s4g_ray.freed_memory import keeping_variables

if TYPE_CHECKING:
    from s4g_ray.encoder.embedding.outcomes import BlockResult, EncodingJob, Written
    from s4g_ray.encoder.embedding.part_plan import Block, PlannedPart

AT_ONCE = 2  # blocks that an actor has: it encodes one while it decodes the next
# seconds that actors started anew wait for others that may have no room: a node may be gone
PATIENCE_S = 30.0
SPARE_CPUS = 1.0  # that actors beyond the smallest number leave free, for tasks of others


class EncoderActor:
    """A BlockEncoder in a process of its own, with its settings of section `embedding`."""

    def __init__(self, model: ModelConfig, embedding: EmbeddingConfig, use_gpu: bool) -> None:
        import torch

        from s4g_ray.encoder.embedding.block_encoder import BlockEncoder

        self._encoder = BlockEncoder(
            model,
            embedding.threads_per_actor,
            embedding.decoders,
            round(embedding.decode_ahead_mb * 1e6),
            torch.device("cuda" if use_gpu else "cpu"),
        )

    def name(self) -> str:
        """Return the actor's host and process id, as `host:pid`."""
        return self._encoder.name

    def check(self, job: EncodingJob, part: PlannedPart) -> Written | None:
        """Return a part that is committed already, as BlockEncoder.find_part."""
        return self._encoder.find_part(job, part)

    def encode(self, job: EncodingJob, block: Block) -> BlockResult:
        """Encode a block as BlockEncoder.encode; two at a time."""
        return self._encoder.encode(job, block)

    def join(self, job: EncodingJob, part: PlannedPart, blocks: list[Written]) -> Written:
        """Join a part's blocks as BlockEncoder.join."""
        return self._encoder.join(job, part, blocks)

    def progress(self) -> dict[str, int]:
        """Return the number of images encoded of each block in work."""
        return self._encoder.progress()

    def stop(self, token: str) -> None:
        """End the blocks of a job."""
        self._encoder.stop(token)

    def release_memory(self) -> None:
        """Free the memory that the next job may need in another shape."""
        self._encoder.release_memory()


class ReleasedError(RunError):
    """The actors of a job made room for workers. The job can be repeated: parts are kept."""


class EncoderPool:
    """Run embedding.num_actors EncoderActors; a context manager that stops them.

    The smallest number of actors starts when a job first needs them, and stays; more of them start
    during a job where there is room, and end with it. Ray restarts an actor that dies. gate: of the
    training that they run beside. They start while it is open. When it closes they die, and the
    next job starts new ones: of those, as many as find room. worker_cpus: CPUs of that training's
    workers, which more actors leave alone while a worker is not placed, too.
    """

    def __init__(
        self,
        model: ModelConfig,
        embedding: EmbeddingConfig,
        start_timeout_s: float,
        gate: PlacementGate | None = None,
        *,
        worker_cpus: float = 0.0,
    ) -> None:
        self._worker_cpus = worker_cpus
        self.actors: tuple[Any, ...] = ()
        self._model = model
        self._embedding = embedding
        self._start_timeout_s = start_timeout_s
        self._gate = gate
        self._starting: list[tuple[Any, Any, float]] = []  # actor, its first answer, since when
        self._grows_after = 0.0  # time.monotonic(): actors have found no room before
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
                self._shrink()
                with suppress(RayError):  # of an actor that is being restarted: its cache is empty
                    ray.get(
                        [actor.release_memory.remote() for actor in self.actors],
                        timeout=self._start_timeout_s,
                    )

    def start_first(self) -> None:
        """Start the actors where others must not start before them; returns at once elsewhere."""
        if self._gate is not None and (not self.actors or self._are_released()):
            with self.job():
                pass

    def drop(self, actor: Any) -> None:
        """Forget an actor that is gone for good: the next job begins without it."""
        self.actors = tuple(one for one in self.actors if one is not actor)

    def check_released(self) -> None:
        """Raise ReleasedError when the actors of the present job made room for workers."""
        if self._are_released():
            raise ReleasedError("the embedding actors made room")

    def grow(self, num_wanted: int) -> tuple[Any, ...]:
        """Start up to num_wanted more actors where there is room; return those that have started.

        Does not wait: actors that were started by one call are returned by a later one.
        """
        if self._closed.is_set():
            return ()
        started = []
        for entry in list(self._starting):
            actor, answer, since = entry
            if ray.wait([answer], timeout=0)[0]:
                self._starting.remove(entry)
                with suppress(RayError):
                    ray.get(answer)
                    started.append(actor)
            elif time.monotonic() > since + self._start_timeout_s:
                self._starting.remove(entry)
                kill([actor])
                self._grows_after = time.monotonic() + self._start_timeout_s
        self.actors += tuple(started)
        num_more = min(num_wanted, self._embedding.actors[1] - len(self.actors))
        num_more -= len(self._starting)
        if num_more > 0 and time.monotonic() > self._grows_after:
            self._start_more(min(num_more, self._count_room()))
        return tuple(started)

    def _start_more(self, count: int) -> None:
        actors = self._create_actors(count)
        if self._gate is not None and not self._gate.admit(actors, self._num_releases):
            kill(actors)
            return
        now = time.monotonic()
        self._starting.extend((actor, actor.__ray_ready__.remote(), now) for actor in actors)

    def _count_room(self) -> int:
        """Return how many more actors the free resources of the cluster hold."""
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        total = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        num_actors = len(self.actors) + len(self._starting)
        left = total - self._worker_cpus - num_actors * self.need.cpus
        room = (min(free.get("CPU", 0.0), left) - SPARE_CPUS) / self.need.cpus
        if self.need.gpus:
            room = min(room, free.get("GPU", 0.0) / self.need.gpus)
        return max(0, int(room))

    def _shrink(self) -> None:
        """Stop the actors beyond the smallest number."""
        smallest = self._embedding.actors[0]
        extra = [*self.actors[smallest:], *(actor for actor, _, _ in self._starting)]
        if extra:
            kill(extra)
        self._starting = []
        self.actors = self.actors[:smallest]

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RunError("the embedding actors are stopped: the run ends")

    def _are_released(self) -> bool:
        return self._gate is not None and self._gate.has_released(self._num_releases)

    def start_actors(self) -> tuple[Any, ...]:
        """Start the actors and wait for them. Raises RunError when they do not start in time."""
        if self._gate is None:
            actors = self._create_actors(self.need.count)
            await_start(actors, self.need, self._start_timeout_s)
            return actors
        while True:
            self._num_releases = self._gate.wait_until_open(self._check_open)
            actors = self._create_actors(self.need.count)
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

    def _create_actors(self, count: int) -> tuple[Any, ...]:
        cfg = self._embedding
        need = self.need
        options: dict[str, Any] = {
            "num_cpus": cfg.cpus_per_actor,
            "num_gpus": need.gpus,
            "label_selector": cfg.label_selector,
            "scheduling_strategy": "SPREAD",
            "max_restarts": -1,
            "concurrency_groups": {"encode": AT_ONCE, "files": 1, "status": 1},
        }
        if not need.gpus:
            options["runtime_env"] = {"env_vars": keeping_variables()}
        create: Any = ray.remote(**options)(EncoderActor)
        return tuple(create.remote(self._model, cfg, need.gpus > 0) for _ in range(count))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        kill([*self.actors, *(actor for actor, _, _ in self._starting)])
        self.actors = ()
