"""`s4g embed` and `s4g mine`: single stages, for collections and tables of one's own; jobs/ runs the same functions."""

from __future__ import annotations

from typing import Annotated

import typer

from s4g_ray.cli.console import interruptible, make_reporter, print_json

Target = Annotated[
    str, typer.Argument(help="A new folder or s3://...; an interrupted one is gone on with.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. embedding.num_actors=4")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
GO_ON = "interrupted; the same command goes on with the parts that are committed"


def embed(
    source: Annotated[
        str, typer.Argument(help="A run's folder, an export's, or a .pth or .safetensors file.")
    ],
    dataset: Annotated[str, typer.Argument(help="A canonical data set: a folder or s3://...")],
    target: Target,
    overrides: Overrides = None,
    split: Annotated[
        str, typer.Option(help="Splits, joined by commas; test brings the gallery.")
    ] = "train,val,test",
    epoch: Annotated[
        int | None, typer.Option(help="A run's checkpoint of this epoch.  [default: the last]")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Architecture and sizes for bare weights: a YAML file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Embed a collection's queries and references into a published table, in resumable parts."""
    from s4g_ray.config.loading import load_config

    loaded = load_config(config) if config else None
    from s4g_ray.pipeline.stages.embed import embed_collection

    with interruptible(GO_ON):
        result = embed_collection(
            source,
            dataset,
            target,
            config=loaded,
            overrides=overrides or [],
            splits=split.split(","),
            epoch=epoch,
            reporter=make_reporter(as_json),
        )
    print_json(as_json, result)


def mine(
    embeddings: Annotated[
        str, typer.Argument(help="A published embedding table, such as `s4g embed` makes.")
    ],
    target: Target,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="e.g. sampling.neighbor_pool_size=64"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="The table's data set: its train split alone is mined, its false negatives are left out."
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A YAML file to take sections mining and sampling from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Mine a table: publish the visually nearest places of each query's place as a graph."""
    from s4g_ray.config.loading import load_config

    loaded = load_config(config) if config else None
    from s4g_ray.pipeline.stages.mine import mine_table

    with interruptible(GO_ON):
        result = mine_table(
            embeddings,
            target,
            dataset_uri=dataset,
            config=loaded,
            overrides=overrides or [],
            reporter=make_reporter(as_json),
        )
    print_json(as_json, result)
