"""find_branch: which values may change in a branch, from which checkpoint, and checks."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from s4g_ray.config.loading import flatten_config, load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.encoder.checkpoint import FOLDER as CHECKPOINTS
from s4g_ray.encoder.checkpoint import Checkpoint, epoch_uri
from s4g_ray.errors import InputError
from s4g_ray.pipeline.branches.branch_record import BRANCH_CONFIG, Branch, Changes
from s4g_ray.pipeline.rounds.schedule import Schedule
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published, published_versions

# Sections and keys whose values may change in a branch: they decide what is computed after its
# checkpoint, and what is there stays valid.
FREE_SECTIONS = {"augment", "evaluation", "mining", "train"}
FREE_KEYS = {"sampling.mode", "sampling.num_hard_negatives", "sampling.neighbor_pool_size"}
# the metrics of all evaluations have the same names; the last two divide the parameters into
# groups, each with a state of its own
FIXED_KEYS = {"evaluation.radii_m", "train.decay_norms", "train.layer_decay"}


def describe_changes(changes: Changes) -> str:
    """Return changed values for a message: `train.epochs: 8 -> 9; train.clip_value: 1.0 -> 2.0`."""
    return "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())


def flatten(config: RunConfig, free: Set[str]) -> dict[str, Any]:
    """Return the values by dotted key, without the keys in `free` and how storage is reached."""
    flat = flatten_config(config, exclude={"ray", "storage"})
    return {key: value for key, value in flat.items() if key not in free}


def find_changes(before: RunConfig, after: RunConfig, free: Set[str]) -> Changes:
    """Return the keys with another value, without those in `free`: [old, new] value."""
    old = flatten(before, free)
    return {
        key: [old[key], value] for key, value in flatten(after, free).items() if value != old[key]
    }


def find_branch(
    uri: str, info: Mapping[str, Any], config: RunConfig, from_epoch: int | None, free: Set[str]
) -> Branch | None:
    """Return the branch that a resumed run begins, or completes; None where it only continues.

    info: run.json. free: the keys that may change without a branch. The run only continues where
    it branched last from that epoch to these values, so a command that is repeated, as by a job's
    retry, does not branch again. Raises InputError for values that may not change, and as
    check_branch.
    """
    begun = Branch.from_record(info["branching"]) if "branching" in info else None
    if begun is not None and from_epoch not in (None, begun.from_epoch):
        raise refuse_other_command(uri, begun)
    former = uri if begun is None else files.join(uri, begun.folder)
    changes = find_changes(load_config(files.join(former, "config.yaml")), config, free)
    if from_epoch is None:
        if begun is None and changes:
            raise refuse_changes(uri, changes)
        if begun is None:
            return None
        wanted = load_config(files.join(former, BRANCH_CONFIG))
        if find_changes(wanted, config, free):
            raise refuse_other_command(uri, begun)
        return replace(begun, changed=changes)
    branches = info.get("branches", [])
    is_last = bool(branches) and branches[-1]["from_epoch"] == from_epoch
    if begun is None and is_last and not changes:
        return None
    check_branch(uri, config, changes, from_epoch)
    if begun is not None:
        return replace(begun, changed=changes)
    return Branch(f"{len(branches) + 1:04d}", from_epoch, changes, [])


def may_change(key: str) -> bool:
    """Return whether a key's value may change in a branch."""
    section = key.partition(".")[0]
    return (section in FREE_SECTIONS and key not in FIXED_KEYS) or key in FREE_KEYS


def refuse_changes(uri: str, changes: Changes) -> InputError:
    """Return the error of values that may not change when a run is resumed without a branch."""
    remedy = "set them back, or start a new run"
    if all(may_change(key) for key in changes):
        remedy = (
            f"set them back, start a new run, or add --from-epoch N ({_list_epochs(uri)}), which"
            " continues from that checkpoint with these values"
        )
    return InputError(
        f"{uri} was started with other values ({describe_changes(changes)}); {remedy}"
    )


def check_branch(uri: str, config: RunConfig, changes: Changes, from_epoch: int) -> None:
    """Check that a run can branch from an epoch with a configuration; write nothing.

    Raises InputError for a checkpoint that is not there, for values that may not change, and for a
    schedule that does not fit; RunError for a checkpoint with a damaged file.
    """
    if from_epoch not in _published_epochs(uri):
        raise InputError(
            f"{uri} has no checkpoint after epoch {from_epoch}: it is removed, or was never"
            f" published; {_list_epochs(uri)}: choose one of them (checkpoint.keep is the number"
            " of the newest that stay)"
        )
    fixed = {key: values for key, values in changes.items() if not may_change(key)}
    if fixed:
        raise InputError(
            f"{uri} was started with other values ({describe_changes(fixed)}), which a branch"
            " cannot change: what is published would no longer fit; set them back, or start a new"
            " run"
        )
    if config.protocol == "paper" and "train.batch_size" in changes:
        raise InputError(
            "train.batch_size cannot change in a branch with protocol=paper, whose schedule counts"
            " steps of one size; set it back, or start a new run"
        )
    if from_epoch >= config.train.epochs:
        raise InputError(
            f"a branch from epoch {from_epoch} has no epoch to train with train.epochs="
            f"{config.train.epochs}; raise train.epochs, or name an earlier epoch"
        )
    _check_graphs(uri, config, from_epoch)
    Checkpoint.read(epoch_uri(uri, from_epoch)).check_readable()


def _check_graphs(uri: str, config: RunConfig, from_epoch: int) -> None:
    """Raise InputError for a graph that the first epochs need and that cannot be mined any more."""
    schedule = Schedule(config)
    folders = ["neighbors"]
    if config.sampling.gallery_negatives:
        folders.append("gallery_neighbors")
    first = from_epoch + 1
    for epoch in range(first, first + config.mining.lag + 1):
        version = schedule.version_for(epoch)
        if not version or version > from_epoch or is_published(epoch_uri(uri, version)):
            continue
        for folder in folders:
            if not is_published(files.join(uri, folder, f"v={version:04d}")):
                raise InputError(
                    f"epoch {epoch} would use the graph mined after epoch {version}, but"
                    f" {uri} has neither that graph nor the checkpoint to mine it from; set"
                    " sampling.mode, mining.schedule, mining.every_epochs and mining.lag_epochs"
                    " back, or name another epoch"
                )


def refuse_other_command(uri: str, branch: Branch) -> InputError:
    """Return the error of a command that would leave an interrupted branch unfinished."""
    changed = describe_changes(branch.changed) or "no value changed"
    return InputError(
        f"{uri} was interrupted while it branched from epoch {branch.from_epoch} ({changed});"
        " repeat that command, or give the values that you want with --resume --from-epoch"
        f" {branch.from_epoch}"
    )


def _published_epochs(uri: str) -> list[int]:
    return published_versions(files.join(uri, CHECKPOINTS), "epoch")


def _list_epochs(uri: str) -> str:
    epochs = ", ".join(map(str, _published_epochs(uri)))
    return f"there are checkpoints after epochs {epochs}" if epochs else "there is none"
