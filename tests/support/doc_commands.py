"""Parse the documentation: pages, their code, the commands in it, links and names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "cluster").glob("**/*.md"),
    ]
)
PROGRAMS = [
    "s4g",
    "make",
    "ray",
    "python",
    "pip",
    "pytest",
    "kubectl",
    "helm",
    "docker",
    "sbatch",
    "srun",
    "scancel",
    "squeue",
    "aws",
    "curl",
    "ssh",
    "scp",
    "git",
    "bash",
    "export",
    "sudo",
    "openssl",
    "prometheus",
    "mkdir",
    "chmod",
    "apt-get",
]
LANGUAGES = ("", "sh", "bash", "console", "shell")  # of fenced blocks that hold commands


@dataclass(frozen=True)
class Command:
    """A command of a page, without its comment; line counts from 1."""

    page: str
    line: int
    text: str

    @property
    def program(self) -> str:
        """Its program, without the folder."""
        return self.text.split()[0].rpartition("/")[2]

    @property
    def words(self) -> list[str]:
        """Its words, as a shell takes them; the program without its folder."""
        return [self.program, *shlex.split(self.text)[1:]]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    """Return the numbered lines of code blocks that are indented, or fenced as shell."""
    fence, block, blank = None, list[tuple[int, str]](), True
    for number, line in enumerate([*text.splitlines(), ""], 1):
        mark = re.match(r"\s*```(\w*)", line)
        indented = line.startswith("    ") and (blank or bool(block))
        if mark is not None:
            fence = mark[1] if fence is None else None
        if mark is None and line.strip() and (indented if fence is None else fence in LANGUAGES):
            block.append((number, line.strip()))
        elif block:
            yield block
            block = []
        blank = not line.strip()


def commands(page: Path) -> list[Command]:
    """Return the commands of a page, in order; a line that ends in a backslash continues.

    Raises ValueError for a block that holds commands and a program that PROGRAMS lacks.
    """
    name, found = str(page.relative_to(ROOT)), list[Command]()
    for block in blocks(page.read_text()):
        whole, lines = "", list[Command]()
        for number, line in block:
            whole = f"{whole} {line}".strip()
            if whole.endswith("\\"):
                whole = whole[:-1].rstrip()
                continue
            lines.append(Command(name, number, re.split(r"\s{2,}|\s#\s", whole, maxsplit=1)[0]))
            whole = ""
        known = [
            re.match(r"[\w./~-]+", c.text) is not None and c.program in PROGRAMS for c in lines
        ]
        if any(known) and not all(known):
            raise ValueError(
                f"{lines[known.index(False)]}: is this a command? Add its program to PROGRAMS"
            )
        found += lines if any(known) else []
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-") for heading in plain}


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures, but for those to the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in found if "://" not in target and not target.startswith("mailto:")]


def quoted(page: Path) -> set[str]:
    """What a page has between backticks, outside of blocks of code."""
    return set(
        re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    )
