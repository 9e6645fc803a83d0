"""The dotted keys of a configuration: which are known, and which one is meant by one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel


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
