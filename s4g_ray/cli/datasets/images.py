"""Define `s4g convert relocate` and `s4g convert stretch`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from s4g_ray.cli.console import interruptible, make_reporter, parse_numbers, print_json

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def relocate(
    dataset: Annotated[str, typer.Argument(help="The data set whose images were moved.")],
    root: Annotated[
        str, typer.Argument(help="The folder of its images now, or s3://...: all stays but this.")
    ],
    as_json: AsJson = False,
) -> None:
    """Name the folder of a data set's images anew.

    For images that were moved without their data set, or the other way round. The rows and the
    fingerprint stay, so runs go on with --resume.
    """
    from s4g_ray.datasets.inspection.relocation import relocate as give_root

    reporter = make_reporter(as_json)
    with interruptible():
        found = give_root(dataset, root)
    root = found.dataset.images_root
    for line in describe_root(found.dataset.name, root, found.relative, found.absolute):
        reporter.line(line)
    made = {"uri": found.dataset.uri, "images_root": root, "relative": found.relative}
    print_json(as_json, {**made, "absolute": found.absolute})


def describe_root(name: str, root: str, relative: int, absolute: int) -> Iterator[str]:
    """Yield how many images of a data set or gallery are looked for in a folder."""
    yield f"{name}: paths of images that start from {root}: {relative:,}"
    if absolute:
        yield f"absolute paths, which stay: {absolute:,}"


def stretch(
    dataset: Annotated[str, typer.Argument(help="The data set of images of 16 bits and others.")],
    how: Annotated[
        str,
        typer.Argument(
            metavar="STRETCH",
            help="LOW,HIGH, as 0,3000; LOW,HIGH;LOW,HIGH;LOW,HIGH for each band; percentile:2,98 of"
            " a sample of the images; or full, the range of the values' type.",
        ),
    ],
    bands: Annotated[
        str,
        typer.Option(
            help="Bands to show of files with 2, 4 or more, from 1, as 4,3,2; without it those"
            " named before stay."
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Say how the values of a data set's images become bytes.

    For images of 16 or 32 bits, signed or floating point, and of other than one or three bands.
    Bytes stay as they are. Written into dataset.json: all that reads the data set goes by it.
    """
    from s4g_ray.data.pixels.stretch import Stretch
    from s4g_ray.datasets.inspection.value_range import write_stretch

    chosen = tuple(map(int, parse_numbers("--bands", bands, "4,3,2"))) or None
    reporter = make_reporter(as_json)
    with interruptible(), reporter.stage("looking at images"):
        made = write_stretch(dataset, Stretch.parse(how), chosen, reporter.line)
    of_bands = f", bands {','.join(map(str, made.values.bands))}" if made.values.bands else ""
    reporter.line(
        f"{made.name}: values other than bytes are shown by stretch {made.values.stretch}{of_bands}"
    )
    shown = {"stretch": made.values.stretch, "bands": made.values.bands}
    print_json(as_json, {"uri": made.uri, "fingerprint": made.fingerprint, **shown})
