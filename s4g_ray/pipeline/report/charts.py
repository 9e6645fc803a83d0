"""Charts of one run: loss, recall and time, as SVG."""

from __future__ import annotations

from s4g_ray.pipeline.report.svg_charts import (
    BLUE,
    GREEN,
    INK,
    RED,
    SOFT,
    add_legend,
    make_axes,
    to_svg,
)
from s4g_ray.pipeline.run_folder import Record

RECALLS = (("recall@1", "R@1"), ("recall@5", "R@5"), ("recall@10", "R@10"), ("recall@1%", "R@1 %"))


def draw_loss_chart(records: list[Record]) -> str:
    """Draw the loss of the logged steps and of the epochs, with a line at each mining round."""
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    figure, axes = make_axes()
    x, y = _columns(steps, "step", "loss")
    axes.plot(x, y, color=BLUE, alpha=0.6, linewidth=1)
    if epochs:
        x, y = _columns(epochs, "step", "loss")
        axes.plot(x, y, "o-", color=BLUE, markersize=4, label="epoch")
    mined = {record["epoch"] for record in records if record["kind"] == "mining"}
    label: str | None = "mining"
    for record in epochs:
        if record["epoch"] in mined:
            axes.axvline(record["step"], color=SOFT, linewidth=0.8, linestyle=":", label=label)
            label = None  # once in the legend
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    add_legend(axes)
    return to_svg(figure)


def _columns(records: list[Record], *names: str) -> list[list[float]]:
    return [[record[name] for record in records] for name in names]


def draw_recall_chart(evaluations: list[Record]) -> str:
    """Draw recall@1, @5 and @10 of the evaluations."""
    figure, axes = make_axes()
    epochs = [record["epoch"] for record in evaluations]
    for (key, label), color in zip(RECALLS[:3], (RED, BLUE, GREEN), strict=True):
        percent = [100 * record[key] for record in evaluations]
        axes.plot(epochs, percent, "o-", color=color, markersize=4, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("recall, %")
    axes.set_ylim(bottom=0)
    add_legend(axes)
    return to_svg(figure)


def draw_time_chart(records: list[Record]) -> str:
    """Draw the seconds of each kind of work over the run, one bar each."""
    names = ("load", "step", "embed", "mine", "plan", "evaluate")
    timed = [record for record in records if record["kind"] in ("epoch", "round")]
    totals = [sum(record.get(f"{name}_s", 0.0) for record in timed) for name in names]
    figure, axes = make_axes(height=2.2)
    axes.grid(visible=False)
    bars = axes.barh(names, totals, color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{total:.1f} s" for total in totals], padding=4, color=INK)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return to_svg(figure)
