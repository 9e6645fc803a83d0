"""check_start: whether a run may start in a folder, told before libraries are loaded."""

from __future__ import annotations

from s4g_ray.errors import InputError
from s4g_ray.storage import files
from s4g_ray.storage.ownership.observer import LeaseObserver


def check_start(uri: str, *, resume: bool, from_epoch: int | None) -> None:
    """Raise InputError for a folder that holds a run, without `resume`, or other files.

    from_epoch: as run() takes it.
    """
    if from_epoch is not None and not resume:
        raise InputError(f"--from-epoch {from_epoch} continues a run that exists; add --resume")
    if files.exists(files.join(uri, "run.json")):
        if not resume:
            raise InputError(
                f"{uri} holds a run already; continue it with --resume, or choose another run_dir"
            )
        return
    if from_epoch is not None:
        raise InputError(
            f"{uri} holds no run that could continue after epoch {from_epoch}; leave out"
            " --from-epoch, or correct run_dir"
        )
    if set(files.list_content(uri)) - {"config.yaml"}:  # that of an interrupted start
        raise InputError(f"{uri} is not empty and holds no run; choose another run_dir")


def check_start_early(run_dir: str, *, resume: bool, from_epoch: int | None) -> None:
    """Do as check_start, unless a process writes the folder: who takes its lease tells that."""
    uri = files.absolute(run_dir)
    if not LeaseObserver(uri).look().is_written:
        check_start(uri, resume=resume, from_epoch=from_epoch)
