"""The documentation site: its pages, the links between them, and the Python interface."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

import s4g_ray
from tests.support.doc_commands import anchors, links

ROOT = Path(__file__).parents[2]
HOOK = runpy.run_path(str(ROOT / "docs/site_hook.py"))
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
# pages of the site by their source; api.md and packages.md are made from the code
SOURCES = {
    **{f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")},
    **HOOK["PAGES"],
}
MADE = {"api.md", "packages.md"}


def test_the_site_shows_every_page_once() -> None:
    shown = [page for entry in SITE["nav"] for page in entry.values()]
    assert len(shown) == len(set(shown))
    assert set(shown) == {*SOURCES.values(), *MADE}


def test_the_interface_shows_every_public_name_and_no_other() -> None:
    stub = (ROOT / "s4g_ray/__init__.pyi").read_text()
    names = HOOK["list_public_names"](stub)
    page = HOOK["write_api_page"](stub)
    public = set(dir(s4g_ray)) - {"datasets", "__version__"}
    assert {name for _, name in names} == public
    for module, name in names:
        assert page.count(f"::: {module}.{name}\n") == 1
        assert getattr(importlib.import_module(module), name) is getattr(s4g_ray, name)


@pytest.mark.parametrize("source", SOURCES)
def test_the_links_of_a_page_lead_to_pages_of_the_site(source: str, tmp_path: Path) -> None:
    text = HOOK["rewrite_links"]((ROOT / source).read_text(), Path(source).parent)
    page = tmp_path / "page.md"
    page.write_text(text)
    by_page = {name: ROOT / path for path, name in SOURCES.items()}
    packages = [path.parent.name for path in (ROOT / "s4g_ray").glob("*/__init__.py")]
    for target in links(page):
        name, _, anchor = target.partition("#")
        if name == "packages.md":
            assert anchor in packages
        elif name.endswith(".md") and name not in MADE:
            assert name in by_page, target
            assert not anchor or anchor in anchors(by_page[name]), target
        else:
            assert name in {"", *MADE} or (ROOT / "docs" / name).is_file(), target


@pytest.mark.parametrize(
    ("base", "text", "expected"),
    [
        ("docs", "[a](../README.md#own)", "[a](index.md#own)"),
        (".", "[docs/guide.md](docs/guide.md)", "[docs/guide.md](guide.md)"),
        (".", "[data](s4g_ray/data/__init__.py)", "[data](packages.md#data)"),
        ("cluster", "[the file](slurm.sh), [b](#here)", "the file, [b](#here)"),
        ("docs", "![loop](architecture.svg) [c](https://a.b/c)", None),
    ],
)
def test_a_link_is_rewritten_to_the_sites_page_or_becomes_its_text(
    base: str, text: str, expected: str | None
) -> None:
    assert HOOK["rewrite_links"](text, Path(base)) == (text if expected is None else expected)
