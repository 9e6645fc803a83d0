"""Decide which versions of a run's artefacts may be removed.

Pure. Versions are epochs: embeddings and graphs are named by the epoch whose checkpoint they were
made with, plans by the epoch that they are for. The rule holds at every moment of a run:

- A run continues after its newest checkpoint, or after an earlier one that stays, as a branch.
- An epoch uses the newest graph that is ready and no newer than the one due. That one only rises
  from epoch to epoch, so no graph older than the next epoch's choice is chosen any more.
- A round compares its graph with the newest one before it, and a rotating round carries that on.
- A report shows the last evaluation, from its embeddings, and the newest graph.

What is needed once and then not needed stays so; so the versions that are left at the end of a run
do not depend on when they were removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from s4g_ray.pipeline.rounds.schedule import GEOGRAPHIC, Schedule


@dataclass(frozen=True)
class RunState:
    """The progress of a run.

    newest: the number of finished epochs at its newest checkpoint. checkpoints: epochs whose
    checkpoints stay. ready: versions of graphs that an epoch may use. chosen: those chosen for
    epochs that are not finished. pending: epochs whose rounds wait, run, or are to be repeated.
    evaluated: the last epoch with an evaluation; None where there is none.
    """

    newest: int
    checkpoints: frozenset[int]
    ready: frozenset[int]
    chosen: frozenset[int] = frozenset()
    pending: frozenset[int] = frozenset()
    evaluated: int | None = None


def removable_embeddings(state: RunState, existing: Collection[int], keep: int) -> list[int]:
    """Return the versions of embedding tables that may be removed, ascending.

    Needed are those of rounds that are not done, and of the last evaluation. `keep` more stay.
    """
    needed = set(state.pending)
    if state.evaluated is not None:
        needed.add(state.evaluated)
    return _leave(existing, needed, keep)


def removable_graphs(
    schedule: Schedule, state: RunState, existing: Collection[int], keep: int
) -> list[int]:
    """Return the versions of graphs that may be removed, ascending; `keep` more stay.

    The geographic graph is not kept for branches: it is written again when an epoch uses it.
    """
    needed = {*state.chosen, *state.pending, *_list_branch_graphs(schedule, state)}
    oldest = _find_oldest_usable(schedule, state)
    if oldest is not None:
        needed.update(version for version in existing if version >= oldest)
    for epoch in state.pending:
        before = [version for version in existing if version < epoch]
        if before:
            needed.add(max(before))
    if existing:
        needed.add(max(existing))
    return _leave(existing, needed, keep)


def removable_plans(state: RunState, existing: Collection[int], keep: int) -> list[int]:
    """Return the epochs whose plans may be removed, ascending.

    Needed are those of the epochs in progress and planned ahead, and of the last finished one,
    whose record a resumed run may still have to log. `keep` more stay.
    """
    return _leave(existing, {epoch for epoch in existing if epoch >= state.newest}, keep)


def removable_indexes(state: RunState, existing: Collection[int]) -> list[int]:
    """Return the versions of indexes that a run which is not in progress may remove, ascending.

    Needed are those of rounds that are not done: they are searched again.
    """
    return _leave(existing, state.pending, 0)


def _find_oldest_usable(schedule: Schedule, state: RunState) -> int | None:
    """Return the oldest graph that an epoch to come may use; None where epochs use no graphs."""
    due = schedule.version_for(state.newest + 1)
    if due is None:
        return None
    return max((version for version in state.ready if version <= due), default=GEOGRAPHIC)


def _list_branch_graphs(schedule: Schedule, state: RunState) -> Iterable[int]:
    """Yield the mined graphs that a branch from a checkpoint uses before it mines its own."""
    for start in state.checkpoints:
        first = start + 1
        for epoch in range(first, first + schedule.config.mining.lag + 1):
            version = schedule.version_for(epoch)
            if version is not None and GEOGRAPHIC < version <= start:
                yield version


def _leave(existing: Collection[int], needed: Collection[int], keep: int) -> list[int]:
    """Return the existing versions that are not needed, without the `keep` newest of them."""
    unneeded = sorted(set(existing) - set(needed))
    return unneeded[: max(0, len(unneeded) - keep)]
