"""Make axes for the charts of a page, and turn them into SVG that follows its light or dark colors.

Charts are drawn in stand-in colors, which the SVG replaces by those of the page.
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# stand-ins, and what the page puts in their place
INK = "#010203"
GRID = "#040506"
SOFT = "#070809"
_PAGE_COLORS = {INK: "currentColor", GRID: "var(--line)", SOFT: "var(--soft)"}
BLUE = "#3b82f6"
GREEN = "#16a34a"
RED = "#ef4444"
# of lines side by side: distinct for readers who see few colors, on white and on black
COLORS = (BLUE, "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#06b6d4", "#84cc16", "#ec4899")


def make_axes(width: float = 6.2, height: float = 3.0) -> tuple[Figure, Any]:
    """Make a figure of one chart, in inches, in the stand-in colors."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def add_legend(axes: Any, **options: Any) -> None:
    """Add a legend without a frame, where a line has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK, **options)


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element of a page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None}
    )
    text = buffer.getvalue()
    for stand_in, color in _PAGE_COLORS.items():
        text = text.replace(stand_in, color)
    return text[text.index("<svg") :]
