"""YAML and key=value overrides into RunConfig; unknown keys named."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from s4g_ray.storage.s3_retries import reraise_outage


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (a path or s3://...), apply `key.subkey=value` overrides (values are YAML) and validate.

    Raises InputError for a missing file, malformed YAML, unknown keys (naming the nearest valid one) and
    impossible values.
    """
    try:
        tree = yaml.safe_load(files.read_bytes(files.absolute(str(path))))
    except OSError as error:
        reraise_outage(error)
        raise InputError(
            f"cannot read the configuration {path}: {error.strerror or error}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no `key: value` lines")
    return _with_overrides(tree, overrides)


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A configuration with `key.subkey=value` overrides. Raises InputError as load_config does."""
    return _with_overrides(config.model_dump(mode="json"), overrides)


def _with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a nested mapping. Raises InputError with one line a fault."""
    faults = [
        describe_unknown_key(RunConfig, key)
        for key in leaf_keys(RunConfig, tree)
        if key not in set(valid_keys(RunConfig))
    ]
    if faults:
        raise InputError("\n".join(faults))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(_describe(fault) for fault in error.errors())) from error


def dump_config(config: RunConfig) -> str:
    """The YAML text of a configuration; load_config of it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise InputError(f"override {override!r} is not of the form key.subkey=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not valid YAML") from error
    node = tree
    for part in parts[:-1]:
        if node.get(part) is None:  # absent, or an empty section
            node[part] = {}
        child = node[part]
        if not isinstance(child, dict):
            raise InputError(describe_unknown_key(RunConfig, key))
        node = child
    node[parts[-1]] = value


def _describe(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{key}: this key is required"
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={fault['input']!r}: {message[0].lower()}{message[1:]}"


def leaf_keys(model: type[BaseModel], tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a nested mapping; a mapping that is a value of ours counts as one."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not _holds_mapping(model, f"{prefix}{key}"):
            yield from leaf_keys(model, value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def valid_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys that a model knows, sections among them."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from valid_keys(field.annotation, f"{prefix}{name}.")


def _holds_mapping(model: type[BaseModel], key: str) -> bool:
    """Whether the value of a key is a mapping with keys of the user's own."""
    section, _, name = key.rpartition(".")
    parent = model.model_fields.get(section)
    fields = getattr(parent and parent.annotation, "model_fields", {})
    return name in fields and get_origin(fields[name].annotation) is dict


def describe_unknown_key(model: type[BaseModel], key: str) -> str:
    """An unknown key, and the valid one that is nearest."""
    valid = list(valid_keys(model))
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in valid if name.rsplit(".", 1)[-1] == leaf]
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in valid}
    close_leaf = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
    if same_leaf:
        nearest = difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)[0]
    elif close_leaf and difflib.SequenceMatcher(None, key, close[0]).ratio() < 0.8:
        nearest = by_leaf[close_leaf[0]]
    else:
        nearest = close[0]
    return f"unknown key {key!r}; did you mean {nearest!r}?"
