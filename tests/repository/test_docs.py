"""The commands of README and docs/ are run, or listed with the reason and the check instead."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from s4g_ray.cli.app import app
from s4g_ray.config.loading import load_config, parse_config, valid_keys
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.pairs import PairTable
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.pipeline.prometheus import METRICS
from s4g_ray.sampling.geographic_neighbors import geographic_neighbors
from s4g_ray.sampling.sampler import plan_batches
from tests.support.doc_commands import PAGES, ROOT, Command, anchors, commands, links, quoted
from tests.support.doc_scene import TARGETS, Scene, positionals

LOCATE_GUIDE = "docs/locate.md"  # its commands are run by tests/runs/test_locate_guide.py
COMMANDS = [command for page in PAGES for command in commands(page)]


class NotRun(NamedTuple):
    """Commands (a pattern of all their text) that no test can run: why, and the check instead."""

    pattern: str
    why: str
    check: Callable[[Command], object]


def check_make(command: Command) -> None:
    """Its targets exist."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(command.words[1:]) <= targets, command


def check_form(command: Command) -> None:
    """The subcommand and its options exist."""
    group: Any = typer.main.get_command(app)
    words = iter(re.split(r"[\s|]+", command.text.replace("[", " ").replace("]", " ")))
    next(words)
    while hasattr(group, "commands"):
        word = next(words)
        if word == "NAME":
            return
        assert word in group.commands, command
        group = group.commands[word]
    known = {name for parameter in group.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, command


def check_ray(command: Command) -> None:
    """Ray's command line accepts it, its files exist; a submitted script accepts its arguments."""
    from ray.scripts.scripts import cli

    words = Command(command.page, command.line, command.text.partition(" | ")[0]).words[1:]
    own = words[words.index("--") + 1 :] if "--" in words else []
    ours = words[: words.index("--")] if own else words
    group: Any = cli
    while isinstance(group, click.Group):
        group, ours = group.commands[ours[0]], ours[1:]
    group.make_context(str(group.name), [*ours, *(["--", *own] if own else [])])
    for word in ours:
        assert not word.startswith("cluster/") or (ROOT / word).is_file(), (
            f"{command}: {word} is not there"
        )
    if own:
        check_job(Command(command.page, command.line, shlex.join(own)))


def check_job(command: Command) -> None:
    """A script of jobs/ that takes these arguments; a configuration that loads with them."""
    program, script, *arguments = command.words
    assert program == "python", command
    assert re.fullmatch(r"jobs/\w+\.py", script), command
    assert (ROOT / script).is_file(), f"{command}: {script} is not there"
    name = Path(script).stem
    if name == "train":
        at = arguments.index("--config")
        arguments = [arguments[at + 1], *arguments[:at], *arguments[at + 2 :]]
    check_s4g([name, *arguments])


def check_s4g(arguments: list[str]) -> None:
    """The command line accepts it, and its configuration loads; nothing is run."""
    group: Any = typer.main.get_command(app)
    words = arguments
    while hasattr(group, "commands"):
        group, words = group.commands[words[0]], words[1:]
    group.make_context(group.name, list(words))
    if arguments[0] == "train":
        config = re.sub(
            r"configs/(mine|paris)\.yaml", "configs/earth.yaml", arguments[1]
        )  # made from it
        load_config(ROOT / config, [word for word in words if "=" in word])


def check_training(command: Command) -> None:
    """The command line takes it, and its configuration loads."""
    check_s4g(command.words[1:])


def check_slurm(command: Command) -> None:
    """The script is there, and what follows it is what `s4g train` takes."""
    script, *arguments = [word for word in command.words[1:] if not word.startswith("--nodes=")]
    assert (ROOT / script).is_file(), command
    check_s4g(["train", *arguments])


def check_docker(command: Command) -> None:
    """It builds a target of cluster/Dockerfile."""
    words = command.words
    targets = re.findall(
        r"^FROM \S+ AS (\w+)", (ROOT / words[words.index("-f") + 1]).read_text(), re.MULTILINE
    )
    assert words[words.index("--target") + 1] in targets, command


def check_kubernetes(command: Command) -> None:
    """The manifests are there, and hold the names that are named."""
    words = re.split(r"[\s/|=]+", command.text.partition("kubectl")[2])
    held = "".join(path.read_text() for path in sorted((ROOT / "cluster/kuberay").glob("*.yaml")))
    for word in words:
        assert not word.startswith("s4g") or word.removesuffix("-head-svc") in held, (
            f"{command}: {word}"
        )
    for path in re.findall(r"cluster/[\w./-]+", command.text):
        assert (ROOT / path).is_file(), f"{command}: {path} is not there"


def check_shell(command: Command) -> None:
    """A shell takes it, and files of the repository that it names are there."""
    done = subprocess.run(
        ["bash", "-n", "-c", command.text], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    for path in re.findall(
        r"(?<![\w/.-])(?:cluster|configs|jobs|docs|tests|benchmarks)/[\w./-]+", command.text
    ):
        assert (ROOT / path).exists(), f"{command}: {path} is not there"


NOT_RUN = [
    NotRun(
        r"s4g .*(\[KEY=|\[--|NAME SOURCE|imagery SOURCE|build\|add|DATASET|CONFIG|GALLERY|RUN\b).*",
        "shows a form, not a command",
        check_form,
    ),
    NotRun(
        r"\.venv/bin/s4g train configs/vigor_same\.yaml",
        "takes 10 s more for the same code; those of configs/cvusa.yaml, paris.yaml and mine.yaml"
        " are run",
        check_training,
    ),
    NotRun(r"s4g train configs/mine\.yaml train\.use_gpu=true .*", "wants a GPU", check_training),
    NotRun(
        r"s4g train configs/mine\.yaml data\.images_root=.*",
        "wants images that were moved; tests/pipeline/test_driver.py moves some",
        check_training,
    ),
    NotRun(
        r"s4g convert (folder .* --from-exif|relocate|stretch) .*",
        "wants photos with positions, moved ones or some of 16 bits; tests/datasets/lists and"
        " tests/datasets/inspection make them",
        check_training,
    ),
    NotRun(
        r"s4g train configs/mine\.yaml ray\.metrics_port=8080",
        "its port may be taken here; without the port it is run, and"
        " tests/pipeline/test_prometheus.py scrapes a free one",
        check_training,
    ),
    NotRun(
        r"make (demo|check|test|lint|bench|wheel|docs)",
        "minutes each; CI runs lint and test, and a test builds the wheel",
        check_make,
    ),
    NotRun(
        r"pip install .*",
        "installs for minutes; tests/cli/setup/test_wheel.py installs the wheel alone",
        check_shell,
    ),
    NotRun(
        r"ray job submit .*",
        "wants a cluster; tests/test_jobs.py submits each script to a real one",
        check_ray,
    ),
    NotRun(
        r"ray job (logs|stop|status|list)\b.*",
        "wants a cluster; as in tests/test_jobs.py",
        check_ray,
    ),
    NotRun(
        r"ray (up|down|dashboard|attach|exec) .*",
        "wants machines; a test reads the files with Ray",
        check_ray,
    ),
    NotRun(
        r"ray start .*",
        "would leave a cluster here, on Ray's own ports; tests/ray_head.py starts one",
        check_ray,
    ),
    NotRun(r"ray get-auth-token .*kubectl.*|kubectl .*", "wants Kubernetes", check_kubernetes),
    NotRun(r"docker build .*", "wants Docker; a linter reads the file in a test", check_docker),
    NotRun(r"docker push .*|aws .*|ssh .*", "wants a registry, a bucket, a host", check_shell),
    NotRun(r"sbatch .*", "wants Slurm", check_slurm),
    NotRun(
        r"sudo \.venv/bin/python cluster/hosts\.py.*",
        "wants root; tests of the mark hosts run it",
        check_shell,
    ),
    NotRun(
        r"python -m benchmarks\.gpu_step --pairs 64",
        "takes minutes; tests/repository/test_benchmarks.py runs its parts on few images",
        check_shell,
    ),
    NotRun(
        r"prometheus .*|curl .*/metrics",
        "wants a server; a test reads a run's metrics",
        check_shell,
    ),
]


# run by a shell that has a home and a repository of its own
IN_SHELL = r"ray get-auth-token --generate|chmod .*|export .*|git archive .*"


def is_in_shell(command: Command) -> bool:
    return re.fullmatch(IN_SHELL, command.text) is not None


def is_run(command: Command) -> bool:
    return is_s4g(command) and command.page != LOCATE_GUIDE


def is_s4g(command: Command) -> bool:
    return command.program == "s4g" and not any(
        re.fullmatch(entry.pattern, command.text) for entry in NOT_RUN
    )


def test_each_command_is_run_or_listed_as_not_run() -> None:
    others = [c for c in COMMANDS if not is_s4g(c) and not is_in_shell(c)]
    unknown = [c for c in others if not any(re.fullmatch(e.pattern, c.text) for e in NOT_RUN)]
    assert not unknown, "run these in a test, or say in NOT_RUN why not:\n" + "\n".join(
        map(str, unknown)
    )
    assert len([command for command in COMMANDS if is_run(command)]) >= 20


@pytest.mark.parametrize("entry", NOT_RUN, ids=lambda entry: entry.pattern)
def test_what_is_not_run_is_documented_and_checked(entry: NotRun) -> None:
    listed = [command for command in COMMANDS if re.fullmatch(entry.pattern, command.text)]
    assert listed, f"no page holds such a command any more: {entry.pattern}"
    for command in listed:
        entry.check(command)


@pytest.mark.cluster
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(map(is_run, commands(p)))], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_pool: None
) -> None:
    scene = Scene(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in filter(is_run, commands(page)):
        arguments = scene.prepare(command)
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (
            f"{command}\nas {shlex.join(arguments)}\n{done.output}\n{done.exception!r}"
        )


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(map(is_in_shell, commands(p)))], ids=lambda page: page.stem
)
def test_the_shell_commands_of_a_page_make_a_token_that_is_asked_for_and_an_archive_of_the_code(
    page: Path, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    lines = [command.text for command in commands(page) if is_in_shell(command)]
    commit = "git -c user.name=A -c user.email=a@example.com commit -qm 'A commit'"
    script = "\n".join(
        ["set -e", "git init -q .", "git add jobs", commit, *lines, 'echo "mode $RAY_AUTH_MODE"']
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("mode token\n")
    token = tmp_path / ".ray/auth_token"
    assert token.stat().st_size >= 32
    if any(line.startswith("chmod") for line in lines):
        assert token.stat().st_mode & 0o777 == 0o600
    if any(line.startswith("git archive") for line in lines):
        assert "s4g-ray/jobs/train.py" in zipfile.ZipFile(tmp_path / "s4g-ray.zip").namelist()


def test_what_the_pages_have_users_make_in_the_repository_is_ignored_and_so_not_sent_to_a_cluster(
    tmp_path: Path,
) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    made = {"s4g-ray.zip", "weights.pth", "runs/mine"}
    for command in COMMANDS:
        words = command.words[1:]
        if is_run(command) and words[0] in TARGETS:
            made.add(positionals(words)[TARGETS[words[0]]])
    local = sorted(path for path in made if "://" not in path and not path.startswith("/"))
    assert {path.partition("/")[0] for path in local} >= {"data", "embeddings", "graphs", "models"}
    done = subprocess.run(
        ["git", "check-ignore", *local], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert sorted(done.stdout.split()) == local


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in links(page):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in anchors(path), f"{page}: {target}: no such heading"


def test_files_that_are_named_are_there() -> None:
    folders = ("s4g_ray", "jobs", "cluster", "benchmarks", "tests")
    names = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    for page in PAGES:
        text = page.read_text()
        for module in set(re.findall(r"(?<![\w/.{-])([a-z][a-z_0-9]*\.py)\b", text)):
            assert module in names, f"{page}: {module}"
        for name in quoted(page):
            if re.fullmatch(
                r"(s4g_ray|tests|docs|configs|jobs|cluster|benchmarks)/[\w./*-]*", name
            ):
                assert list(ROOT.glob(name.rstrip("/"))), f"{page}: {name}"


def test_keys_of_the_configuration_that_are_named_exist() -> None:
    keys = set(valid_keys(RunConfig))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    foreign = re.compile(r".*\.(py|md|json|jsonl|parquet|yaml|io|util|init|html|pt|sh)\b.*")
    for page in PAGES:
        text = page.read_text()
        marked = {
            *quoted(page),
            *re.findall(r"\*\*([\w., ]+)\*\*", text),
            *re.findall(r"\S+=\S*", text),
        }
        for phrase in marked:
            for key in re.findall(r"(?<![\w./-])([a-z]+\.[a-z_0-9]+)\b", phrase):
                if key.partition(".")[0] in sections and not foreign.fullmatch(key):
                    assert key in keys, f"{page}: {key}"


def test_the_configurations_that_are_shown_are_valid() -> None:
    shown = [
        part
        for page in PAGES
        for part in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert len(shown) >= 3
    for part in shown:
        tree = {"run_dir": "-", "data": {"uri": "-"}}
        parse_config({**tree, **yaml.safe_load(part)})


def test_the_guide_names_every_metric() -> None:
    named = set(re.findall(r"\bs4g_[a-z_]*[a-z]\b(?!/)", guide())) - {"s4g_ray"}
    assert named == set(METRICS)


def test_the_guides_table_of_hardness_is_what_plan_batches_gives() -> None:
    rng, places = np.random.default_rng(0), 20_000
    lat, lon = 48 + 0.3 * rng.random(places), 2 + 0.45 * rng.random(places)
    nearest, _ = geographic_neighbors(lat, lon, 256)
    ids = np.arange(places)
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        guide(),
        re.MULTILINE,
    )
    assert len(rows) == 6
    for row in rows:
        k, pool = int(row[0]), int(row[1])
        met = np.zeros((places, 64), dtype=bool)
        found = []
        for epoch in (1, 2):
            plan = plan_batches(
                PairTable(ids, ids, ids),
                NeighborGraph(ids, nearest[:, :pool]),
                batch_size=128,
                num_hard_negatives=k,
                neighbor_pool_size=pool,
                seed=0,
                epoch=epoch,
            )
            batch = np.full(places, -1)
            batch[plan.batches] = np.arange(len(plan.batches))[:, None]
            met |= (batch[nearest[:, :64]] == batch[:, None]) & (batch[:, None] >= 0)
            found += [plan.stats.hardness] if epoch == 1 else []
            found += [met.sum(axis=1).mean()]
        expected = [found[0], found[0] / k, found[1], found[2]]
        assert [float(value) for value in row[2:]] == pytest.approx(expected, abs=0.06), row


def guide() -> str:
    return (ROOT / "docs/guide.md").read_text()
