"""Read YAML and key=value overrides into RunConfig. Errors name unknown keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from s4g_ray.config.schema import RunConfig
from s4g_ray.config.shipped import suggest_copy
from s4g_ray.errors import InputError
from s4g_ray.storage import files
from s4g_ray.storage.store_errors import reraise_outage


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (a path or s3://...), apply overrides, and validate.

    Overrides have the form `key.subkey=value`, with a YAML value. Raises InputError for a missing
    file, malformed YAML, unknown keys (with the nearest valid one) and impossible values.
    """
    try:
        tree = yaml.safe_load(files.read_bytes(files.absolute(str(path))))
    except OSError as error:
        reraise_outage(error)
        remedy = suggest_copy(str(path)) if isinstance(error, FileNotFoundError) else ""
        raise InputError(
            f"cannot read the configuration {path}: {error.strerror or error}{remedy}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no `key: value` lines; give at least run_dir and data.uri")
    return _with_overrides(tree, overrides)


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return a configuration with overrides applied. Raises InputError as load_config does."""
    return _with_overrides(config.model_dump(mode="json"), overrides)


def _with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a nested mapping. Raises InputError with one line a fault."""
    known = set(valid_keys(RunConfig))
    faults = [
        describe_unknown_key(RunConfig, key)
        for key in leaf_keys(RunConfig, tree)
        if key not in known
    ]
    if faults:
        raise InputError("\n".join(faults))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(_describe(fault) for fault in error.errors())) from error


def dump_config(config: RunConfig) -> str:
    """Return the YAML text of a configuration. load_config reads it back to an equal one."""
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
        if node.get(part) is None:  # a missing or an empty section
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
    """Yield the dotted keys of a nested mapping.

    A mapping that is the value of a key, such as label_selector, counts as one key.
    """
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and not _holds_mapping(model, dotted):
            yield from leaf_keys(model, value, f"{dotted}.")
        else:
            yield dotted


def flatten_config(config: RunConfig, exclude: Set[str] = frozenset()) -> dict[str, Any]:
    """Return the values by dotted key, as JSON has them, without the sections in `exclude`."""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json", exclude=set(exclude)).items():
        if isinstance(value, dict):
            flat.update({f"{section}.{key}": item for key, item in value.items()})
        else:
            flat[section] = value
    return flat


def valid_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a model, including its sections."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from valid_keys(field.annotation, f"{prefix}{name}.")


def _holds_mapping(model: type[BaseModel], key: str) -> bool:
    """Return whether the value of a key is a mapping with keys of the user's choice."""
    section, _, name = key.rpartition(".")
    parent = model.model_fields.get(section)
    fields = getattr(parent and parent.annotation, "model_fields", {})
    return name in fields and get_origin(fields[name].annotation) is dict


def describe_unknown_key(model: type[BaseModel], key: str) -> str:
    """Return the message of an unknown key, with the nearest valid one."""
    nearest = _nearest_key(key, list(valid_keys(model)))
    return f"unknown key {key!r}; did you mean {nearest!r}?"


def _nearest_key(key: str, valid: Sequence[str]) -> str:
    """Return a valid key of the same last part, of a similar last part, or one similar as a whole.

    A similar last part counts only when no valid key is similar to the whole key.
    """
    leaf = _last_part(key)
    same_leaf = [name for name in valid if _last_part(name) == leaf]
    if same_leaf:
        return difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)[0]
    closest = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]
    if difflib.SequenceMatcher(None, key, closest).ratio() >= 0.8:
        return closest
    by_leaf = {_last_part(name): name for name in valid}
    close_leaf = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75)
    return by_leaf[close_leaf[0]] if close_leaf else closest


def _last_part(key: str) -> str:
    return key.rsplit(".", 1)[-1]
