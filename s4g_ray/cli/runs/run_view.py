"""Show the state of a run: a line about it, a table of its epochs, and plain lines."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from s4g_ray.amounts import count_noun, format_duration
from s4g_ray.cli.runs.run_state import EpochRow, RunState

NUM_NOTES = 3  # of failures


def make_table(state: RunState, most: int | None = None) -> Table:
    """Make a table of epochs, of the last `most` alone where it is given."""
    rows = [row for _, row in sorted(state.rows.items())]
    hidden = 0 if most is None else max(0, len(rows) - most)
    has_validation = any(row.val_recall is not None for row in rows)
    headings = ["epoch", "loss", "R@1", "hardness", "plan wait", "image wait", "pairs/s"]
    if has_validation:
        headings.insert(3, "val R@1")
    table = Table(*headings, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns:
        column.justify = "right"
        column.no_wrap = True
    for row in rows[hidden:]:
        cells = list(_cells(row))
        if has_validation:
            cells.insert(3, _percent(row.val_recall))
        table.add_row(*cells)
    if hidden:
        table.caption = Text(count_noun(hidden, "earlier epoch"))
        table.caption_justify = "left"
    return table


def describe_state(state: RunState, now: float) -> str:
    """Describe in a line where the run is, and how long it takes still."""
    parts = [f"epoch {state.last_epoch} of {state.num_epochs} done"]
    if state.step is not None:
        loss = "" if state.step.loss is None else f", loss {state.step.loss:.3f}"
        parts.append(f"step {state.step.step:,}{loss}")
    if state.workers is not None:
        parts.append(count_noun(state.workers, "worker"))
    left = state.seconds_left(now)
    if state.last_epoch >= state.num_epochs:
        parts.append("all epochs are trained")
    elif left is not None:
        parts.append(f"about {format_duration(left)} left")
    elif state.is_trained:
        parts.append("time left: known after the first epoch")
    return "  ".join(parts)


def list_notes(state: RunState) -> list[Text]:
    """Return the newest failures as lines."""
    return [Text(f"  {note}", style="yellow") for note in state.notes[-NUM_NOTES:]]


def describe_epochs(state: RunState) -> Iterator[str]:
    """Yield a plain line for each epoch."""
    for _, row in sorted(state.rows.items()):
        yield describe_epoch(row)


def describe_epoch(row: EpochRow) -> str:
    """Describe an epoch in a plain line."""
    names = ("loss", "R@1", "hardness", "plan wait", "image wait", "pairs/s")
    parts = [f"epoch {row.epoch:>3}"]
    parts += [f"{name} {cell}" for name, cell in zip(names, list(_cells(row))[1:], strict=True)]
    if row.val_recall is not None:
        parts.append(f"val R@1 {_percent(row.val_recall)}")
    return "  ".join(part for part in parts if not part.endswith(" -"))


def _cells(row: EpochRow) -> Iterator[str]:
    yield str(row.epoch)
    yield _number(row.loss, 3)
    yield _percent(row.recall)
    yield _number(row.hardness, 1)
    yield _percent(row.wait_share, 0)
    yield _percent(row.load_wait, 0)
    yield _number(row.pairs_per_s, 0)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"
