"""Define `s4g locate`: tell where photos were taken."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from s4g_ray.cli.areas import read_area
from s4g_ray.cli.console import interruptible, make_reporter, widen
from s4g_ray.errors import InputError
from s4g_ray.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from rich.console import Console

    from s4g_ray.gallery.answer import Answer
    from s4g_ray.gallery.gallery import Gallery
    from s4g_ray.gallery.search.options import LocateOptions
    from s4g_ray.progress import Reporter


GalleryUri = Annotated[str, typer.Argument(help="A gallery: a folder or s3://...")]
Photos = Annotated[
    list[str],
    typer.Argument(
        metavar="PHOTO...", help="Images, videos, folders of them, and patterns like 'in/*.jpg'."
    ),
]
Near = Annotated[
    str | None,
    typer.Option(
        metavar="LAT,LON",
        help="Search near this point; `exif`: near the position in each photo's EXIF tags.",
    ),
]
WithinKm = Annotated[float | None, typer.Option(help="With --near: the farthest tiles, km.")]
AreaFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="Search in the polygons of a GeoJSON file.")
]
Turns = Annotated[
    int,
    typer.Option(
        help="Try photos of unknown orientation at so many rotations (panoramas: shifts)."
    ),
]
Refine = Annotated[
    bool, typer.Option("--refine", help="Overhead photos: find the exact position within a tile.")
]
View = Annotated[
    Literal["auto", "overhead", "panorama"],
    typer.Option(help="What --turns turns.  auto: as what the model was trained on."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a list with an answer for each photo.")]
AsGeoJson = Annotated[
    bool, typer.Option("--geojson", help="Print tiles, circles and points as GeoJSON.")
]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print a row for each candidate.")]


def locate(
    gallery: GalleryUri,
    photos: Photos,
    top: Annotated[int, typer.Option(help="Candidates of each photo.")] = 10,
    near: Near = None,
    within_km: WithinKm = None,
    area: AreaFile = None,
    turns: Turns = 1,
    refine: Refine = False,
    view: View = "auto",
    every_s: Annotated[float, typer.Option(help="Videos: seconds between two frames.")] = 1.0,
    as_json: AsJson = False,
    as_geojson: AsGeoJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Tell where photos were taken: candidates, the most probable point, its uncertainty.

    Needs a gallery (`s4g gallery build`); probabilities and radii need its calibration
    (`s4g gallery calibrate`). Exit code 2 when the only photo cannot be read; 1 when some of many
    cannot: they are listed with their reason.
    """
    keep_freed_memory()
    wanted = _choose_format(as_json, as_geojson, as_csv)
    if not 0 < every_s < float("inf"):
        raise InputError(f"--every-s {every_s:g} is not above 0")
    from s4g_ray.data.photos.photo_files import list_photos
    from s4g_ray.gallery.search.options import LocateOptions

    options = LocateOptions(
        top=top,
        near=_parse_near(near, within_km),
        within_m=None if within_km is None else within_km * 1000,
        area=None if area is None else read_area(area),
        turns=turns,
        refine=refine,
        view=view,
    )
    uris = list_photos(photos)
    is_single = len(uris) == 1  # frames of a video that can be read have no errors
    console = make_reporter(False).console
    with interruptible():
        from s4g_ray.gallery.gallery import open_gallery

        with open_gallery(gallery) as opened:
            reporter = _make_progress(console, wanted)
            answers = _locate_files(opened, uris, options, every_s, reporter)
            num_bad = _print_answers(answers, wanted, is_single, console)
    if num_bad:
        raise typer.Exit(1)


def _make_progress(console: Console, wanted: str | None) -> Reporter:
    """Make what shows progress: apart from answers that go to a file or another program.

    Such a program may write to the same terminal, where a bar would be in its way: it gets lines.
    """
    from s4g_ray.progress import Reporter, make_console

    if wanted is None and console.is_terminal:
        return Reporter(console)
    is_terminal = False if stat.S_ISFIFO(os.fstat(1).st_mode) else None
    return Reporter(make_console(stderr=True, force_terminal=is_terminal))


def _choose_format(as_json: bool, as_geojson: bool, as_csv: bool) -> str | None:
    """Return json, geojson or csv; None for tables. Raises InputError for two of them."""
    asked = {"json": as_json, "geojson": as_geojson, "csv": as_csv}
    names = [name for name, is_asked in asked.items() if is_asked]
    if len(names) > 1:
        raise InputError(f"choose one of {' and '.join(f'--{name}' for name in names)}")
    return names[0] if names else None


def _locate_files(
    gallery: Gallery, uris: list[str], options: LocateOptions, every_s: float, reporter: Reporter
) -> Iterator[Answer]:
    """Yield the answers of files, with progress."""
    from s4g_ray.gallery.locate import locate_files

    found = locate_files(gallery, uris, options, every_s=every_s)
    with closing(found), reporter.stage("locating photos") as update:
        update(0, len(uris))
        for number, answer in enumerate(found, 1):
            update(number, max(number, len(uris)))
            yield answer


def _print_answers(
    answers: Iterator[Answer], wanted: str | None, is_single: bool, console: Console
) -> int:
    """Print the answers as asked, and return how many photos cannot be read.

    Raises InputError when the only photo cannot be read.
    """
    from s4g_ray.cli.galleries import locate_output

    num_bad = 0

    def checked() -> Iterator[Answer]:
        nonlocal num_bad
        for answer in answers:
            if answer.error is not None:
                if is_single:
                    raise InputError(f"{answer.photo}: {answer.error}")
                num_bad += 1
            yield answer

    if wanted is not None:
        for text in locate_output.FORMATS[wanted](checked()):
            typer.echo(text)
    else:
        width = console.width if console.is_terminal else None
        widen(console)
        for shown in locate_output.tables(checked(), width):
            console.print(shown)
    return num_bad


def _parse_near(near: str | None, within_km: float | None) -> Any:
    """Return lat and lon, or `exif`. Raises InputError."""
    if near is None or near == "exif":
        if within_km is not None and near is None:
            raise InputError("--within-km needs --near LAT,LON or --near exif")
        if near is not None and within_km is None:
            raise InputError("--near needs --within-km: the farthest tiles to search")
        return near
    try:
        lat, lon = (float(part) for part in near.split(","))
    except ValueError as error:
        raise InputError(f"--near {near} is not LAT,LON such as 47.37,8.54") from error
    if within_km is None:
        raise InputError("--near needs --within-km: the farthest tiles to search")
    return lat, lon
