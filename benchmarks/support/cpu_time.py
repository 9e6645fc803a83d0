"""Count the processor time of a process and of all that it started."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def count_cpu_s() -> float:
    """Return the seconds of processor time of this process and its descendants, ended ones too."""
    stats: dict[int, list[str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        stats[int(folder.name)] = fields
    ours = {os.getpid()}
    while True:
        more = {pid for pid, fields in stats.items() if int(fields[1]) in ours} - ours
        if not more:
            break
        ours |= more
    # user and system time, and both of children that have ended
    return sum(int(stats[pid][i]) for pid in ours for i in (11, 12, 13, 14)) / TICKS_PER_S
