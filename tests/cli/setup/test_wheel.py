"""The wheel works without the repository: it brings the configurations and all other files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import s4g_ray
from s4g_ray.data.dataset import GeoDataset
from tests.support.json_fields import documented

ROOT = Path(__file__).parents[3]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, whose links stay links."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("s4g_ray", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source / name)
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """Install it into a folder of its own; what it requires is that of this environment."""
    target = wheel.parent / "site"
    pip("install", str(wheel), "--target", str(target))
    return target


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def s4g(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command where no repository is on the path."""
    return subprocess.run(
        [sys.executable, str(site / "bin/s4g"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_every_file_of_the_package_and_every_configuration(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("s4g_ray/")}
    listed = subprocess.run(
        ["git", "ls-files", "s4g_ray"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = set(listed.stdout.split()) - {"s4g_ray/configs"}
    expected |= {f"s4g_ray/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert held >= expected, sorted(expected - held)


def test_the_installed_command_finds_its_configurations_and_checks_a_data_set(
    site: Path, tmp_path: Path, synthetic: GeoDataset
) -> None:
    done = s4g(site, tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"s4g {s4g_ray.__version__}\n")

    done = s4g(site, tmp_path, "configs", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    listed = value["configs"]
    fields = documented("s4g configs")
    assert (value.keys(), listed[0].keys()) == (fields.own, fields.nested - {"text"})
    assert [one["name"] for one in listed] == sorted(
        path.stem for path in (ROOT / "configs").glob("*.yaml")
    )
    for one in listed:
        assert Path(one["path"]).is_relative_to(site)

    done = s4g(site, tmp_path, "configs", "earth", "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.yaml").read_text() == (ROOT / "configs/earth.yaml").read_text()

    done = s4g(site, tmp_path, "check", synthetic.uri, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
