"""Show the disk that a run takes, and check for it, before anything is written."""

from __future__ import annotations

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.data.train_split import TrainSplit
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.pipeline.budget.disk import check_room, describe_stocks, list_stocks
from s4g_ray.pipeline.budget.indexes import largest_indexes
from s4g_ray.pipeline.budget.sizes import RunSizes
from s4g_ray.pipeline.retention.artefacts import measure
from s4g_ray.pipeline.run_folder import RunFolder
from s4g_ray.progress import Reporter
from s4g_ray.storage import files


def check_disk(
    folder: RunFolder,
    dataset: GeoDataset,
    split: TrainSplit,
    encoder: Encoder,
    reporter: Reporter,
) -> None:
    """Show the disk that a run takes at most, and warn where its file system has less.

    Raises InputError as check_room does. A finished run takes none.
    """
    if folder.info["status"] == "done":
        return
    sizes = RunSizes.read(dataset, split, encoder)
    stocks = list_stocks(folder.config, sizes, largest_indexes(folder.config, sizes))
    reporter.line(describe_stocks(stocks))
    held = measure(folder.uri) if files.is_local(folder.uri) else 0
    warning = check_room(folder.uri, stocks, held)
    if warning is not None:
        reporter.line(warning)
