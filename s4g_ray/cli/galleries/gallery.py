"""Define `s4g gallery`: build a gallery, add and remove tiles, name the folder of its images.

jobs/gallery.py runs the same commands.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from s4g_ray.cli.areas import parse_bounds, read_area
from s4g_ray.cli.console import Steal, if_begun, interruptible, make_reporter, print_json
from s4g_ray.cli.datasets.images import describe_root
from s4g_ray.cli.galleries.calibrate import calibrate
from s4g_ray.errors import InputError
from s4g_ray.freed_memory import keep_freed_memory

gallery_app = typer.Typer(
    help="Build, change and describe a gallery: references that answer where a photo was taken.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
GalleryUri = Annotated[str, typer.Argument(help="A gallery: a folder or s3://...")]
DatasetUri = Annotated[str, typer.Argument(help="A canonical data set: a folder or s3://...")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. embedding.num_actors=4")
]
Splits = Annotated[
    str | None,
    typer.Option("--split", help="Splits of references, joined by commas.  [default: all]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RESUME_HINT = "interrupted; run the same command again to resume"
AS_IT_WAS = "interrupted; the gallery is as it was: run the same command again"


@gallery_app.callback()
def gallery() -> None:
    """Build, change and describe a gallery: references that answer where a photo was taken."""


@gallery_app.command()
def build(
    model: Annotated[
        str,
        typer.Argument(help="The folder of a run or an export, or a .pth or .safetensors file."),
    ],
    dataset: DatasetUri,
    target: Annotated[
        str, typer.Argument(help="A new folder or s3://..., or that of an interrupted call.")
    ],
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option(help="Architecture and sizes for bare weights: a YAML file.")
    ] = None,
    epoch: Annotated[
        int | None, typer.Option(help="A run's checkpoint of this epoch.  [default: the last]")
    ] = None,
    split: Splits = None,
    copy_images: Annotated[
        bool,
        typer.Option(
            "--copy-images/--no-copy-images",
            help="Copy the images of tiles, so that the gallery is complete in itself.",
        ),
    ] = True,
    name: Annotated[str | None, typer.Option(help="Its name.  [default: the data set's]")] = None,
    attribution: Annotated[
        str, typer.Option(help="The origin of the imagery, as its licence wants it shown.")
    ] = "",
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Build a gallery from a data set's references.

    Embeds them and builds their index. An interrupted call can be resumed.
    """
    keep_freed_memory()
    from s4g_ray.config.loading import load_config

    loaded = load_config(config) if config else None  # before the slow imports: errors come at once
    from s4g_ray.gallery.build import build_gallery

    with interruptible(if_begun(target, RESUME_HINT)):
        report = build_gallery(
            model,
            dataset,
            target,
            config=loaded,
            overrides=overrides or [],
            epoch=epoch,
            splits=split.split(",") if split else None,
            copy_images=copy_images,
            name=name,
            attribution=attribution,
            steal=steal,
            reporter=make_reporter(as_json),
        )
    print_json(as_json, report.as_dict())


@gallery_app.command()
def add(
    gallery: GalleryUri,
    dataset: DatasetUri,
    overrides: Overrides = None,
    split: Splits = None,
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Add a data set's references, and replace tiles of the same id.

    Embeds only images that are new or changed. Readers go on with the version before.
    """
    keep_freed_memory()
    from s4g_ray.gallery.build import add_tiles

    with interruptible(AS_IT_WAS):
        report = add_tiles(
            gallery,
            dataset,
            overrides=overrides or [],
            splits=split.split(",") if split else None,
            steal=steal,
            reporter=make_reporter(as_json),
        )
    print_json(as_json, report.as_dict())


@gallery_app.command()
def remove(
    gallery: GalleryUri,
    area: Annotated[
        str | None, typer.Option(help="A GeoJSON file: tiles with their centre in its polygons.")
    ] = None,
    bounds: Annotated[
        str | None, typer.Option(metavar="W,S,E,N", help="Tiles with their centre in there.")
    ] = None,
    ids: Annotated[str | None, typer.Option(help="A text file: an id a line.")] = None,
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Remove the tiles of an area, or those of a list of ids."""
    if sum(option is not None for option in (area, bounds, ids)) != 1:
        raise InputError("give one of --area, --bounds and --ids")
    from s4g_ray.data.area import Area

    chosen: dict[str, Any] = {}
    if ids is not None:
        chosen["ids"] = _read_ids(ids)
    elif area is not None:
        chosen["area"] = read_area(area)
    elif bounds is not None:
        chosen["area"] = Area.bounds(*parse_bounds(bounds))
    from s4g_ray.gallery.build import remove_tiles

    with interruptible(AS_IT_WAS):
        report = remove_tiles(gallery, **chosen, steal=steal, reporter=make_reporter(as_json))
    print_json(as_json, report.as_dict())


@gallery_app.command()
def relocate(
    gallery: GalleryUri,
    root: Annotated[
        str, typer.Argument(help="The folder of its images now, or s3://...: all stays but this.")
    ],
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Name the folder of a gallery's images anew, where they are not copied into it.

    For images that were moved without the gallery, or the other way round. Tiles, embeddings and
    index stay.
    """
    from s4g_ray.gallery.relocation import relocate as give_root

    reporter = make_reporter(as_json)
    with interruptible(AS_IT_WAS):
        found = give_root(gallery, root, steal=steal, reporter=reporter)
    for line in describe_root(found.name, found.images_root, found.relative, found.absolute):
        reporter.line(line)
    print_json(as_json, asdict(found))


@gallery_app.command()
def info(gallery: GalleryUri, as_json: AsJson = False) -> None:
    """Describe a gallery: tiles, extent, model, index and sources."""
    from s4g_ray.gallery.description import describe_gallery, info_table

    found = describe_gallery(gallery)
    if not as_json:
        make_reporter(as_json).console.print(info_table(found))
    print_json(as_json, found)


gallery_app.command()(calibrate)


def _read_ids(path: str) -> Any:
    """Read a text file of ids. Raises InputError for other content."""
    import numpy as np

    words = _read_text(path).replace(",", " ").split()
    try:
        ids = np.array([int(word) for word in words], np.int64)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path} is not a list of ids, one a line: {error}") from error
    if not len(ids):
        raise InputError(f"{path} holds no ids")
    return ids


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
