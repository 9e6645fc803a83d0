"""Run `s4g serve` as a Ray job: `ray job submit ... -- python jobs/serve.py GALLERY ...`.

Takes the arguments of the command. The port is opened on the node of the job's driver.
"""

from __future__ import annotations

from s4g_ray.cli.console import run_command
from s4g_ray.cli.galleries.serve import serve

if __name__ == "__main__":
    run_command(serve)
