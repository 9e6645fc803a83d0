"""Define the commands of `s4g convert` for further published data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import typer

from s4g_ray.cli.sources.run_converter import AsJson, FolderOf, Strict, Target, run_converter

QueryView = Annotated[str, typer.Option(help="drone or satellite.")]
ReferenceView = Annotated[str, typer.Option(help="The other one.")]


def sues200(
    source: FolderOf,
    target: Target,
    query_view: QueryView = "drone",
    reference_view: ReferenceView = "satellite",
    heights: Annotated[
        str, typer.Option(help="Heights of the drone images, metres, joined by commas.")
    ] = "150,200,250,300",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert SUES-200: drone images from four heights.

    Matches them with satellite images of 200 places, in either direction.
    """
    from s4g_ray.datasets.published import sues200

    options = {"query_view": query_view, "reference_view": reference_view, "heights": heights}
    run_converter(sues200.convert, source, target, as_json, strict=strict, **options)


def denseuav(
    source: FolderOf,
    target: Target,
    query_view: QueryView = "drone",
    reference_view: ReferenceView = "satellite",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert DenseUAV: drone images of campuses.

    Matches them with satellite images of points 20 m apart, in either direction.
    """
    from s4g_ray.datasets.published import denseuav

    options = {"query_view": query_view, "reference_view": reference_view}
    run_converter(denseuav.convert, source, target, as_json, strict=strict, **options)


def gta_uav(
    source: FolderOf,
    target: Target,
    area: Annotated[
        Literal["cross", "same"],
        typer.Option(help="cross: train and test in two halves of the map; same: in all of it."),
    ] = "cross",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert GTA-UAV: drone images of a game's map.

    The tiles cover the map at four zoom levels.
    """
    from s4g_ray.datasets.published import gta_uav

    run_converter(gta_uav.convert, source, target, as_json, strict=strict, area=area)


def uav_visloc(
    source: FolderOf,
    target: Target,
    tiles: Annotated[
        str | None,
        typer.Option(help="A data set of tiles of the satellite maps, by s4g convert imagery."),
    ] = None,
    train_flights: Annotated[
        str, typer.Option(help="Flights to train on, joined by commas.")
    ] = "01,03,05,08",
    test_flights: Annotated[
        str, typer.Option(help="Flights to test on, joined by commas.")
    ] = "02,04,11",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert UAV-VisLoc: photos of fixed-wing drones.

    Matches them with tiles of satellite maps, which s4g convert imagery has cut.
    """
    from s4g_ray.datasets.published import uav_visloc

    options = {"tiles": tiles, "train_flights": train_flights, "test_flights": test_flights}
    run_converter(uav_visloc.convert, source, target, as_json, strict=strict, **options)


def cvcities(
    source: FolderOf,
    target: Target,
    train_cities: Annotated[
        str | None, typer.Option(help="Cities to train on; else the ten of the publication.")
    ] = None,
    test_cities: Annotated[
        str | None, typer.Option(help="Cities to test on; else the six of the publication.")
    ] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Convert CV-Cities: street panoramas, satellite images.

    Its places are in sixteen cities on six continents.
    """
    from s4g_ray.datasets.published import cvcities

    named = {"train_cities": train_cities, "test_cities": test_cities}
    options = {name: cities for name, cities in named.items() if cities is not None}
    run_converter(cvcities.convert, source, target, as_json, strict=strict, **options)


COMMANDS: dict[str, Callable[..., None]] = {
    "sues200": sues200,
    "denseuav": denseuav,
    "gta-uav": gta_uav,
    "uav-visloc": uav_visloc,
    "cvcities": cvcities,
}
