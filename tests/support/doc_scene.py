"""Folders in which the documentation's commands run: small stand-ins for all that they name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from s4g_ray.config.loading import load_config
from s4g_ray.data.dataset import open_dataset, write_dataset
from s4g_ray.encoder.checkpoint import save_checkpoint
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.export import export
from s4g_ray.pipeline.run_folder import RunFolder
from tests.support import source_trees
from tests.support.doc_commands import ROOT, Command

NUM_PLACES, NUM_TRAIN, NUM_VAL = 24, 16, 4
# what makes a documented configuration small, appended to commands that take KEY=VALUE
SMALL: dict[str, dict[str, Any]] = {
    "data": {
        "reference_size": [32, 32],
        "query_size": [32, 192],
    },  # 70 of 360 degrees are still wide enough
    "model": {"name": "test_convnext", "pretrained": False, "grad_checkpointing": False},
    "train": {
        "epochs": 1,
        "batch_size": 4,
        "num_workers": 1,
        "warmup_epochs": 0,
        "precision": "fp32",
        "channels_last": False,
        "use_gpu": False,
        "loader_processes": 0,
    },
    "sampling": {"num_hard_negatives": 2, "neighbor_pool_size": 3},
    "mining": {"num_shards": 1},
    "embedding": {"num_actors": 1, "gpus_per_actor": 0},
    "evaluation": {"before_training": False, "correlation_baseline": False},
}
SOURCES: dict[str, Callable[[Path], object]] = {  # below /path/to
    "CVUSA": lambda root: source_trees.cvusa_tree(root, train=6),
    "CVACT": source_trees.cvact_tree,
    "VIGOR": source_trees.vigor_tree,
    "University-1652": source_trees.university_tree,
}
# of a subcommand, which of its arguments must be there before (by position), and which must not
INPUTS = {
    "check": [0],
    "configs": [],
    "convert": [1],
    "doctor": [],
    "embed": [0, 1],
    "evaluate": [0, 1],
    "export": [0],
    "index": [1],
    "mine": [0],
    "pack": [0],
    "report": [0],
    "train": [0],
    "watch": [0],
}
TARGETS = {"convert": 2, "embed": 2, "export": 1, "mine": 1, "pack": 1}
TAKE_KEYS = {"embed", "evaluate", "index", "mine", "train"}  # KEY=VALUE


def small_keys() -> list[str]:
    """SMALL as KEY=VALUE."""
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in SMALL.items()
        for key, value in values.items()
    ]


@dataclass
class Scene:
    """A folder to run a page's commands in, one after the other."""

    root: Path
    stand_ins: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        shutil.copytree(ROOT / "configs", self.root / "configs")
        for name in ("mine", "paris"):  # "copy configs/earth.yaml, set data.uri ..."
            shutil.copy(ROOT / "configs/earth.yaml", self.root / f"configs/{name}.yaml")
            text = (ROOT / "configs/earth.yaml").read_text()
            text = text.replace("data/earth", f"data/{name}").replace("runs/earth", f"runs/{name}")
            (self.root / f"configs/{name}.yaml").write_text(text)

    def prepare(self, command: Command) -> list[str]:
        """Return the arguments as run here, once its inputs exist and its target does not.

        s3:// and /path/to are folders here; sizes are reduced.
        """
        arguments = [self._here(word) for word in command.words[1:]]
        name, values = arguments[0], positionals(arguments)
        for position in INPUTS[name]:
            if position < len(values):
                self._provide(values[position])
        if name == "doctor":
            for value in values:
                (self.root / value).mkdir(parents=True, exist_ok=True)
        self._provide_options(arguments)
        if name in TARGETS:
            shutil.rmtree(self.root / values[TARGETS[name]], ignore_errors=True)
        if name == "train":
            given = dict(word.split("=", 1) for word in values if "=" in word)
            config = load_config(
                self.root / values[0], [f"{key}={value}" for key, value in given.items()]
            )
            self._provide(config.data.uri)
            if "--resume" not in arguments:
                shutil.rmtree(self.root / config.run_dir, ignore_errors=True)
        needs_keys = name in TAKE_KEYS and (
            "--config" in arguments or name in ("train", "mine") or self._plans(values)
        )
        return [*arguments, *small_keys()] if needs_keys else arguments

    def _plans(self, values: list[str]) -> bool:
        return values[:1] == ["plan"] and len(values) > 1

    def _here(self, word: str) -> str:
        for there, here in (("/path/to/", "sources/"), ("s3://", "buckets/")):
            word = word.replace(there, f"{self.root}/{here}" if there == "/path/to/" else here)
        return "sources/PHOTOS" if word == "PHOTOS" else word

    def _provide_options(self, arguments: list[str]) -> None:
        for option in ("--config", "--dataset"):
            if option in arguments:
                self._provide(arguments[arguments.index(option) + 1])

    def _provide(self, path: str) -> None:
        """Make a stand-in where nothing is there yet. Raises LookupError for what has none."""
        target = self.root / path
        if target.exists() or "=" in path or path in ("basemap-data", "plan"):
            return
        self.stand_ins.append(path)
        parts = Path(path.removeprefix(f"{self.root}/")).parts
        if parts[0] == "buckets":
            parts = parts[2:]
        if parts[0] == "sources":
            make_photos(target) if parts[1] == "PHOTOS" else SOURCES[parts[1]](target)
        elif parts[0] == "data":
            make_dataset(target)
        elif parts[0] == "runs":
            make_run(target, self.root)
        elif parts[0] == "models" or path.endswith(".pth"):
            make_weights(target, self.root)
        elif parts[0] in ("embeddings", "tables"):
            raise LookupError(f"{path}: make it by a command before")
        else:
            raise LookupError(
                f"nothing stands in for {path}; name a data set data/..., a run runs/..."
            )


def positionals(arguments: list[str]) -> list[str]:
    """The arguments after the subcommand without options and their values."""
    values, words = list[str](), iter(arguments[1:])
    for word in words:
        if word.startswith("--"):
            if word not in (
                "--json",
                "--resume",
                "--decode",
                "--strict",
                "--no-test",
                "--no-coordinates",
            ):
                next(words, None)
        else:
            values.append(word)
    return values


def make_dataset(folder: Path) -> None:
    """Write a data set of NUM_PLACES places, with a query and a reference each, in three splits."""
    splits = (
        ["train"] * NUM_TRAIN + ["val"] * NUM_VAL + ["test"] * (NUM_PLACES - NUM_TRAIN - NUM_VAL)
    )
    number = np.arange(NUM_PLACES)
    tables = []
    for view, name in enumerate(("references", "queries")):
        for place in range(NUM_PLACES):
            source_trees.save_view(
                folder / f"images/{name}/{place}.jpg", place, view, (32, 64) if view else (32, 32)
            )
        columns = {
            "id": number,
            "place_id": number,
            "uri": [f"images/{name}/{n}.jpg" for n in number],
        }
        columns |= {"lat": 48 + number / 100, "lon": 2 + number / 100, "split": splits}
        if view:
            columns["heading_deg"] = np.zeros(NUM_PLACES, dtype=np.float32)
        tables.append(pa.table(columns))
    write_dataset(str(folder), tables[0], tables[1], name=folder.name)


def make_photos(folder: Path) -> None:
    """Photos and tiles with the CSV files that `s4g convert folder` reads."""
    for view, name in enumerate(("references", "queries")):
        lines = ["path,lat,lon,site"]
        for place in range(NUM_PLACES):
            source_trees.save_view(folder / f"{name}/{place}.jpg", place, view, (32, 32))
            lines.append(f"{name}/{place}.jpg,{48 + place / 100:.5f},{2 + place / 100:.5f},{place}")
        source_trees.write_lines(folder / f"{name}.csv", lines)


def make_run(folder: Path, root: Path) -> None:
    """A run's folder with the untrained checkpoint."""
    keys = [key for key in small_keys() if not key.startswith("data.uri")]
    if not (root / "data/stand_in").exists():
        make_dataset(root / "data/stand_in")
    config = load_config(
        root / "configs/mine.yaml", [*keys, f"run_dir={folder}", f"data.uri={root}/data/stand_in"]
    )
    run = RunFolder.open(config, open_dataset(config.data.uri), resume=False)
    run.start()
    save_checkpoint(run.checkpoint(0), Encoder.build(config.model), None, epoch=0, step=0)


def make_weights(path: Path, root: Path) -> None:
    """Write an export's folder, or weights in the published form (without model.json)."""
    folder = path.parent if path.suffix else path
    if folder == root:
        folder = root / "exported"
    if not (root / "runs/stand_in").exists():
        make_run(root / "runs/stand_in", root)
    export(str(root / "runs/stand_in"), str(folder))
    if path.parent == root:
        shutil.copy(folder / "model.pth", path)
