"""Turn a collection of images and a checkpoint into an embedding table, with actors of a pool.

The driver plans parts and blocks from ids and places alone, and gives blocks to the actors of an
EncoderPool (actors.py): they read, decode and encode the images, and write the table. No pixels and
no embeddings pass through the driver or Ray's object store. Each block is committed, so that a
restarted job keeps it; the driver publishes the table when all parts are written.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from s4g_ray.arrays import Ints
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.image_table import VIEWS, View
from s4g_ray.encoder.actors import AT_ONCE, EncoderPool, ReleasedError
from s4g_ray.encoder.embedding.block_queue import BlockQueue, Join, Work
from s4g_ray.encoder.embedding.encode_here import encode_here
from s4g_ray.encoder.embedding.outcomes import EncodingJob, Written, job_key
from s4g_ray.encoder.embedding.part_plan import Block, PlannedPart
from s4g_ray.encoder.embedding.report import EmbeddingReport, warm_rate
from s4g_ray.encoder.embedding.table_plan import fingerprint_places, plan_view, splits_of_views
from s4g_ray.errors import BadImageError, InputError, RunError, reason_of
from s4g_ray.progress import Update, ignore
from s4g_ray.storage import files
from s4g_ray.storage.manifest import Part, Stamp, is_published, open_published, publish
from s4g_ray.storage.part_commits import WORK, check_reached

if TYPE_CHECKING:  # takes seconds to import
    from s4g_ray.encoder.precision import Numerics

POLL_S = 1.0  # between two questions to actors for their progress
GROW_EVERY_S = 5.0  # between two looks for room for more actors
STOP_S = 10.0  # that a job which fails waits for the batches in progress


def embed(
    pool: EncoderPool | None,
    config: RunConfig,
    dataset: GeoDataset,
    checkpoint: str,
    target: str,
    *,
    splits: Sequence[str],
    numerics: Numerics,
    stamp: Stamp,
    views: Sequence[View] = VIEWS,
    only_places: Ints | None = None,
    on_progress: Update = ignore,
) -> EmbeddingReport:
    """Embed the views of some splits into a published table at `target`.

    The test split includes the references of split `gallery`. only_places: ascending place ids;
    other places of the train split and of sampling.gallery_splits are left out, and other splits
    are embedded whole. `pool` must be made from a configuration with the same model; None: this
    process encodes, without Ray. Keeps the
    parts and blocks that an interrupted job committed from the same inputs; replaces a published
    table. Rows are in the order of place_id, then id, and no place lies in two parts.

    Raises BadImageError for a corrupt image when `data.on_bad_image` is `fail`, and when no image
    of a view can be decoded; RunError for non-finite embeddings, for actors that do not start, and
    when the job dies; GpuMemoryError for a batch that the GPU has no memory for. Errors about an
    image name it. A job whose actors make room for workers waits for new ones.
    """
    if is_published(target):
        files.remove(target)
    started = time.perf_counter()
    splits_of = splits_of_views(splits, views, config.data.test_split)
    parts: list[PlannedPart] = []
    for view in views:
        parts.extend(
            plan_view(dataset, view, splits_of[view], config, stamp.dim, only_places=only_places)
        )
    queue = BlockQueue(parts, _list_committed(target, views))
    job = _describe_job(config, dataset, checkpoint, target, splits_of, numerics, stamp)
    _run(pool, config, job, queue, on_progress)
    _check_views(parts, queue.written, views)
    written = [queue.written[part.name] for part in _in_order(parts)]
    bad = tuple(reason for one in written for reason in one.bad)
    info = {
        "splits": list(splits),
        "bad_images": list(bad),
        "place_order": True,
        "only_places": fingerprint_places(only_places),
    }
    _publish(target, [one.part for one in written if one.part is not None], stamp, info)
    return EmbeddingReport(
        images=queue.total - len(bad),
        seconds=time.perf_counter() - started,
        warm_images_per_s=warm_rate(queue.results),
        bad_images=bad,
        reused_parts=queue.num_reused,
        reused_images=queue.num_reused_images,
    )


def _describe_job(
    config: RunConfig,
    dataset: GeoDataset,
    checkpoint: str,
    target: str,
    splits_of: Mapping[View, tuple[str, ...]],
    numerics: Numerics,
    stamp: Stamp,
) -> EncodingJob:
    return EncodingJob(
        token="",
        key=job_key(config, numerics, stamp),
        checkpoint=checkpoint,
        weights_sha256=open_published(checkpoint, "checkpoint").info["weights_sha256"],
        numerics=numerics,
        target=target,
        batch_size=config.embedding.batch_size,
        dtype=config.embedding.dtype,
        data=config.data.model_copy(update={"uri": dataset.uri}),
        fingerprint=dataset.fingerprint,
        splits=splits_of,
        seed=config.seed,
        resumes=bool(files.list_names(files.join(target, WORK))),
    )


def _in_order(parts: Sequence[PlannedPart]) -> list[PlannedPart]:
    return sorted(parts, key=lambda part: (part.view, part.number))


def _list_committed(target: str, views: Sequence[View]) -> set[str]:
    """List the parts that an interrupted job has committed, by the names of their commits."""
    names = set()
    for view in views:
        for name in files.list_names(files.join(target, WORK, view)):
            if name.endswith(".parquet.json"):
                names.add(f"{view}/{name.removesuffix('.json')}")
    return names


def _check_views(
    parts: Sequence[PlannedPart], written: Mapping[str, Written], views: Sequence[View]
) -> None:
    """Raise BadImageError for a view without a single image that could be decoded."""
    for view in views:
        own = [part for part in parts if part.view == view]
        if any(written[part.name].num_rows for part in own):
            continue
        reasons = [reason for part in own for reason in written[part.name].bad]
        num_images = sum(part.num_images for part in own)
        first_reason = reasons[0] if reasons else "there are none"
        raise BadImageError(f"none of the {num_images} {view} could be decoded: {first_reason}")


def _publish(target: str, parts: list[Part], stamp: Stamp, info: Mapping[str, Any]) -> None:
    """Publish the table; remove files of an earlier job and the commits.

    Raises RunError for parts that were written but cannot be found.
    """
    check_reached(target, parts)
    names = {part.name for part in parts}
    for folder in set(files.list_names(target)) - {WORK}:
        for file in files.list_names(files.join(target, folder)):
            if f"{folder}/{file}" not in names:
                files.remove(files.join(target, folder, file))
    publish(target, "embeddings", parts, stamp, info)
    files.remove(files.join(target, WORK))


def _run(
    pool: EncoderPool | None,
    config: RunConfig,
    job: EncodingJob,
    queue: BlockQueue,
    on_progress: Update,
) -> None:
    if pool is None:
        encode_here(config, job, queue, on_progress)
    else:
        _run_on_pool(pool, job, queue, config.ray.start_timeout_s, on_progress)


def _run_on_pool(
    pool: EncoderPool,
    job: EncodingJob,
    queue: BlockQueue,
    start_timeout_s: float,
    on_progress: Update,
) -> None:
    """Do all work on the pool's actors; the rest on new ones, when they made room for workers."""
    while not queue.is_done:
        attempt = replace(job, token=uuid.uuid4().hex)
        with suppress(ReleasedError), pool.job() as actors:
            dispatcher = Dispatcher(pool, actors, attempt, queue, start_timeout_s, on_progress)
            dispatcher.run()


class Member:
    """An actor of a job, and what it has to do."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.works: dict[Any, Work] = {}  # by the call's reference
        self.question: Any = None  # a call for its progress that it has not answered yet
        self.counts: dict[str, int] = {}  # images encoded of each of its blocks
        self.restart: Any = None  # a call that it answers when Ray has started it again
        self.is_gone = False  # for good

    @property
    def is_up(self) -> bool:
        """Return whether the actor takes work."""
        return not self.is_gone and self.restart is None


class Dispatcher:
    """Gives work to the actors of a pool until a queue is empty.

    An actor has one block to encode and one to decode ahead; at the end of a job each has one, so
    that none waits for the slowest. Ray restarts an actor that dies; its blocks go to the others
    meanwhile. Nothing limits the time of a block.
    """

    def __init__(
        self,
        pool: EncoderPool,
        actors: Sequence[Any],
        job: EncodingJob,
        queue: BlockQueue,
        start_timeout_s: float,
        on_progress: Update,
    ) -> None:
        self._pool = pool
        self._job = ray.put(job)
        self._token = job.token
        self._queue = queue
        self._start_timeout_s = start_timeout_s
        self._on_progress = on_progress
        self._members = [Member(actor) for actor in actors]
        self._num_shown = 0
        self._asked = 0.0  # time.monotonic() of the last questions for progress
        self._looked = time.monotonic()  # of the last look for room for more actors
        self._answered = time.monotonic()  # of the last time that an actor was up

    def run(self) -> None:
        """Do all work. Raises the errors of embed."""
        try:
            while not self._queue.is_done:
                self._give_work()
                self._await_calls()
                self._follow_restarts()
                self._ask_progress()
                self._grow()
        finally:
            self._stop()

    def _give_work(self) -> None:
        up = [member for member in self._members if member.is_up]
        while up and self._queue.num_waiting:
            limit = AT_ONCE if self._queue.num_waiting > len(up) else 1
            member = min(up, key=lambda one: len(one.works))
            if len(member.works) >= limit:
                return
            work = self._queue.take()
            assert work is not None
            member.works[self._call(member.actor, work)] = work

    def _call(self, actor: Any, work: Work) -> Any:
        if isinstance(work, Block):
            return actor.encode.options(concurrency_group="encode").remote(self._job, work)
        files_group = {"concurrency_group": "files"}
        if isinstance(work, Join):
            return actor.join.options(**files_group).remote(self._job, work.part, work.blocks)
        return actor.check.options(**files_group).remote(self._job, work.part)

    def _await_calls(self) -> None:
        """Wait until a call ends, or an actor is back, POLL_S at most."""
        calls = [call for member in self._members for call in member.works]
        restarts = [member.restart for member in self._members if member.restart is not None]
        if not calls and not restarts:
            raise RunError("all embedding actors have died; resume")
        ray.wait([*calls, *restarts], num_returns=1, timeout=POLL_S)
        ended, _ = ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
        of_call = {call: member for member in self._members for call in member.works}
        for call in ended:
            member = of_call[call]
            if call in member.works:  # else its actor died a moment ago
                self._finish(member, call)

    def _finish(self, member: Member, call: Any) -> None:
        work = member.works[call]
        try:
            result = ray.get(call)
        except RayTaskError as error:
            raise self._describe_error(error) from error
        except RayActorError:
            self._lose(member)
            return
        except RayError as error:
            raise self._describe_error(error) from error
        del member.works[call]
        if isinstance(work, Block):
            self._queue.finish_block(work, result)
        elif isinstance(work, Join):
            self._queue.finish_join(work, result)
        else:
            self._queue.finish_check(work, result)
        self._show()

    def _describe_error(self, error: RayError) -> Exception:
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, BadImageError):
            return BadImageError(f"{cause}; fix the image, or set data.on_bad_image=skip")
        if isinstance(cause, RunError | InputError):
            return cause
        done = f"{self._queue.num_done} of {self._queue.total}"
        return RunError(f"the embedding job failed after {done} images: {reason_of(error)}")

    def _lose(self, member: Member) -> None:
        """Put back the work of an actor that died, and wait for its restart beside the others'."""
        works = list(member.works.values())
        member.works.clear()
        member.counts = {}
        member.question = None
        self._queue.put_back(reversed(works))
        self._pool.check_released()
        self._queue.count_failures(works)
        # unlike work, this call is repeated until the actor has started
        member.restart = member.actor.__ray_ready__.options(max_task_retries=-1).remote()

    def _follow_restarts(self) -> None:
        for member in self._members:
            if member.restart is None or not ray.wait([member.restart], timeout=0)[0]:
                continue
            try:
                ray.get(member.restart)
            except RayError:  # stopped, or its node is gone and has left no other
                member.is_gone = True
                self._pool.drop(member.actor)
            member.restart = None
        now = time.monotonic()
        if any(member.is_up for member in self._members):
            self._answered = now
            return
        self._pool.check_released()
        if now > self._answered + self._start_timeout_s:
            raise RunError(
                "the embedding actors died, and none has started again within"
                f" {self._start_timeout_s:g} s; free what they ask for, or raise"
                " ray.start_timeout_s"
            )

    def _ask_progress(self) -> None:
        """Ask actors how far their blocks are; they answer while they encode."""
        is_due = time.monotonic() > self._asked + POLL_S
        for member in self._members:
            if member.question is not None and ray.wait([member.question], timeout=0)[0]:
                with suppress(RayError):
                    member.counts = ray.get(member.question)
                member.question = None
            if is_due and member.question is None and member.is_up and member.works:
                ask = member.actor.progress.options(concurrency_group="status")
                member.question = ask.remote()
        if is_due:
            self._asked = time.monotonic()
            self._show()

    def _show(self) -> None:
        done = self._queue.num_done
        for member in self._members:
            done += sum(member.counts.get(work.name, 0) for work in member.works.values())
        self._num_shown = max(self._num_shown, min(done, self._queue.total))
        self._on_progress(self._num_shown, self._queue.total)

    def _grow(self) -> None:
        now = time.monotonic()
        if now < self._looked + GROW_EVERY_S:
            return
        self._looked = now
        # an actor that starts takes some time: as long as a few blocks of the others
        num_wanted = self._queue.num_waiting // AT_ONCE - len(self._members)
        self._members.extend(Member(actor) for actor in self._pool.grow(num_wanted))

    def _stop(self) -> None:
        """End the calls that are still running, so that none writes after the job's end."""
        calls: list[Any] = []
        for member in self._members:
            self._queue.put_back(member.works.values())
            calls.extend(member.works)
            if member.works and member.is_up:
                with suppress(RayError):
                    member.actor.stop.options(concurrency_group="status").remote(self._token)
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=STOP_S)
