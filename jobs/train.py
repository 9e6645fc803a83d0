"""Run `s4g train` as a Ray job.

Submit it with the configuration and the overrides:

    ray job submit ... -- python jobs/train.py --config configs/earth.yaml KEY=VALUE ...
"""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from s4g_ray.cli.app import AsJson, Overrides, train_as_configured
from s4g_ray.cli.console import run_command


def train(
    config: Annotated[str, typer.Option(help="A YAML file in the working directory, or s3://...")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in run_dir, if there is one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, mine and evaluate with a configuration."""
    arguments = [argument for argument in sys.argv if argument != "--resume"]
    again = f"ray job submit ... -- {shlex.join(['python', *arguments, '--resume'])}"
    train_as_configured(config, overrides or [], resume=resume, as_json=as_json, again=again)


if __name__ == "__main__":
    run_command(train)
