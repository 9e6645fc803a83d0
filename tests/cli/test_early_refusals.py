"""A mistake that needs no large library is refused before one is imported."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from s4g_ray.config.loading import dump_config
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.storage.ownership.lease import owning
from tests.conftest import tiny_config

SLOW = ("torch", "timm", "ray", "faiss")
# of each case: arguments, environment -> what the message says
SCRIPT = """
import json, os, sys
from typer.testing import CliRunner
from s4g_ray.cli.app import app
before = dict(os.environ)
for arguments, variables in json.loads(sys.argv[1]):
    os.environ.update(variables)
    done = CliRunner().invoke(app, arguments)
    os.environ.clear()
    os.environ.update(before)
    loaded = [name for name in SLOW if name in sys.modules]
    print(json.dumps([f"{type(done.exception).__name__}: {done.exception}", loaded]))
"""
Case = tuple[list[str], dict[str, str], str]


@pytest.fixture
def cases(synthetic: GeoDataset, tmp_path: Path) -> dict[str, Case]:
    """Return the mistakes by name; the run folder `live` is to be held by this process."""
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(tiny_config(tmp_path / "run", synthetic.uri)))
    (tmp_path / "done").mkdir()
    for name in ("run.json", "result.json", "other.json"):
        (tmp_path / "done" / name).write_text("{}")
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{server.getsockname()[1]}"
    train = ["train", str(config)]
    evaluate = ["evaluate", str(weights), synthetic.uri, "--config", str(config)]
    embed = ["embed", str(weights), synthetic.uri, str(tmp_path / "table"), "--config", str(config)]
    mine = ["mine", str(tmp_path / "no-table"), str(tmp_path / "graph")]
    pack = ["pack", synthetic.uri, synthetic.uri]
    convert = ["convert", "cvusa", str(tmp_path / "none"), synthetic.uri]
    nowhere = str(tmp_path / "nowhere")
    long = {"TMPDIR": "/tmp/" + "x" * 90}
    unwritable = {"HOME": "/proc"}
    address = {"RAY_ADDRESS": silent}
    live = str(tmp_path / "live")
    done = str(tmp_path / "done")
    found: dict[str, Case] = {
        "train: data": ([*train, f"data.uri={nowhere}"], {}, "nowhere"),
        "train: weights": ([*train, f"model.pretrained={nowhere}.pth"], {}, "cannot read weights"),
        "train: live": ([*train, f"run_dir={live}"], {}, "is being written by process"),
        "train: done": ([*train, f"run_dir={done}"], {}, "holds a run already"),
        "evaluate: data": ([*evaluate[:2], nowhere, *evaluate[3:]], {}, "nowhere"),
        "evaluate: source": (["evaluate", nowhere, synthetic.uri], {}, "no run, no export and no"),
        "evaluate: weights": ([evaluate[0], f"{nowhere}.pth", *evaluate[2:]], {}, "cannot read w"),
        "evaluate: live": ([*evaluate, "--out", live], {}, "is being written by process"),
        "evaluate: done": ([*evaluate, "--out", done], {}, "holds a finished evaluation"),
        "embed: data": ([*embed[:2], nowhere, *embed[3:]], {}, "nowhere"),
        "embed: live": ([*embed[:3], live, *embed[4:]], {}, "is being written by process"),
        "mine: table": (mine, {}, "holds no published embedding table"),
        "pack: data": (["pack", nowhere, str(tmp_path / "packed")], {}, "nowhere"),
        "pack: target": (pack, {}, "is inside the data set to be packed"),
        "convert: target": (convert, {}, "holds a data set already"),
    }
    for name, command in {
        "train": train,
        "evaluate": evaluate,
        "embed": embed,
        "mine": mine,
    }.items():
        found[f"{name}: TMPDIR"] = (command, long, "TMPDIR=/tmp/x+ is too long")
        found[f"{name}: HOME"] = (command, unwritable, "HOME=/proc cannot be written")
        overrides = [] if name == "mine" else ["ray.start_timeout_s=1"]
        found[f"{name}: address"] = ([*command, *overrides], address, "no Ray cluster answers at")
    return found


def test_a_mistake_is_refused_before_torch_ray_and_faiss_are_imported(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    given = json.dumps([[arguments, variables] for arguments, variables, _ in cases.values()])
    drop = ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
    variables = {name: value for name, value in os.environ.items() if name not in drop}
    with owning(str(tmp_path / "live")):
        done = subprocess.run(
            [sys.executable, "-c", f"SLOW = {SLOW}\n{SCRIPT}", given],
            capture_output=True,
            text=True,
            check=False,
            env=variables,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    found = map(json.loads, done.stdout.splitlines())
    for name, (said, loaded) in zip(cases, found, strict=True):
        assert re.match(f"InputError: .*{cases[name][2]}", said), f"{name}: {said}"
        assert loaded == [], f"{name} loads {loaded}"
        assert "\n" not in said
    assert not (tmp_path / "run").exists()
