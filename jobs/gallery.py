"""Run `s4g gallery` as a Ray job: `ray job submit ... -- python jobs/gallery.py build ...`.

Takes the arguments of the command.
"""

from __future__ import annotations

from s4g_ray.cli.console import run_app
from s4g_ray.cli.galleries.gallery import gallery_app

if __name__ == "__main__":
    run_app(gallery_app)
