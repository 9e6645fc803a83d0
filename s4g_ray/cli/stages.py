"""Define `s4g embed` and `s4g mine`: single stages, for your own collections and tables.

jobs/embed.py and jobs/mine.py run the same functions.
"""

from __future__ import annotations

from typing import Annotated

import typer

from s4g_ray.cli.console import Steal, if_begun, interruptible, make_reporter, print_json

Target = Annotated[
    str, typer.Argument(help="A new folder or s3://..., or that of an interrupted call.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. embedding.num_actors=4")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RESUME_HINT = "interrupted; run the same command again to resume after the committed parts"


def embed(
    source: Annotated[
        str,
        typer.Argument(help="The folder of a run or an export, or a .pth or .safetensors file."),
    ],
    dataset: Annotated[str, typer.Argument(help="A canonical data set: a folder or s3://...")],
    target: Target,
    overrides: Overrides = None,
    split: Annotated[
        str, typer.Option(help="Splits, joined by commas; test includes the gallery.")
    ] = "train,val,test",
    epoch: Annotated[
        int | None, typer.Option(help="A run's checkpoint of this epoch.  [default: the last]")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Architecture and sizes for bare weights: a YAML file.")
    ] = None,
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Embed a data set's queries and references into a table.

    Writes the table in parts, so that an interrupted call can be resumed.
    """
    from s4g_ray.config.loading import load_config

    loaded = load_config(config) if config else None  # before the slow imports: errors come at once
    from s4g_ray.pipeline.stages.embed import embed_collection

    with interruptible(if_begun(target, RESUME_HINT)):
        result = embed_collection(
            source,
            dataset,
            target,
            config=loaded,
            overrides=overrides or [],
            splits=split.split(","),
            epoch=epoch,
            steal=steal,
            reporter=make_reporter(as_json),
        )
    print_json(as_json, result)


def mine(
    embeddings: Annotated[
        str, typer.Argument(help="A published embedding table, as `s4g embed` writes it.")
    ],
    target: Target,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="e.g. sampling.neighbor_pool_size=64"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="The table's data set: only its train split is mined, without false negatives."
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A YAML file to take sections mining and sampling from.")
    ] = None,
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Mine an embedding table for the neighbors of each place.

    Publishes the visually nearest places of each query's place as a neighbor graph.
    """
    from s4g_ray.config.loading import load_config

    loaded = load_config(config) if config else None  # before the slow imports: errors come at once
    from s4g_ray.pipeline.stages.mine import mine_table

    with interruptible(if_begun(target, RESUME_HINT)):
        result = mine_table(
            embeddings,
            target,
            dataset_uri=dataset,
            config=loaded,
            overrides=overrides or [],
            steal=steal,
            reporter=make_reporter(as_json),
        )
    print_json(as_json, result)
