"""Make a branch: keep what followed its checkpoint in branches/NAME/, and record the branch.

The run's former line is kept whole: config.yaml, run.json and metrics.jsonl as they were, and the
checkpoints, plans, embeddings and graphs after the branch's checkpoint. That folder is evaluated
and exported like a run. Only indexes are removed: they are built from the embeddings.

Every step can be repeated. run.json carries `branching` from before the first artefact moves until
all is done; a run that is resumed in between completes the branch first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from s4g_ray.config.loading import dump_config
from s4g_ray.encoder.checkpoint import FOLDER as CHECKPOINTS
from s4g_ray.encoder.checkpoint import Checkpoint, step_uri
from s4g_ray.pipeline.branches.branch_record import BRANCH_CONFIG, REPLACED, Branch
from s4g_ray.pipeline.rounds.mining_round import find_best
from s4g_ray.pipeline.run_folder import VERSIONED, Record, RunFolder, version_of
from s4g_ray.storage import files
from s4g_ray.storage.manifest import is_published, list_versions

INDEXES = ("index", "gallery_index")
# what run.json keeps from the first start on -> the keys that it was chosen by
CHOSEN = {
    "numerics": {"train.precision", "train.channels_last", "train.use_gpu"},
    "exact_engine": {"mining.exact_engine"},
}


def make_branch(folder: RunFolder) -> None:
    """Move what followed the checkpoint of `folder.branch`, and record the branch.

    Completes what an interrupted call has begun. Raises WriteError.
    """
    branch = folder.branch
    assert branch is not None
    folder.guard()
    start = Checkpoint.read(folder.checkpoint(branch.from_epoch))
    kept = folder.path(branch.folder)
    if "branching" not in folder.info:
        later = find_later(folder, start)
        branch = replace(branch, removed=[n for n in later if n.startswith(INDEXES)])
        _keep_files(folder, branch)
    files.write_bytes(files.join(kept, BRANCH_CONFIG), dump_config(folder.config).encode())
    folder.update(branching=branch.as_record())
    for name in find_later(folder, start):
        is_whole = name.endswith(".parquet") or is_published(folder.path(name))
        if is_whole and name not in branch.removed:
            files.move(folder.path(name), files.join(kept, name))
        else:
            files.remove(folder.path(name))
    files.move(folder.path("report.html"), files.join(kept, "report.html"))
    files.write_bytes(folder.path("config.yaml"), dump_config(folder.config).encode())
    _record(folder, branch)


def find_later(folder: RunFolder, start: Checkpoint) -> Iterator[str]:
    """Yield the artefacts that were made after a checkpoint between epochs, published or not.

    They are relative to the run folder.
    """
    for kind in VERSIONED:
        for name in files.list_names(folder.path(kind)):
            version = version_of(name)
            if version is not None and version > start.epoch:
                yield f"{kind}/{name}"
    for step in list_versions(folder.path(CHECKPOINTS), "step"):
        if step > start.step:
            yield f"{CHECKPOINTS}/{step_uri(folder.uri, step).rpartition('/')[2]}"


def _keep_files(folder: RunFolder, branch: Branch) -> None:
    """Copy the files of the former line, which the branch continues to write."""
    kept = folder.path(branch.folder)
    for name in ("config.yaml", "metrics.jsonl", "bad_images.jsonl"):
        if files.exists(folder.path(name)):
            files.write_bytes(files.join(kept, name), files.read_bytes(folder.path(name)))
    info = {**folder.info, "status": REPLACED, "replaced_by": branch.as_record()}
    files.write_json(files.join(kept, "run.json"), info)


def _record(folder: RunFolder, branch: Branch) -> None:
    """Write metrics.jsonl without what followed, then run.json: from here on the branch is made."""
    record = {"kind": "branch", "time": round(time.time(), 3), **branch.as_record()}
    kept = [line for line in folder.records if not _is_later(line, branch)]
    folder.replace_records([*kept, record])
    for name, keys in CHOSEN.items():
        if keys & branch.changed.keys():
            folder.info.pop(name, None)
    folder.info.pop("best", None)
    best = find_best(folder)
    if best is not None:
        folder.info["best"] = best
    del folder.info["branching"]
    branches = [*folder.info.get("branches", []), branch.as_record()]
    folder.update(status="running", branches=branches)


def _is_later(record: Record, branch: Branch) -> bool:
    """Return whether a record is about what followed the branch's checkpoint.

    That is also the record of the branch itself, which an interrupted call has written.
    """
    if record["kind"] == "branch" and record["name"] == branch.name:
        return True
    for key in ("epoch", "during_epoch", "from_epoch"):
        if key in record:
            return int(record[key]) > branch.from_epoch
    return False
