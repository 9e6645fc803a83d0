"""The rules of s4g_ray's packages, as CONTRIBUTING.md gives them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import package_rules as rules
from tests.support.package_rules import Source, read_sources

ROOT = Path(__file__).parents[2]
PACKAGES = read_sources(ROOT, "s4g_ray")
SHIPPED = read_sources(ROOT, "s4g_ray", "jobs")
EVERYTHING = read_sources(ROOT, "s4g_ray", "jobs", "benchmarks", "cluster", "tests")

# Packages by level, from the ground up. A package imports itself and packages of earlier levels.
LEVELS = (
    {"errors", "amounts", "arrays", "freed_memory", "progress"},
    {"row_lookup"},
    {"storage"},
    {"config"},
    {"data", "distributed"},
    {"datasets", "sampling", "encoder", "index", "mining", "evaluation"},
    {"training"},
    {"pipeline", "gallery"},
    {"serving"},
    {"cli"},
)
GROUND = LEVELS[0] | LEVELS[1]  # single files, which any package may import
# The packages that each package may import, beside itself and the ground.
IMPORTS = {
    "storage": set(),
    "config": {"storage"},
    "data": {"storage", "config"},
    "distributed": {"storage", "config"},
    "datasets": {"storage", "config", "data", "distributed"},
    "sampling": {"storage", "data"},
    "encoder": {"storage", "config", "data", "distributed"},
    "index": {"storage", "config", "data", "distributed"},
    "mining": {"storage", "config", "data"},
    "evaluation": {"storage", "config", "data"},
    "training": {"storage", "config", "data", "encoder"},
    "pipeline": {
        *("storage", "config", "data", "distributed"),
        *("sampling", "encoder", "index", "mining", "evaluation", "training"),
    },
    "gallery": {
        *("storage", "config", "data", "distributed"),
        *("encoder", "index", "evaluation"),
    },
    "serving": {"storage", "config", "data", "distributed", "gallery"},
    "cli": {
        *("storage", "config", "data", "distributed"),
        *("datasets", "encoder", "index", "evaluation", "pipeline", "gallery", "serving"),
    },
}
ALLOWED = {
    "errors": set(),
    "amounts": set(),
    "arrays": set(),
    "freed_memory": set(),
    "progress": set(),
    "row_lookup": {"errors", "arrays"},
    **{package: imports | GROUND for package, imports in IMPORTS.items()},
}
RAY = {
    "s4g_ray/datasets/imagery/cutting/block_tasks.py",
    "s4g_ray/distributed/actors.py",
    "s4g_ray/distributed/autoscaling.py",
    "s4g_ray/distributed/placement_gate.py",
    "s4g_ray/distributed/ray_output.py",
    "s4g_ray/distributed/session.py",
    "s4g_ray/distributed/worker_warnings.py",
    "s4g_ray/encoder/actors.py",
    "s4g_ray/encoder/embedding_job.py",
    "s4g_ray/index/shared/shared_index.py",
    "s4g_ray/index/sharded/build.py",
    "s4g_ray/index/sharded/client.py",
    "s4g_ray/index/sharded/planning.py",
    "s4g_ray/index/sharded/shard_group.py",
    "s4g_ray/mining/mining_job.py",
    "s4g_ray/mining/task_runner.py",
    "s4g_ray/pipeline/precision_choice.py",
    "s4g_ray/pipeline/prometheus.py",
    "s4g_ray/sampling/cell_tasks.py",
    "s4g_ray/serving/deployment.py",
    "s4g_ray/serving/server.py",
    "s4g_ray/training/trainer.py",
    "s4g_ray/training/worker.py",
    "s4g_ray/training/worker_group.py",
}


def test_each_package_imports_only_what_its_level_allows() -> None:
    assert rules.find_wrong_imports(PACKAGES, ALLOWED) == []


def test_what_is_allowed_runs_from_the_ground_up() -> None:
    level = {package: number for number, packages in enumerate(LEVELS) for package in packages}
    assert level.keys() == ALLOWED.keys()
    for package, imports in ALLOWED.items():
        assert all(level[imported] < level[package] for imported in imports), package


def test_every_package_has_a_level_and_every_level_a_package() -> None:
    assert {source.package for source in PACKAGES} - {""} == ALLOWED.keys()


def test_the_architecture_page_shows_these_levels_and_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| (\w+) \| [^|]+ \| ([\w, ]*) ?\|$", page, re.MULTILINE)
    shown = {package: set(re.findall(r"\w+", imports)) for _, package, imports in rows}
    assert shown == IMPORTS
    levels = [{package for level, package, _ in rows if level == number} for number in "12345678"]
    assert levels == list(LEVELS[2:])


def test_no_files_import_each_other_in_a_circle() -> None:
    assert rules.find_circle(PACKAGES) == []


def test_ray_is_imported_only_where_work_is_placed() -> None:
    assert rules.importers(SHIPPED, "ray") == RAY


def test_no_underscored_name_crosses_the_border_of_a_file() -> None:
    assert rules.find_private_names(EVERYTHING) == []


def test_an_init_holds_nothing_but_its_docstring() -> None:
    assert rules.find_wrong_inits(PACKAGES) == []


def test_a_folder_holds_at_most_12_modules() -> None:
    assert rules.find_full_folders(PACKAGES) == []


def test_files_functions_and_lines_are_short() -> None:
    assert rules.find_long_code(SHIPPED) == []


def test_everything_is_annotated() -> None:
    assert rules.find_missing_annotations(SHIPPED) == []


# The checks find what they are to find, in a made-up tree.

FILES = {
    "s4g_ray/__init__.py": '"""A."""\nimport lazy_loader\n',
    "s4g_ray/errors.py": "from s4g_ray.data import places\n",
    "s4g_ray/data/__init__.py": '"""A."""\nfrom s4g_ray.data import places\n',
    "s4g_ray/data/places.py": (
        "from s4g_ray.data.pairs import _private\n"
        "def f(self, a, *b: int, c: int = 0) -> int:\n"
        "    import ray.data\n"
        "    from s4g_ray.sampling import sampler\n"
        "    setattr(sampler, '_patched', 1)\n"
        "    return sampler._private\n"
    ),
    "s4g_ray/data/pairs.py": "from s4g_ray import __version__\nimport s4g_ray.data.places\n",
    "s4g_ray/data/images.py": "import s4g_ray\nfrom . import pairs\n",
    "s4g_ray/sampling/__init__.py": '"""A."""\n' + "\n" * 30,
    "s4g_ray/sampling/sampler.py": (
        f"x = '{'-' * 100}'\ny = 1  # {rules.SUPPRESSION}\nasync def g():\n" + "    pass\n" * 60
    ),
    "s4g_ray/other/__init__.py": "",
    "s4g_ray/other/long.py": "x = 1\n" * 401,
}


@pytest.fixture
def made_up(tmp_path: Path) -> list[Source]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_sources(tmp_path, "s4g_ray")


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (
            lambda sources: rules.find_wrong_imports(
                sources, {"errors": set(), "data": {"errors"}, "sampling": {"data"}}
            ),
            [
                "s4g_ray/data/images.py:2: a relative import",
                "s4g_ray/data/places.py:4: data imports sampling",
                "s4g_ray/errors.py:1: errors imports data",
                "s4g_ray/other/__init__.py: the package other has no level",
                "s4g_ray/other/long.py: the package other has no level",
            ],
        ),
        (
            lambda sources: sorted(set(rules.find_circle(sources))),
            ["s4g_ray.data.pairs", "s4g_ray.data.places"],
        ),
        (lambda sources: sorted(rules.importers(sources, "ray")), ["s4g_ray/data/places.py"]),
        (
            rules.find_private_names,
            [
                "s4g_ray/data/places.py:1: _private",
                "s4g_ray/data/places.py:5: sampler._patched",
                "s4g_ray/data/places.py:6: sampler._private",
            ],
        ),
        (
            rules.find_wrong_inits,
            [
                "s4g_ray/data/__init__.py: from s4g_ray.data import places",
                "s4g_ray/other/__init__.py: no docstring",
                "s4g_ray/sampling/__init__.py: more than 30 lines",
            ],
        ),
        (
            rules.find_long_code,
            [
                "s4g_ray/other/long.py: 401 lines",
                "s4g_ray/sampling/sampler.py:1: 106 columns",
                f"s4g_ray/sampling/sampler.py:2: {rules.SUPPRESSION}",
                "s4g_ray/sampling/sampler.py:3: g: 61 lines",
            ],
        ),
        (
            rules.find_missing_annotations,
            ["s4g_ray/data/places.py:2: f: a", "s4g_ray/sampling/sampler.py:3: g: return"],
        ),
    ],
)
def test_each_check_finds_each_breach(
    check: Callable[[list[Source]], list[str]], expected: list[str], made_up: list[Source]
) -> None:
    assert check(made_up) == expected


def test_a_folder_of_13_modules_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "s4g_ray" / "data"
    folder.mkdir(parents=True)
    for name in ("__init__", *"abcdefghijkl"):
        (folder / f"{name}.py").touch()
    assert rules.find_full_folders(read_sources(tmp_path, "s4g_ray")) == []
    (folder / "m.py").touch()
    assert rules.find_full_folders(read_sources(tmp_path, "s4g_ray")) == [
        "s4g_ray/data: 13 modules"
    ]
