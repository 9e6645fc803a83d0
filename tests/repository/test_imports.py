"""Processes import at their start only what they need: tasks, commands and loader processes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training.trainer import make_trainer
from s4g_ray.training.worker_group import GroupEvents
from tests.conftest import tiny_config

SLOW = ("torch", "torchvision", "timm", "safetensors", "matplotlib", "scipy.spatial")
# Ray processes that encode nothing: tasks that mine and plan, shards, and the mailbox. Ray imports
# an actor's class wherever one of its handles arrives: the gate's process imports encoder.actors,
# mining tasks index.sharded.shard, workers training.mailbox.
TASKS = (
    "training.mailbox",
    "index.sharded.shard",
    "index.sharded.client",
    "sampling.cell_tasks",
    "mining.task_runner",
    "mining.group_tasks",
    "mining.cells.cell_tasks",
    "encoder.actors",
    "encoder.embedding_job",
)
CONVERTERS = (
    *("cvusa", "cvact", "vigor", "university1652", "earth", "landsat", "folder"),
    *("published.sues200", "published.denseuav", "published.gta_uav"),
    *("published.uav_visloc", "published.cvcities"),
)


def faults(script: str, barred: tuple[str, ...], *arguments: str) -> list[str]:
    """Run a script that calls `step(name)` after each step; list who first loaded a barred module.

    An entry is "name of the step: module".
    """
    prelude = f"""
import importlib, json, sys
found, barred = [], {list(barred)!r}
def step(name):
    for module in [m for m in barred if m in sys.modules]:
        found.append(f"{{name}}: {{module}}")
        barred.remove(module)
"""
    code = prelude + script + "\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def imports(*modules: str) -> str:
    """A script that imports modules of s4g_ray, each a step."""
    lines = [
        f"for name in {list(modules)!r}:",
        "    importlib.import_module('s4g_ray.' + name)",
        "    step(name)",
        "",
    ]
    return "\n".join(lines)


def test_tasks_that_encode_nothing_start_without_torch_and_timm() -> None:
    assert faults(imports(*TASKS), SLOW) == []


@pytest.mark.parametrize(
    ("modules", "barred"),
    [
        pytest.param(
            ("data.pair_loader",),
            ("pyarrow", "pandas", "ray", "timm", "torchvision", "numba"),
            id="loader-process",
        ),
        pytest.param(
            ("training.trainer",), ("timm", "torchvision", "matplotlib"), id="ray-train-controller"
        ),
        pytest.param(("index.vector_index",), ("ray", "torch", "pyarrow"), id="vector-index"),
        pytest.param(
            ("gallery.locate", "gallery.query_encoder", "gallery.store.embedding"),
            ("ray",),
            id="locate",
        ),
        pytest.param(("cli.app",), ("ray", "torch", "numpy", "pydantic", "fsspec"), id="help"),
    ],
)
def test_processes_start_without_what_they_do_not_need(
    modules: tuple[str, ...], barred: tuple[str, ...]
) -> None:
    assert faults(imports(*modules), barred) == []


def test_check_and_convert_load_neither_torch_nor_ray(synthetic: GeoDataset) -> None:
    check = """
from typer.testing import CliRunner
from s4g_ray.cli.app import app
result = CliRunner().invoke(app, ["check", sys.argv[1], "--decode"])
assert result.exit_code == 0, result.output
step("check")
"""
    converters = [f"datasets.{name}" for name in CONVERTERS]
    assert (
        faults(imports("cli.convert", *converters) + check, ("torch", "timm", "ray"), synthetic.uri)
        == []
    )


def test_ray_trains_controller_gets_nothing_that_imports_timm(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "x")
    numerics = Numerics("bf16", channels_last=True)
    trainer: Any = make_trainer(config, numerics, GroupEvents(None), str(tmp_path))
    data = pickle.dumps(trainer.train_loop_config)
    assert b"s4g_ray.config" in data
    assert b"s4g_ray.encoder" not in data
    assert b"torch" not in data


def test_a_process_that_loads_what_is_barred_is_found() -> None:
    assert faults(imports("errors") + "import decimal\nstep('it')\n", ("torch", "decimal")) == [
        "it: decimal"
    ]
