"""The list of extras is that of pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from s4g_ray.cli.setup.libraries import EXTRAS

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED: dict[str, list[str]] = PROJECT["optional-dependencies"]
NOT_FOR_USERS = {"docs", "dev"}
OF_FAISS = {"cpu", "gpu"}  # s4g doctor shows which is there


def distributions_of(extra: str) -> set[str]:
    """The names of the distributions that an extra asks for, with those of their own extras."""
    found = set()
    for line in DECLARED[extra]:
        wanted = Requirement(line)
        found.add(wanted.name)
        for own in wanted.extras:
            for further in map(Requirement, importlib.metadata.requires(wanted.name) or []):
                if further.marker is not None and further.marker.evaluate({"extra": own}):
                    found.add(further.name)
    return found


def test_doctor_knows_every_extra() -> None:
    assert EXTRAS.keys() == DECLARED.keys() - NOT_FOR_USERS - OF_FAISS


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_modules_of_an_extra_are_those_that_it_installs(extra: str) -> None:
    installed = importlib.metadata.packages_distributions()
    names = distributions_of(extra)
    for module in EXTRAS[extra][1]:
        of_module = set(installed.get(module.partition(".")[0], []))
        normal = {re.sub(r"[-_.]+", "-", name) for name in of_module}
        assert not of_module or normal & names, f"{module} is of {of_module}, not of {names}"


@pytest.mark.parametrize("extra", ["imagery", "locate", "serve"])
def test_the_demo_has_what_its_parts_need(extra: str) -> None:
    assert set(DECLARED[extra]) <= set(DECLARED["demo"])


def test_messages_name_extras_that_exist() -> None:
    texts = [path.read_text() for path in (ROOT / "s4g_ray").rglob("*.py")]
    texts.extend(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = {
        name
        for text in texts
        for group in re.findall(r"s4g-ray\[([a-z,]+)\]", text)
        for name in group.split(",")
    }
    assert named
    assert named <= DECLARED.keys()
