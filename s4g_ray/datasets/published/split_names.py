"""Read the options that name folders of an archive to train on and to test on."""

from __future__ import annotations

from s4g_ray.errors import InputError


def parse_splits(train: str, test: str, kind: str, kinds: str, example: str) -> dict[str, str]:
    """Return the split of each folder, from two lists of names that are joined by commas.

    kind, kinds: what a folder is, and several: the options are train_KINDS and test_KINDS. Raises
    InputError for a name that is listed twice, and without a name.
    """
    splits: dict[str, str] = {}
    for split, text in (("train", train), ("test", test)):
        for name in filter(None, (part.strip() for part in text.split(","))):
            if name in splits:
                raise InputError(f"{kind} {name!r} is listed twice; name each {kind} once")
            splits[name] = split
    if not splits:
        raise InputError(
            f"--train-{kinds} and --test-{kinds} name no {kind}; give some as {example}"
        )
    return splits
