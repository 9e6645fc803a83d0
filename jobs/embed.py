"""Run `s4g embed` as a Ray job: `ray job submit ... -- python jobs/embed.py ...`.

Takes the arguments of the command.
"""

from __future__ import annotations

from s4g_ray.cli.console import run_command
from s4g_ray.cli.stages import embed

if __name__ == "__main__":
    run_command(embed)
