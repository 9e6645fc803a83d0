"""Run `s4g mine` as a Ray job: `ray job submit ... -- python jobs/mine.py ...`.

Takes the arguments of the command.
"""

from __future__ import annotations

from s4g_ray.cli.console import run_command
from s4g_ray.cli.stages import mine

if __name__ == "__main__":
    run_command(mine)
