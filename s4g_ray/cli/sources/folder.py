"""Define `s4g convert folder`: images and lists of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from s4g_ray.cli.sources.run_converter import AsJson, Strict, Target, run_converter

BaseFolder = Annotated[
    str, typer.Argument(help="The folder that paths are relative to, or s3://...")
]
QueriesFile = Annotated[
    str | None,
    typer.Option(help="List of the queries; else queries.csv or queries.parquet."),
]
ReferencesFile = Annotated[
    str | None,
    typer.Option(
        help="List of the tiles, or a data set of tiles as `s4g convert imagery` makes it; else"
        " references.csv or references.parquet."
    ),
]
PathColumn = Annotated[str, typer.Option(help="Column of image paths.")]
LatColumn = Annotated[str, typer.Option(help="Column of latitudes, WGS84 degrees.")]
LonColumn = Annotated[str, typer.Option(help="Column of longitudes, WGS84 degrees.")]
PairBy = Annotated[
    Literal["nearest", "key"],
    typer.Option(help="A query's place: the nearest tile, or the tiles with its key."),
]
KeyColumn = Annotated[str, typer.Option(help="Column of keys, for --pair key.")]
MaxDistance = Annotated[
    float | None,
    typer.Option(
        help="Leave out queries farther from their tile, metres; inf keeps all. Without it, queries"
        " far from all tiles are an error."
    ),
]
SplitColumn = Annotated[
    str | None, typer.Option(help="Column of splits: train, val, test, gallery.")
]
TestFraction = Annotated[
    float,
    typer.Option(help="Easternmost share of the places, used for testing without --split-column."),
]
RegionColumn = Annotated[str | None, typer.Option(help="Column of regions.")]
HeadingColumn = Annotated[
    str | None,
    typer.Option(help="Column of the queries' headings, degrees clockwise from north."),
]
IdColumn = Annotated[
    str | None, typer.Option(help="Column of ids (whole numbers); else row numbers.")
]
Delimiter = Annotated[
    str | None,
    typer.Option(
        help="Delimiter of the lists: one character, comma, semicolon, tab or pipe; else it is"
        " found."
    ),
]
Decimal = Annotated[
    str | None, typer.Option(help="Decimal sign of the lists, . or ,; else it is found.")
]
MatchNames = Annotated[
    bool,
    typer.Option(
        "--match-names",
        help="Take files whose names differ by letter case, Unicode form, \\ or extension.",
    ),
]
FromExif = Annotated[
    bool,
    typer.Option(
        "--from-exif",
        help="Take positions and headings that the queries' list lacks from the photos' own tags."
        " --queries may then be a folder; without a list, the queries are the photos in SOURCE.",
    ),
]
DatasetName = Annotated[
    str | None, typer.Option(help="Name of the data set; else that of the folder.")
]


def folder(
    source: BaseFolder,
    target: Target,
    queries: QueriesFile = None,
    references: ReferencesFile = None,
    path_column: PathColumn = "path",
    lat_column: LatColumn = "lat",
    lon_column: LonColumn = "lon",
    pair: PairBy = "nearest",
    key_column: KeyColumn = "key",
    max_distance_m: MaxDistance = None,
    split_column: SplitColumn = None,
    test_fraction: TestFraction = 0.2,
    region_column: RegionColumn = None,
    heading_column: HeadingColumn = None,
    id_column: IdColumn = None,
    delimiter: Delimiter = None,
    decimal: Decimal = None,
    match_names: MatchNames = False,
    from_exif: FromExif = False,
    name: DatasetName = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert a folder of images and two lists of them.

    The lists, CSV with a header or Parquet, hold paths with coordinates or a common key.
    """
    from s4g_ray.datasets import folder

    options: dict[str, Any] = {
        "queries": queries,
        "references": references,
        "path_column": path_column,
        "lat_column": lat_column,
        "lon_column": lon_column,
        "pair": pair,
        "key_column": key_column,
        "max_distance_m": max_distance_m,
        "split_column": split_column,
        "test_fraction": test_fraction,
        "region_column": region_column,
        "heading_column": heading_column,
        "id_column": id_column,
        "delimiter": delimiter,
        "decimal": decimal,
        "match_names": match_names,
        "from_exif": from_exif,
        "name": name,
    }
    run_converter(folder.convert, source, target, as_json, strict=strict, **options)
