"""The `s4g` command. Exit codes: 0 done, 2 bad input or configuration, 1 failure."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from s4g_ray.cli.console import interruptible, make_reporter, print_json, run_app
from s4g_ray.cli.convert import convert_app
from s4g_ray.cli.index import index_app
from s4g_ray.cli.pack import pack
from s4g_ray.cli.stages import embed, mine
from s4g_ray.distributed.submitted_job import check_kept, stop_note
from s4g_ray.errors import InputError

app = typer.Typer(
    help="Cross-view geo-localisation: train with hard negatives mined across a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
GO_ON = "interrupted; what was published stays: go on with the same run_dir and values and --resume (`s4g train`)"
app.add_typer(convert_app, name="convert")
app.add_typer(index_app, name="index")
app.command()(pack)
app.command()(embed)
app.command()(mine)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.epochs=3")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def demo(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The whole loop on real imagery, on this machine, in minutes; ends with a table and report.html."""
    from s4g_ray.cli.demo import demo as run_demo

    with interruptible(GO_ON):
        result = run_demo(overrides or [], make_reporter(as_json))
    print_json(
        as_json,
        {
            "run_dir": result.run_dir,
            "untrained": result.untrained,
            "trained": result.metrics,
            "finished": result.finished,
        },
    )


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, such as configs/earth.yaml.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in run_dir.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, mine and evaluate as a configuration says."""
    again = shlex.join(["s4g", "train", config, *(overrides or []), "--resume"])
    train_as_configured(config, overrides or [], resume=resume, as_json=as_json, again=again)


def train_as_configured(
    config: str, overrides: list[str], *, resume: bool, as_json: bool, again: str
) -> None:
    """The command, and jobs/train.py; `again` is what goes on with an unfinished run."""
    from s4g_ray.config.loading import load_config

    loaded = load_config(
        config, overrides
    )  # before the slow imports: a misspelt key is answered at once
    check_kept("run_dir", loaded.run_dir)
    from s4g_ray.pipeline.driver import run

    reporter = make_reporter(as_json)
    if (note := stop_note(loaded.checkpoint.grace_s)) is not None:
        reporter.line(note)
    with interruptible(GO_ON):
        result = run(loaded, resume=resume, reporter=reporter)
    if not result.finished:
        reporter.line(f"resume with: {again}")
    print_json(
        as_json, {"run_dir": result.run_dir, "metrics": result.metrics, "finished": result.finished}
    )


@app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(help="A run's folder, an export's, or a .pth or .safetensors file.")
    ],
    dataset: Annotated[
        str, typer.Argument(help="A canonical data set: the source's own, or another (zero-shot).")
    ],
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option(help="Architecture and sizes for bare weights: a YAML file.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test.  [default: as configured]")
    ] = None,
    epoch: Annotated[
        int | None, typer.Option(help="A run's checkpoint of this epoch.  [default: the last]")
    ] = None,
    protocol: Annotated[str, typer.Option(help="strict, paper or both.")] = "both",
    fov: Annotated[
        str | None, typer.Option(help="Fields of view of panoramas, degrees, e.g. 360,180,90,70")
    ] = None,
    heading: Annotated[
        str | None,
        typer.Option(help="Panoramas: known (turned to the north), random (seeded), or as_is."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Keep embeddings and result.json in this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run or weights on a data set: recall, AP, hit rate, metres, by region; both protocols."""
    from s4g_ray.config.loading import load_config

    fovs = _numbers("--fov", fov)
    loaded = load_config(config) if config else None
    if protocol not in ("strict", "paper", "both"):
        raise InputError(f"--protocol {protocol} is none of strict, paper and both")
    from s4g_ray.evaluation.metrics import PROTOCOLS
    from s4g_ray.evaluation.tables import evaluation_tables
    from s4g_ray.pipeline.stages.evaluate import evaluate as run_evaluation

    reporter = make_reporter(as_json)
    with interruptible():
        results = run_evaluation(
            source,
            dataset,
            config=loaded,
            overrides=overrides or [],
            split=split,
            epoch=epoch,
            fovs=fovs,
            heading=heading,
            out=out,
            reporter=reporter,
        )
    chosen = [p for p in PROTOCOLS if protocol in (p, "both")]
    if not as_json:
        for table in evaluation_tables(results, chosen):
            reporter.console.print(table)
    print_json(as_json, [result.as_dict(chosen) for result in results])


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    target: Annotated[str, typer.Argument(help="Where the model goes: a folder or s3://...")],
    epoch: Annotated[
        int | None, typer.Option(help="The checkpoint of this epoch.  [default: the last]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's encoder: safetensors, model.json, and .pth in the published form."""
    from s4g_ray.encoder.export import export as run_export

    description = run_export(run, target, epoch=epoch)
    if not as_json:
        typer.echo(
            f"{description['architecture']} after epoch {description['epoch']}, D={description['dim']}: {target}"
        )
    print_json(as_json, description)


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="A canonical data set: a folder or s3://...")],
    decode: Annotated[
        bool, typer.Option("--decode", help="Read and decode every image too.")
    ] = False,
    leak_radius_m: Annotated[
        float, typer.Option(help="Test queries this near a train query leak, metres.")
    ] = 25.0,
    threads: Annotated[int, typer.Option(help="Threads that list and read.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Check a data set: counts, coordinates, missing images, duplicates, leakage. Exit code 1 for a fault."""
    from s4g_ray.datasets.inspection.dataset_checks import inspect_dataset
    from s4g_ray.datasets.inspection.findings import findings_table

    reporter = make_reporter(as_json)
    with interruptible(), reporter.stage("checking images") as update:
        found = inspect_dataset(
            dataset,
            decode=decode,
            leak_radius_m=leak_radius_m,
            num_threads=threads,
            on_progress=update,
        )
    if not as_json:
        reporter.console.print(findings_table(found))
    print_json(as_json, found.as_dict())
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[str, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html anew."""
    from s4g_ray.pipeline.report.page import write_report

    typer.echo(write_report(run))


def _numbers(option: str, text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise InputError(f"{option} {text} is not a list of numbers such as 360,180,90") from error


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    main()
