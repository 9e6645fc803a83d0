"""List, measure and remove the versions of a run folder's artefacts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from s4g_ray.config.schema import RunConfig
from s4g_ray.encoder.checkpoint import FOLDER as CHECKPOINTS
from s4g_ray.encoder.checkpoint import prune_checkpoints
from s4g_ray.pipeline.retention.rule import (
    RunState,
    removable_embeddings,
    removable_graphs,
    removable_indexes,
    removable_plans,
)
from s4g_ray.pipeline.rounds.coordinator import Coordinator
from s4g_ray.pipeline.rounds.graphs import FOLDERS
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.pipeline.run_folder import RunFolder, version_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import published_versions

EMBEDDINGS = "embeddings"
PLANS = "plans"
INDEX_FOLDERS = ("index", "gallery_index")


@dataclass(frozen=True)
class Keep:
    """How many versions of each kind stay beyond those that are needed."""

    embeddings: int
    graphs: int
    plans: int

    @classmethod
    def from_config(cls, config: RunConfig) -> Keep:
        """Read embedding.keep, mining.keep and sampling.keep_plans."""
        return cls(config.embedding.keep, config.mining.keep, config.sampling.keep_plans)


def find_removable(
    uri: str, schedule: Schedule, state: RunState, keep: Keep, *, indexes: bool = False
) -> dict[str, list[str]]:
    """Return the names that may be removed, by folder of a run: `{"neighbors": ["v=0004"]}`.

    Interrupted versions, which are not published, count too. indexes: also those of indexes; only
    for a run that is not in progress, as its shards remove them themselves.
    """
    rules: dict[str, Callable[[list[int]], list[int]]] = {
        EMBEDDINGS: lambda there: removable_embeddings(state, there, keep.embeddings),
        PLANS: lambda there: removable_plans(state, there, keep.plans),
    }
    for folder in FOLDERS.values():
        rules[folder] = lambda there: removable_graphs(schedule, state, there, keep.graphs)
    if indexes:
        for folder in INDEX_FOLDERS:
            rules[folder] = lambda there: removable_indexes(state, there)
    found = {}
    for folder, rule in rules.items():
        names = list_versioned(files.join(uri, folder))
        chosen = [names[version] for version in rule(sorted(names))]
        if chosen:
            found[folder] = chosen
    return found


def list_versioned(uri: str) -> dict[int, str]:
    """Return the names `v=N` or `epoch=N` in a folder by version."""
    found = {}
    for name in files.list_names(uri):
        version = version_of(name)
        if version is not None:
            found[version] = name
    return found


def measure(uri: str) -> int:
    """Return the bytes of a file, or of all files in a folder; 0 where there is none."""
    filesystem, path = files.filesystem_of(uri)
    return int(filesystem.du(path)) if files.exists(uri) else 0


class Retention:
    """Removes what a run in progress does not need. For the thread that follows the training."""

    def __init__(self, folder: RunFolder, config: RunConfig, coordinator: Coordinator) -> None:
        self._folder = folder
        self._config = config
        self._schedule = Schedule(config)
        self._coordinator = coordinator
        self._num_rounds = 0  # ended when the rule was applied last

    def prune_checkpoints(self, finished: int) -> None:
        """Keep the newest checkpoints, the first, the best, and those that rounds still need.

        finished: epochs that are logged.
        """
        needed = self._coordinator.waiting()  # before the best: a round names it before it ends
        needed.add(self._folder.info.get("best", {}).get("epoch", 0))
        keep = self._config.checkpoint.keep
        prune_checkpoints(self._folder.uri, keep=keep, epochs=needed, since=finished)

    def apply(self, finished: int) -> None:
        """Remove checkpoints, tables, graphs and plans. Repeats what an interrupted call left."""
        self._num_rounds = self._coordinator.num_ended
        self.prune_checkpoints(finished)
        # In this order: an epoch that ends meanwhile needs no other graphs, a graph that gets ready
        # meanwhile is newer, and a round logs its evaluation before it ends
        checkpoints = published_versions(self._folder.path(CHECKPOINTS), "epoch")
        ready = self._coordinator.ready
        chosen = self._coordinator.chosen_after(max(checkpoints))
        pending = self._coordinator.waiting()
        state = RunState(
            max(checkpoints),
            frozenset(checkpoints),
            frozenset(ready),
            frozenset(chosen),
            frozenset(pending),
            last_evaluated(self._folder),
        )
        keep = Keep.from_config(self._config)
        found = find_removable(self._folder.uri, self._schedule, state, keep)
        for kind, names in found.items():
            for name in names:
                files.remove(self._folder.path(kind, name))

    def apply_after_round(self, finished: int) -> None:
        """Apply the rule if a round has ended since it was applied."""
        if self._coordinator.num_ended != self._num_rounds:
            self.apply(finished)


def last_evaluated(folder: RunFolder) -> int | None:
    """Return the last epoch with an evaluation; None where there is none."""
    epochs = [record["epoch"] for record in folder.records if record["kind"] == "evaluation"]
    return max(epochs, default=None)
