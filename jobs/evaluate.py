"""Run `s4g evaluate` as a Ray job: `ray job submit ... -- python jobs/evaluate.py ...`.

Takes the arguments of the command.
"""

from __future__ import annotations

from s4g_ray.cli.app import evaluate
from s4g_ray.cli.console import run_command

if __name__ == "__main__":
    run_command(evaluate)
