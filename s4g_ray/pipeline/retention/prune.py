"""`s4g prune`: remove what a run that is not in progress does not need."""

from __future__ import annotations

from dataclasses import dataclass

from s4g_ray.amounts import format_bytes
from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.encoder.checkpoint import FOLDER as CHECKPOINTS
from s4g_ray.errors import InputError
from s4g_ray.pipeline.records import read_records
from s4g_ray.pipeline.retention.artefacts import Keep, find_removable, list_versioned, measure
from s4g_ray.pipeline.retention.rule import RunState
from s4g_ray.pipeline.rounds.graphs import FOLDERS
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import Record
from s4g_ray.progress import Reporter
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.manifest import is_published, published_versions
from s4g_ray.storage.ownership.lease import owning


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be: names by folder of the run, and their bytes."""

    removed: dict[str, list[str]]
    num_bytes: dict[str, int]
    kept: dict[str, list[str]]

    @property
    def total_bytes(self) -> int:
        """The bytes of everything removed."""
        return sum(self.num_bytes.values())


def prune_run(
    run: str,
    *,
    keep: int | None = None,
    dry_run: bool = False,
    steal: bool = False,
    reporter: Reporter | None = None,
) -> Pruned:
    """Remove tables, graphs, plans and indexes that a run does not need to resume or to branch.

    keep: how many more stay of each kind; None: as the run is configured. Checkpoints stay. The
    last evaluation's tables and the newest graph stay too, for the report. Can be repeated after an
    interruption. steal: take the run over from a living process, as Lease.acquire. Raises
    InputError for a folder without a run, and one whose run is in progress or is about to branch.
    """
    uri = files.absolute(run)
    if not files.exists(files.join(uri, "run.json")):
        raise InputError(f"{uri} is no run's folder: run.json is missing")
    config = load_config(files.join(uri, "config.yaml"))
    s3_settings.apply(config.storage)
    if dry_run:
        if steal:
            raise InputError("--dry-run changes nothing, so it takes nothing; leave out --steal")
        return _prune(uri, config, keep, dry_run=True)
    with owning(uri, reporter, steal=steal, interrupts=True):
        return _prune(uri, config, keep, dry_run=False)


def _prune(uri: str, config: RunConfig, keep: int | None, *, dry_run: bool) -> Pruned:
    if "branching" in files.read_json(files.join(uri, "run.json")):
        raise InputError(f"{uri} was interrupted while it branched; repeat that command first")
    chosen = Keep.from_config(config) if keep is None else Keep(keep, keep, keep)
    state = read_state(uri, config)
    removed = find_removable(uri, Schedule(config), state, chosen, indexes=True)
    num_bytes = {
        kind: sum(measure(files.join(uri, kind, name)) for name in names)
        for kind, names in removed.items()
    }
    kept = {}
    for kind in removed:
        there = set(list_versioned(files.join(uri, kind)).values())
        kept[kind] = sorted(there - set(removed[kind]))
    if not dry_run:
        for kind, names in removed.items():
            for name in names:
                files.remove(files.join(uri, kind, name))
    return Pruned(removed, num_bytes, kept)


def read_state(uri: str, config: RunConfig) -> RunState:
    """Read the state of a run that is not in progress from its folder.

    Raises InputError for a run without a checkpoint.
    """
    schedule = Schedule(config)
    records = read_records(uri)
    checkpoints = published_versions(files.join(uri, CHECKPOINTS), "epoch")
    if not checkpoints:
        raise InputError(f"{uri} holds no checkpoint: nothing can be removed yet")
    newest = checkpoints[-1]
    collections = ["neighbors"]
    if config.sampling.gallery_negatives:
        collections = list(FOLDERS.values())
    graphs = [published_versions(files.join(uri, folder), "v") for folder in collections]
    mined = set.intersection(*map(set, graphs))
    logged = {record["epoch"] for record in records if record["kind"] == "mining"}
    evaluated = {record["epoch"] for record in records if record["kind"] == "evaluation"}
    ready = {0, *(mined & logged)}
    pending = set()
    for epoch in range(newest + 1):
        is_due = epoch >= (schedule.version_for(newest + 1) or 0) and schedule.mines_after(epoch)
        if is_due and epoch not in ready:
            pending.add(epoch)
        if _awaits_evaluation(schedule, uri, epoch, evaluated):
            pending.add(epoch)
    return RunState(
        newest,
        frozenset(checkpoints),
        frozenset(ready),
        pending=frozenset(pending),
        evaluated=max(evaluated, default=None),
    )


def _awaits_evaluation(schedule: Schedule, uri: str, epoch: int, evaluated: set[int]) -> bool:
    if epoch in evaluated or not schedule.evaluates_after(epoch):
        return False
    return is_published(files.join(uri, CHECKPOINTS, f"epoch={epoch:04d}"))


def describe_pruned(pruned: Pruned, *, dry_run: bool) -> list[str]:
    """Return a line for each kind of artefact, and one for the sum."""
    lines = []
    verb = "would remove" if dry_run else "removed"
    for kind, names in pruned.removed.items():
        kept = ", ".join(pruned.kept[kind]) or "none"
        size = format_bytes(pruned.num_bytes[kind])
        lines.append(f"{kind}: {verb} {', '.join(names)} ({size}); kept {kept}")
    if not lines:
        return ["nothing to remove"]
    return [*lines, f"{verb} {format_bytes(pruned.total_bytes)} in all"]


def as_record(pruned: Pruned) -> Record:
    """Return plain types, for JSON."""
    return {"removed": pruned.removed, "kept": pruned.kept, "bytes": pruned.total_bytes}
