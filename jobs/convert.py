"""Run `s4g convert` as a Ray job: `ray job submit ... -- python jobs/convert.py NAME ...`.

Takes the arguments of the command.
"""

from __future__ import annotations

from s4g_ray.cli.console import run_app
from s4g_ray.cli.convert import convert_app

if __name__ == "__main__":
    run_app(convert_app)
