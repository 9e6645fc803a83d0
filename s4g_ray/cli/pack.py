"""Define `s4g pack`: pack a data set's images into tar shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from s4g_ray.cli.console import if_begun, interruptible, make_reporter, print_json
from s4g_ray.errors import InputError

if TYPE_CHECKING:
    from s4g_ray.config.data_schema import Size
    from s4g_ray.datasets.packing.pack import Packed

RESUME_HINT = "interrupted; finished shards stay: run the same command again to resume"


def pack(
    dataset: Annotated[str, typer.Argument(help="A canonical data set: a folder or s3://...")],
    target: Annotated[
        str, typer.Argument(help="Where to write the packed one: a folder or s3://...")
    ],
    query_size: Annotated[
        str | None,
        typer.Option(
            metavar="H,W", help="Resize queries to these pixels.  [default: copied as they are]"
        ),
    ] = None,
    reference_size: Annotated[
        str | None,
        typer.Option(metavar="H,W", help="Resize references.  [default: copied as they are]"),
    ] = None,
    no_antialias: Annotated[
        bool, typer.Option("--no-antialias", help="Resize as data.antialias=false does.")
    ] = False,
    quality: Annotated[int, typer.Option(help="JPEG quality of resized images, 1 to 100.")] = 95,
    shard_mb: Annotated[float, typer.Option(help="Approximate size of a shard, MB.")] = 256,
    on_bad_image: Annotated[
        Literal["fail", "skip"],
        typer.Option(
            help="skip: leave out rows of missing and corrupt images, and list them in"
            " shards/_MANIFEST.json."
        ),
    ] = "fail",
    workers: Annotated[
        int | None,
        typer.Option(help="Shards written at a time.  [default: the number of processors]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Pack a data set's images into tar shards.

    Neighbors on the ground are next to each other in the shards. After an interruption the same
    command resumes.
    """
    queries = _parse_size("--query-size", query_size)
    references = _parse_size("--reference-size", reference_size)
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} is below 1")
    from s4g_ray.datasets.packing.layout import PackOptions
    from s4g_ray.datasets.packing.pack import pack as run_pack

    options = PackOptions(queries, references, not no_antialias, quality, shard_mb, on_bad_image)
    reporter = make_reporter(as_json)
    with interruptible(if_begun(target, RESUME_HINT)), reporter.stage("packing images") as update:
        packed = run_pack(dataset, target, options, num_threads=workers, on_progress=update)
    for line in _describe(packed):
        reporter.line(line)
    print_json(as_json, _as_dict(packed))


def _parse_size(option: str, text: str | None) -> Size | None:
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text} is not a height and a width such as 140,768") from error
    return height, width


def _describe(packed: Packed) -> list[str]:
    from s4g_ray.amounts import count_noun, format_bytes
    from s4g_ray.datasets.inspection.findings import take_first

    images = count_noun(packed.num_images, "image")
    shards = count_noun(packed.num_shards, "shard")
    if packed.reused_shards:
        shards += f" ({packed.reused_shards:,} written before)"
    size = format_bytes(packed.num_bytes)
    lines = [f"{packed.dataset.name}: {images} in {shards}, {size}, verified: {packed.dataset.uri}"]
    if packed.skipped:
        lines.append(f"{count_noun(len(packed.skipped), 'row')} left out:")
        lines.extend(take_first(f"  {row.view}: {row.reason}" for row in packed.skipped))
    return lines


def _as_dict(packed: Packed) -> dict[str, Any]:
    return {
        "uri": packed.dataset.uri,
        "name": packed.dataset.name,
        "fingerprint": packed.dataset.fingerprint,
        "images": packed.num_images,
        "shards": packed.num_shards,
        "bytes": packed.num_bytes,
        "reused_shards": packed.reused_shards,
        "skipped": [vars(row) for row in packed.skipped],
    }
