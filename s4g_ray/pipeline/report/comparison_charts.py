"""Draw curves of several runs in one chart: a color for each group, and its mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s4g_ray.pipeline.report.svg_charts import COLORS, make_axes, to_svg

STYLES = ("-", "--", ":", "-.")  # of lines, where there are more groups than colors


@dataclass(frozen=True)
class Line:
    """A curve of one run; the number of its group."""

    group: int
    x: list[float]
    y: list[float]


def color_of(group: int) -> str:
    """Return the color of a group."""
    return COLORS[group % len(COLORS)]


def draw_curves(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Draw curves: those of a group with several in pale, and their mean at the x that all have."""
    figure, axes = make_axes()
    for group in sorted({line.group for line in lines}):
        own = [line for line in lines if line.group == group and line.x]
        if not own:
            continue
        style = STYLES[group // len(COLORS) % len(STYLES)]
        if len(own) > 1:
            for line in own:
                axes.plot(line.x, line.y, style, color=color_of(group), linewidth=0.8, alpha=0.45)
        x, y = _mean(own)
        axes.plot(x, y, f"o{style}", color=color_of(group), markersize=3.5, linewidth=1.8)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(y=0.08)
    return to_svg(figure)


def _mean(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    """Return the mean of curves at the x that all of them have."""
    common = set(lines[0].x).intersection(*(line.x for line in lines[1:]))
    x = sorted(common)
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    return x, [float(np.mean([value[at] for value in values])) for at in x]
