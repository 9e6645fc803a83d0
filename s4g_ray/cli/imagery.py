"""Define `s4g convert imagery`: cut tiles of equal ground size out of imagery."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from s4g_ray.cli.areas import parse_bounds, read_area
from s4g_ray.cli.console import interruptible, make_reporter, print_json
from s4g_ray.distributed.submitted_job import check_kept
from s4g_ray.errors import InputError

RESUME_HINT = "interrupted; finished shards stay: run the same command again to resume"


Sources = Annotated[
    list[str],
    typer.Argument(
        help="GeoTIFF, COG, VRT, MBTiles, PMTiles, a STAC item collection, or a folder of such"
        " or of XYZ tiles; local or s3://... Where several overlap, the first with data counts."
    ),
]
Target = Annotated[str, typer.Argument(help="Where to write the data set: a folder or s3://...")]
Sizes = Annotated[
    list[float], typer.Option(help="Side of a tile on the ground, metres; may be repeated.")
]
Overlap = Annotated[
    float, typer.Option(help="Share of a side that neighboring tiles have in common.")
]
Pixels = Annotated[int, typer.Option(help="Side of a tile, pixels.")]
Bands = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Bands, from 1.  [default: red, green and blue]")
]
AreaFile = Annotated[
    str | None,
    typer.Option(metavar="GEOJSON", help="Polygons: only tiles whose centres lie in one."),
]
BoundsText = Annotated[
    str | None,
    typer.Option(metavar="W,S,E,N", help="Degrees: only tiles whose centres lie between."),
]
StretchText = Annotated[
    str | None,
    typer.Option(
        metavar="full|LOW,HIGH|percentile:2,98",
        help="Values that become black and white.  [default: full for bytes, percentile:2,98 for"
        " other types]",
    ),
]
MaxNodata = Annotated[
    float, typer.Option(help="Drop tiles with a larger share of pixels without data.")
]
Split = Annotated[str, typer.Option(help="Split of the tiles: gallery, train, val or test.")]
Quality = Annotated[int, typer.Option(help="JPEG quality, 1 to 100.")]
DatasetName = Annotated[
    str | None, typer.Option(help="Name of the data set; else that of the first source.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Tasks at a time; 0: in this process, without Ray.  [default: two a processor of the"
        " cluster, 0 for few tiles]"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def imagery(
    source: Sources,
    target: Target,
    size_m: Sizes,
    overlap: Overlap = 0.0,
    pixels: Pixels = 384,
    bands: Bands = None,
    area: AreaFile = None,
    bounds: BoundsText = None,
    stretch: StretchText = None,
    max_nodata: MaxNodata = 0.05,
    split: Split = "gallery",
    quality: Quality = 90,
    name: DatasetName = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Cut tiles of equal ground size out of georeferenced imagery.

    After an interruption the same command resumes.
    """
    check_kept("TARGET", target)
    if workers is not None and workers < 0:
        raise InputError(f"--workers {workers} is below 0")
    options: dict[str, Any] = {
        "size_m": size_m,
        "overlap": overlap,
        "pixels": pixels,
        "max_nodata": max_nodata,
        "split": split,
        "quality": quality,
        "name": name,
        "num_tasks": workers,
        "bands": _parse_bands(bands),
        "bounds": None if bounds is None else parse_bounds(bounds),
    }
    from s4g_ray.data.pixels.stretch import Stretch
    from s4g_ray.datasets.imagery.convert import convert
    from s4g_ray.datasets.imagery.cutting.summary import read_summary

    if stretch is not None:
        options["stretch"] = Stretch.parse(stretch)
    if area is not None:
        options["area"] = read_area(area)
    reporter = make_reporter(as_json)
    notes: list[str] = []

    def report(line: str) -> None:
        notes.append(line)
        reporter.line(line)

    with interruptible(RESUME_HINT), reporter.stage("cutting tiles") as update:
        dataset = convert(source, target, report=report, on_progress=update, **options)
    summary = read_summary(dataset.uri)
    reporter.line(f"{dataset.name}: {dataset.uri}")
    reporter.line("\n".join(f"  {line}" for line in summary.describe()))
    made = {"uri": dataset.uri, "name": dataset.name, "fingerprint": dataset.fingerprint}
    counts = {"references": {split: summary.tiles}, "queries": {}}
    print_json(as_json, {**made, "counts": counts, "notes": notes, "summary": summary.to_json()})


def _parse_bands(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--bands {text} is not a list of bands such as 3,2,1") from error
