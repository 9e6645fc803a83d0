"""RunLog: what the workers report, written to metrics.jsonl and shown as lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

from s4g_ray.amounts import count_noun
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.exclusions import Exclusions
from s4g_ray.data.tables.batch_plan import load_record
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.encoder.checkpoint import Checkpoint
from s4g_ray.errors import BadImageError
from s4g_ray.pipeline.prometheus import Exporter
from s4g_ray.pipeline.rounds.mining_round import Span, overlap
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import Record, RunFolder
from s4g_ray.progress import Reporter, Update
from s4g_ray.training.mailbox import Message


class RunLog:
    """Logs the epochs of a run from the workers' messages, each step and each epoch once.

    plans: the records of the plans, by epoch. spans: when each round's mining began and ended.
    on_checkpoint is called when a checkpoint within an epoch is published. finished: the last
    epoch that ended; the driver counts it up.
    """

    def __init__(
        self,
        folder: RunFolder,
        reporter: Reporter,
        exporter: Exporter,
        schedule: Schedule,
        *,
        plans: Mapping[int, Future[Record]],
        spans: Mapping[int, Span],
        num_pairs: int,
        is_elastic: bool,
        on_checkpoint: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._reporter = reporter
        self._exporter = exporter
        self._schedule = schedule
        self._plans = plans
        self._spans = spans
        self._num_pairs = num_pairs
        self._is_elastic = is_elastic
        self._on_checkpoint = on_checkpoint
        self._waits: list[Span] = []  # of the workers, for their plans
        self.finished = 0

    def handle_message(self, epoch: int, message: Message, update: Update) -> None:
        """Log a message of the workers that arrives while the driver follows an epoch."""
        kind = message.pop("kind")
        if kind == "bad_images":
            self._folder.log_bad_images(message["reasons"])
        elif kind == "step":
            update(message.pop("done"), message.pop("total"))
            self._exporter.show_queue("batches", message.pop("ahead"))
            self._folder.log("step", **message)
        elif kind == "waited":
            self._waits.append((message["since"], message["until"]))
        elif kind == "skipped":
            self._log_skipped(message)
        elif kind == "notice":
            self._reporter.line(f"           {message['text']}")
        elif kind == "checkpoint":
            self._on_checkpoint()
        elif kind == "lost":
            self._folder.log("lost", during_epoch=epoch, **message)
            ranks = " and ".join(map(str, message["ranks"]))
            self._reporter.line(f"           lost worker {ranks}: {message['reason']}")
        elif kind == "started":
            self._log_start(epoch, message)
        elif kind == "epoch":
            self._log_epoch(message, self._plans[message["epoch"]].result())

    def _log_skipped(self, message: Message) -> None:
        """Log a skipped step, with the images to blame where a worker knows them."""
        self._folder.log("skipped", **message)
        cause = f": {message['cause']}" if message["cause"] else ""
        self._reporter.line(
            f"           skipped step {message['step']}, whose gradients are not finite{cause}"
        )

    def _log_start(self, epoch: int, message: Message) -> None:
        """Log that workers have started, and forget all after their checkpoint: it is repeated."""
        for ended in range(self.finished + 1, message["epoch"] + 1):
            # the worker died between publishing its checkpoint and reporting it
            if not self._folder.find("epoch", ended):
                record = Checkpoint.read(self._folder.checkpoint(ended)).info["record"]
                self._log_epoch(dict(record), self._plans[ended].result())
        workers = message["workers"]
        step = message["step"]
        self._folder.forget(message["epoch"], step)
        self._folder.log("workers", during_epoch=epoch, workers=workers, after_step=step)
        if any(record["kind"] == "lost" for record in self._folder.records):
            self._reporter.line(
                f"           continuing with {count_noun(workers, 'worker')} after step {step}"
            )

    def _log_epoch(self, record: Record, plan: Record) -> None:
        """Log an epoch and show its line. Raises BadImageError when no pair could be decoded."""
        record = {**record, **plan}
        span = self._spans.get(self._mined_version(record))
        if span is not None:
            record["mining_overlap"] = overlap(span, self._waits)
        self._folder.log("epoch", **record)
        if record["pairs_masked"] == self._num_pairs - record["pairs_left_out"]:
            raise BadImageError(
                "no pair of this epoch could be decoded; see bad_images.jsonl in the run folder"
            )
        workers = f"  {count_noun(record['workers'], 'worker')}" if self._is_elastic else ""
        late = "  graph late" if record["graph_late"] else ""
        waited = f"  waited {record['wait_share']:.0%}" if self._schedule.overlaps else ""
        self._reporter.record_line(
            f"epoch {record['epoch']:>3}  loss {record['loss']:.3f}"
            f"  temperature {record['temperature']:.4f}"
            f"  hardness {record['hardness']:.1f}  left out {record['pairs_left_out']}"
            f"  {record['pairs_per_s']:.0f} pairs/s{waited}{late}{workers}"
        )

    def _mined_version(self, record: Record) -> int:
        """Return the version of an epoch's graph if the epoch is the first to use it, else -1."""
        for earlier in self._folder.records:
            if earlier["kind"] == "epoch" and earlier["graph"] == record["graph"]:
                return -1
        return int(record["epoch"] - 1 - (record["graph_age"] or 0))

    def restore_lines(self, start: Checkpoint, plan_uri: str) -> None:
        """Log the steps and the epoch before a checkpoint whose driver died before it logged them.

        plan_uri: where the plan of the checkpoint's epoch lies.
        """
        logged = {record["step"] for record in self._folder.records if record["kind"] == "step"}
        infos = []
        if start.epoch:
            infos.append(Checkpoint.read(self._folder.checkpoint(start.epoch)).info)
        if start.batch:
            infos.append(start.info)
        for info in infos:
            for line in info.get("lines", ()):
                if line["step"] not in logged:
                    self._folder.log("step", **line)
            if "record" in info and not self._folder.find("epoch", start.epoch):
                self._folder.log("epoch", **info["record"], **load_record(plan_uri))


def describe_run(
    config: RunConfig, name: str, split: TrainSplit, start: Checkpoint | None
) -> Iterator[str]:
    """Yield the lines that a run begins with. name: of the data set; start: None for a new run."""
    train = config.train
    pairs = count_noun(len(split.pairs), "train pair")
    yield f"data set {name}: {pairs}, {count_noun(len(split.places), 'place')}"
    if split.gallery is not None:
        yield f"references without a query that serve as gallery negatives: {len(split.gallery):,}"
    if split.exclusions is not None:
        excluded = _describe_exclusions(split.exclusions)
        yield f"{excluded} are never negatives of each other (protocol {config.protocol})"
    yield f"run folder {config.run_dir}"
    counts = " to ".join(str(count) for count in dict.fromkeys(train.workers))
    workers = f"{counts} worker{'' if counts == '1' else 's'}"
    yield (
        f"{config.model.name}, {count_noun(train.epochs, 'epoch')} of batches of {train.batch_size}"
        f" pairs on {workers}, {config.sampling.mode} sampling"
    )
    if start is not None:
        within = (
            f" and {count_noun(start.batch, 'batch', 'batches')} of the next" if start.batch else ""
        )
        yield f"resuming after epoch {start.epoch}{within} (step {start.step})"


def _describe_exclusions(exclusions: Exclusions) -> str:
    parts = []
    num_semi = len(exclusions.semi_positives) // 2
    if num_semi:
        parts.append(f"{num_semi} semi-positive pairs of places")
    if exclusions.radius_m > 0:
        parts.append(f"all places within {exclusions.radius_m:g} m")
    return " and ".join(parts)
