"""Build a gallery, add tiles to it, and remove tiles: `s4g gallery build`, `add` and `remove`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.arrays import Ints
from s4g_ray.config.data_schema import ImageOptions
from s4g_ray.config.loading import override_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.area import Area
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.encoder.source import open_source
from s4g_ray.errors import InputError
from s4g_ray.gallery.store.embedding import GalleryModel
from s4g_ray.gallery.store.header import HEADER, MODEL, GalleryHeader
from s4g_ray.gallery.store.index_writer import as_overrides, index_cluster, settings_of
from s4g_ray.gallery.store.source_tiles import read_source_tiles
from s4g_ray.gallery.update import GalleryUpdate, UpdateReport, now
from s4g_ray.progress import Reporter
from s4g_ray.row_lookup import rows_of
from s4g_ray.storage import files, s3_settings
from s4g_ray.storage.ownership.lease import owning
from s4g_ray.storage.part_commits import claim_folder

MARKER = "building.json"  # what a folder was begun with, until the gallery is built


def build_gallery(
    model: str,
    dataset_uri: str,
    target: str,
    *,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    epoch: int | None = None,
    splits: Sequence[str] | None = None,
    copy_images: bool = True,
    name: str | None = None,
    attribution: str = "",
    steal: bool = False,
    reporter: Reporter | None = None,
) -> UpdateReport:
    """Build a gallery of a data set's references at `target`, a new folder or s3://...

    model: a run (its last checkpoint, or that of `epoch`), an export or weights; config and
    overrides as embed_collection takes them. splits None: all references. copy_images: into the
    gallery, which is then complete in itself; otherwise its paths start from the images' folder as
    those of a data set do, and relocate names another. steal: take the folder over from a living
    process, as Lease.acquire. After an interruption the same call resumes.

    Raises InputError for bad input, such as a target that holds another gallery, references
    without coordinates, and an index that fits neither this machine nor the Ray cluster that is
    named; and the errors of embedding_job.embed.

    The index is held by one process where it fits; else, and where mining.num_shards is above 1, by
    shards on the cluster, which all readers share.
    """
    reporter = reporter or Reporter()
    target = files.absolute(target)
    check_kept("TARGET", target)
    opened = open_source(model, files.absolute(dataset_uri), config=config, epoch=epoch)
    base = override_config(opened.config, overrides)
    s3_settings.apply(base.storage)
    dataset = open_dataset(base.data.uri, base.data.image_options)
    base = _with_values(base, dataset)
    table = read_source_tiles(dataset, splits)
    taken = GalleryModel.from_source(opened, base, target, reporter.line)
    source = _describe_source(dataset, splits)
    made_with = {"model": taken.describe(), "source": source, "copies_images": copy_images}
    if files.exists(files.join(target, HEADER)):
        return _report_built(target, taken, source, copy_images, dataset.images_root, reporter)
    with (
        index_cluster(base, len(table), taken.dim),  # refuses before anything is written
        owning(target, reporter, steal=steal) as lease,
    ):
        claim_folder(target, MARKER, made_with, "`s4g gallery build`")
        taken.save(opened)
        header = _empty_header(taken, name or dataset.name, attribution, copy_images)
        update = GalleryUpdate(target, header, taken, lease, reporter)
        report = update.put(table, source, dataset.images_root)
        files.remove(files.join(target, MARKER))
    reporter.line(f"{target}: {count_noun(report.num_tiles, 'tile')}, version {report.version}")
    return report


def _empty_header(
    model: GalleryModel, name: str, attribution: str, copies_images: bool
) -> GalleryHeader:
    """Return the header of a gallery that has no version yet."""
    return GalleryHeader(
        name=name,
        current=0,
        model=model.describe(),
        numerics=asdict(model.numerics),
        dim=model.dim,
        dtype=model.config.embedding.dtype,
        num_tiles=0,
        index={},
        copies_images=copies_images,
        sources=(),
        created=now(),
        updated=now(),
        attribution=attribution,
        index_settings=settings_of(model.config),
    )


def _report_built(
    target: str,
    model: GalleryModel,
    source: dict[str, Any],
    copy_images: bool,
    images_root: str,
    reporter: Reporter,
) -> UpdateReport:
    """Report a gallery that is built already. Raises InputError for one of other inputs."""
    header = GalleryHeader.load(target)
    model.require_same(target, header.model)
    if header.copies_images != copy_images:
        theirs = "with copies of its images" if header.copies_images else "without copied images"
        raise InputError(
            f"{target} holds a gallery {theirs} already; build the other kind in another folder"
        )
    names = ("fingerprint", "splits")
    if not any(all(one.get(name) == source[name] for name in names) for one in header.sources):
        raise InputError(
            f"{target} holds a gallery of {count_noun(header.num_tiles, 'tile')} already; add to it"
            " with `s4g gallery add`, or choose another folder"
        )
    line = f"{target} is built already: {count_noun(header.num_tiles, 'tile')}"
    if header.images_root is not None and header.find_images(target) != images_root:
        line += (
            f"; it looks for its images in {header.find_images(target)}, not in {images_root}:"
            f" `s4g gallery relocate {target} {images_root}` names another folder"
        )
    reporter.line(line)
    return UpdateReport(header.current, header.num_tiles, unchanged=header.num_tiles)


def add_tiles(
    gallery: str,
    dataset_uri: str,
    *,
    overrides: Sequence[str] = (),
    splits: Sequence[str] | None = None,
    steal: bool = False,
    reporter: Reporter | None = None,
) -> UpdateReport:
    """Add a data set's references to a gallery, and replace tiles of the same id.

    Embeds only images whose bytes are new. overrides: of sections embedding, mining, ray, storage
    and train, data.on_bad_image and data.images_root. steal: as build_gallery. Raises InputError
    for bad input: no gallery, one that is being written, another preprocessing than its own, ids of
    other places; and as build_gallery does.
    """
    reporter = reporter or Reporter()
    gallery = files.absolute(gallery)
    opened = open_source_of(gallery, files.absolute(dataset_uri), overrides)
    dataset = open_dataset(opened.data.uri, ImageOptions(opened.data.images_root))
    opened = _with_values(opened, dataset)
    table = read_source_tiles(dataset, splits)
    with owning(gallery, reporter, steal=steal) as lease:
        header = GalleryHeader.load(gallery)
        model = GalleryModel.from_gallery(gallery, header, opened)
        update = GalleryUpdate(gallery, header, model, lease, reporter)
        report = update.put(table, _describe_source(dataset, splits), dataset.images_root)
    reporter.line(
        f"{gallery}: {count_noun(report.added, 'tile')} added, {report.changed:,} replaced,"
        f" {report.unchanged:,} unchanged; {report.num_tiles:,} in version {report.version}"
    )
    return report


def remove_tiles(
    gallery: str,
    *,
    area: Area | None = None,
    ids: Ints | None = None,
    steal: bool = False,
    reporter: Reporter | None = None,
) -> UpdateReport:
    """Remove the tiles whose centres lie in an area, or those of ids[n].

    steal: as build_gallery.
    Raises InputError where there are none, where none would be left, for ids without a tile, and
    for a gallery that is being written.
    """
    reporter = reporter or Reporter()
    gallery = files.absolute(gallery)
    config = open_source_of(gallery, gallery, ())
    with owning(gallery, reporter, steal=steal) as lease:
        header = GalleryHeader.load(gallery)
        model = GalleryModel.from_gallery(gallery, header, config)
        update = GalleryUpdate(gallery, header, model, lease, reporter)
        chosen = _choose(gallery, update, area, ids)
        if len(chosen) == len(update.ids):
            raise InputError(
                f"all {len(chosen):,} tiles of {gallery} would be removed; remove its folder"
                " instead"
            )
        report = update.remove(chosen)
    reporter.line(
        f"{gallery}: {count_noun(report.removed, 'tile')} removed; {report.num_tiles:,} in version"
        f" {report.version}"
    )
    return report


def _with_values(config: RunConfig, dataset: GeoDataset) -> RunConfig:
    """Return a configuration that shows images as the data set says, where it does."""
    named = asdict(dataset.values)
    values = {name: value for name, value in named.items() if value is not None}
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def open_source_of(gallery: str, data_uri: str, overrides: Sequence[str]) -> RunConfig:
    """Return the configuration of a gallery: of its encoder and its index, with overrides.

    Raises InputError.
    """
    header = GalleryHeader.load(gallery)  # its error is clearer than that of a missing model
    config = open_source(files.join(gallery, MODEL), data_uri).config
    config = override_config(config, [*as_overrides(header.index_settings), *overrides])
    s3_settings.apply(config.storage)
    return config


def _choose(gallery: str, update: GalleryUpdate, area: Area | None, ids: Ints | None) -> Ints:
    """Return the ids to remove, ascending."""
    if (area is None) == (ids is None):
        raise InputError("give either an area or ids of the tiles to remove")
    if ids is not None:
        wanted = np.unique(np.asarray(ids, np.int64))
        unknown = wanted[rows_of(update.ids, wanted) < 0]
        if len(unknown):
            raise InputError(
                f"{len(unknown)} of {len(wanted)} ids are of no tile in {gallery}, {unknown[0]}"
                " among them; removed already?"
            )
        return wanted
    assert area is not None
    rows = update.rows
    inside = area.contains(rows["lat"].to_numpy(), rows["lon"].to_numpy())
    if not inside.any():
        raise InputError(f"no tile of {gallery} has its centre in this area")
    return update.ids[inside]


def _describe_source(dataset: GeoDataset, splits: Sequence[str] | None) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "uri": dataset.uri,
        "fingerprint": dataset.fingerprint,
        "splits": list(splits) if splits is not None else None,
    }
