"""Define the `s4g` command. Exit codes: 0 done, 2 bad input or configuration, 1 failure."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from s4g_ray.cli.console import (
    Steal,
    if_begun,
    interruptible,
    make_reporter,
    owned,
    parse_numbers,
    print_json,
    run_app,
)
from s4g_ray.cli.convert import convert_app
from s4g_ray.cli.examples import add_examples
from s4g_ray.cli.galleries.gallery import gallery_app
from s4g_ray.cli.galleries.locate import locate
from s4g_ray.cli.galleries.serve import serve
from s4g_ray.cli.index import index_app
from s4g_ray.cli.pack import pack
from s4g_ray.cli.runs.plan import plan
from s4g_ray.cli.runs.prune import prune
from s4g_ray.cli.runs.watch import watch
from s4g_ray.cli.setup.configs import configs
from s4g_ray.cli.setup.doctor import doctor
from s4g_ray.cli.stages import embed, mine
from s4g_ray.distributed.submitted_job import check_kept, stop_note
from s4g_ray.errors import InputError
from s4g_ray.freed_memory import keep_freed_memory

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(convert_app, name="convert")
app.add_typer(index_app, name="index")
app.add_typer(gallery_app, name="gallery")
app.command()(configs)
app.command()(doctor)
app.command()(owned(pack))
app.command()(embed)
app.command()(locate)
app.command()(mine)
app.command()(plan)
app.command()(prune)
app.command()(serve)
app.command()(watch)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.epochs=3")
]
FromEpoch = Annotated[
    int | None,
    typer.Option(
        help="With --resume: continue after this epoch as a branch, with other values.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Source = Annotated[
    str, typer.Argument(help="The folder of a run or an export, or a .pth or .safetensors file.")
]
ConfigOfWeights = Annotated[
    str | None, typer.Option(help="Architecture and sizes for bare weights: a YAML file.")
]
Split = Annotated[str | None, typer.Option(help="train, val or test.  [default: as configured]")]
Epoch = Annotated[
    int | None, typer.Option(help="A run's checkpoint of this epoch.  [default: the last]")
]
Fov = Annotated[
    str | None, typer.Option(help="Fields of view of panoramas, degrees, e.g. 360,180,90,70")
]
Heading = Annotated[
    str | None,
    typer.Option(help="Panoramas: known (turned to north), random (seeded), or as_is."),
]
QueriesOut = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Write what is found for each query: a .parquet or .csv file, or s3://...",
    ),
]
NumTop = Annotated[
    int | None,
    typer.Option(
        help="With --queries-out: the number of references a query.  [default: 10]",
        show_default=False,
    ),
]


def show_version(wanted: bool) -> None:
    """Print the version and end, if it is wanted."""
    if wanted:
        from s4g_ray import __version__

        typer.echo(f"s4g {__version__}")
        raise typer.Exit


@app.callback()
def s4g(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Cross-view geo-localisation: train with hard negatives mined across a cluster."""


@app.command()
def demo(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run the whole loop on real imagery, on this machine, in minutes.

    Ends with a table of results, report.html, a gallery, and photos that it locates. run_dir=
    resumes an earlier call.
    """
    keep_freed_memory()
    from s4g_ray.cli.demo import Demo

    made = Demo.from_overrides(overrides or [])
    hint = f"interrupted; published files stay: to resume, run `{made.again}`"
    with interruptible(if_begun(made.config.run_dir, hint)):
        result = made.run(make_reporter(as_json))
    values = {
        "run_dir": result.run.run_dir,
        "untrained": result.run.untrained,
        "trained": result.run.metrics,
        "finished": result.run.finished,
        "located": [one.to_json() for one in result.located],
        "files": list(result.paths),
    }
    print_json(as_json, values)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, such as configs/earth.yaml.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in run_dir.")] = False,
    from_epoch: FromEpoch = None,
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Train, mine and evaluate with a configuration."""
    again = shlex.join(["s4g", "train", config, *(overrides or []), "--resume"])
    train_as_configured(
        config,
        overrides or [],
        resume=resume,
        from_epoch=from_epoch,
        steal=steal,
        as_json=as_json,
        again=again,
    )


def train_as_configured(
    config: str,
    overrides: list[str],
    *,
    resume: bool,
    from_epoch: int | None,
    steal: bool,
    as_json: bool,
    again: str,
) -> None:
    """Run `s4g train` or jobs/train.py; `again` is the command that resumes an unfinished run."""
    from s4g_ray.config.loading import load_config

    # before the slow imports: a misspelt key is reported at once
    loaded = load_config(config, overrides)
    check_kept("run_dir", loaded.run_dir)
    from s4g_ray.cli.runs.live import follow_run

    reporter = make_reporter(as_json)
    note = stop_note(loaded.checkpoint.grace_s)
    if note is not None:
        reporter.line(note)
    hint = f"interrupted; published files stay: to resume, run `{again}`"
    following = follow_run(reporter, loaded, resume=resume, from_epoch=from_epoch)
    with interruptible(if_begun(loaded.run_dir, hint)), following as followed:
        from s4g_ray.pipeline.run import run

        result = run(loaded, resume=resume, from_epoch=from_epoch, steal=steal, **followed)
    if not result.finished:
        reporter.line(f"resume with: {again}" if result.begun else "SIGTERM: nothing was begun")
    values = {"run_dir": result.run_dir, "metrics": result.metrics, "finished": result.finished}
    print_json(as_json, values)


@app.command()
def evaluate(
    source: Source,
    dataset: Annotated[
        str, typer.Argument(help="A canonical data set: that of the run, or another (zero-shot).")
    ],
    overrides: Overrides = None,
    config: ConfigOfWeights = None,
    split: Split = None,
    epoch: Epoch = None,
    protocol: Annotated[str, typer.Option(help="strict, paper or both.")] = "both",
    fov: Fov = None,
    heading: Heading = None,
    out: Annotated[
        str | None, typer.Option(help="Keep embeddings and result.json in this folder.")
    ] = None,
    queries_out: QueriesOut = None,
    top: NumTop = None,
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run or weights on a data set.

    Computes recall, AP, hit rate and metres, for all queries and by region, in both protocols.
    """
    from s4g_ray.config.loading import load_config

    fovs = parse_numbers("--fov", fov, "360,180,90")
    if not all(0 < degrees <= 360 for degrees in fovs):
        raise InputError(f"--fov {fov} is not within 0..360 degrees: give those that are seen")
    if top is not None and queries_out is None:
        raise InputError(f"--top {top} belongs to --queries-out; name a file, or leave it out")
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
            queries_out=queries_out,
            top=10 if top is None else top,
            steal=steal,
            reporter=reporter,
        )
    chosen = [name for name in PROTOCOLS if protocol in (name, "both")]
    if not as_json:
        for table in evaluation_tables(results, chosen):
            reporter.console.print(table)
    print_json(as_json, {"results": [result.as_dict(chosen) for result in results]})


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    target: Annotated[str, typer.Argument(help="Where to write the model: a folder or s3://...")],
    epoch: Annotated[
        int | None, typer.Option(help="The checkpoint of this epoch.  [default: the last]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a run's encoder.

    Writes safetensors, model.json, and a .pth file in the published form.
    """
    from s4g_ray.encoder.export import export as run_export

    description = run_export(run, target, epoch=epoch)
    if not as_json:
        typer.echo(
            f"{description['architecture']} after epoch {description['epoch']},"
            f" D={description['dim']}: {target}"
        )
    print_json(as_json, description)


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="A canonical data set: a folder or s3://...")],
    decode: Annotated[
        bool, typer.Option("--decode", help="Read and decode every image too.")
    ] = False,
    leak_radius_m: Annotated[
        float, typer.Option(help="Report val and test queries this near to a train query, metres.")
    ] = 25.0,
    threads: Annotated[int, typer.Option(help="Number of threads that list and read.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Check the rows and images of a data set.

    Reports counts, coordinates, missing images, duplicates and leakage. Exit code 1 for a fault.
    """
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
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="A run's folder, or several to compare.")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="Of one run: where its data set lies, if it has moved.")
    ] = None,
    gallery: Annotated[
        str | None,
        typer.Option(help="Of one run: show the calibration of this gallery, too."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Of several runs: the page, or s3://...  [default: comparison.html]",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's report.html again, or a page that compares several runs.

    The comparison shows curves, results, what differs in the configurations, and means over seeds.
    """
    for name, value in (("--dataset", dataset), ("--gallery", gallery)):
        if len(runs) > 1 and value is not None:
            raise InputError(
                f"{name} belongs to the report of one run; give one run, or leave it out"
            )
    if len(runs) == 1 and out is not None:
        raise InputError("--out is for several runs; the report of one run is RUN/report.html")
    if len(runs) == 1:
        from s4g_ray.pipeline.report.page import result_values, write_report

        page = write_report(runs[0], dataset=dataset, gallery=gallery)
        values = result_values(runs[0])
    else:
        from s4g_ray.pipeline.report.comparison import write_comparison

        page = "comparison.html" if out is None else out
        check_kept("--out", page)
        if Path(page).is_dir():
            raise InputError(f"--out {page} is a folder; name a file in it")
        values = write_comparison(runs, page).to_json()
    if not as_json:
        typer.echo(page)
    print_json(as_json, {"report": page, **values})


add_examples(app)


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    main()
