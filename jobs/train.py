"""Run `s4g train` as a Ray job.

Submit it with the configuration and the overrides:

    ray job submit ... -- python jobs/train.py --config configs/earth.yaml KEY=VALUE ...
"""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from s4g_ray.cli.app import AsJson, FromEpoch, Overrides, train_as_configured
from s4g_ray.cli.console import Steal, run_command


def train(
    config: Annotated[str, typer.Option(help="A YAML file in the working directory, or s3://...")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in run_dir, if there is one.")
    ] = False,
    from_epoch: FromEpoch = None,
    steal: Steal = False,
    as_json: AsJson = False,
) -> None:
    """Train, mine and evaluate with a configuration."""
    train_as_configured(
        config,
        overrides or [],
        resume=resume,
        from_epoch=from_epoch,
        steal=steal,
        as_json=as_json,
        again=describe_next(sys.argv),
    )


def describe_next(arguments: list[str]) -> str:
    """Return the command that resumes a run which these arguments of the job began.

    A branch that has begun is resumed without --from-epoch.
    """
    kept = ["python"]
    is_epoch = False  # the value of --from-epoch
    for argument in arguments:
        is_once = argument in ("--resume", "--steal") or argument.startswith("--from-epoch")
        if not is_once and not is_epoch:
            kept.append(argument)
        is_epoch = argument == "--from-epoch"
    return f"ray job submit ... -- {shlex.join([*kept, '--resume'])}"


if __name__ == "__main__":
    run_command(train)
