"""Find and copy the configurations that come with the package."""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from s4g_ray.errors import InputError, WriteError

# in a checkout a link to its configs/, in an installed package a folder of its own
FOLDER = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class ShippedConfig:
    """A configuration of the package. summary: the first sentence of its file."""

    name: str
    path: Path
    summary: str

    def as_dict(self) -> dict[str, str]:
        """Return it as JSON."""
        return {"name": self.name, "path": str(self.path), "summary": self.summary}


def list_configs(folder: Path = FOLDER) -> list[ShippedConfig]:
    """Return the configurations of the package, by name."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        comments = itertools.takewhile(
            lambda line: line.startswith("# "), path.read_text().splitlines()
        )
        text = " ".join(line.removeprefix("# ").strip() for line in comments)
        found.append(ShippedConfig(path.stem, path, re.split(r"(?<=\.) ", text, maxsplit=1)[0]))
    return found


def find_config(name: str, folder: Path = FOLDER) -> ShippedConfig:
    """Return a configuration of the package by its name, with or without .yaml.

    Raises InputError for another name, with the nearest one.
    """
    known = {config.name: config for config in list_configs(folder)}
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    if wanted in known:
        return known[wanted]
    nearest = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    raise InputError(f"the package has no configuration {name!r}; {hint}")


def copy_config(name: str, target: str) -> Path:
    """Copy a configuration of the package to a new file, or into a folder; return its path.

    Raises InputError for a name that does not exist and for a file that does, WriteError where it
    cannot be written.
    """
    config = find_config(name)
    path = Path(target)
    if path.is_dir():
        path = path / f"{config.name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(config.path.read_text())
    except FileExistsError as error:
        raise InputError(f"{path} exists already; give another name, or remove it") from error
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def suggest_copy(path: str) -> str:
    """Return what to do about a configuration that is missing: empty where none has its name."""
    wanted = Path(path)
    if wanted.suffix == ".yaml" and any(one.name == wanted.stem for one in list_configs()):
        return f"; copy that of the package there: s4g configs {wanted.stem} {path}"
    return ""
