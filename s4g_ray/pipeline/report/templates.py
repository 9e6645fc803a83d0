"""Fill the templates of the pages, which lie beside this module."""

from __future__ import annotations

import importlib.resources
from typing import Any

import jinja2

from s4g_ray.data.sphere import format_metres


def render_page(name: str, **values: Any) -> bytes:
    """Fill a template with values; texts are escaped."""
    folder = importlib.resources.files("s4g_ray.pipeline.report")
    loader = jinja2.FunctionLoader(lambda file: folder.joinpath(file).read_text())
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(name).render(format_metres=format_metres, **values)
    return page.encode()
