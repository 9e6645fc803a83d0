"""Run all benchmarks, or the named ones, each in its own process; then write docs/benchmarks.md.

python -m benchmarks [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.support import record as records

# in this order: the last uses the rates that the others measured
NAMES = (
    "neighbors",
    "mining",
    "mining_cells",
    "planning",
    "rank_memory",
    "evaluation",
    "dataset_scale",
    "service",
    "serving",
    "index_kinds",
    "embedding",
    "freed_memory",
    "precision",
    "micro_batches",
    "loading",
    "packing",
    "imagery",
    "gallery",
    "object_reads",
    "overlap",
    "scale",
    "replay",
    "faults",
    "locate",
    "refine",
    "published.comparison",
    "projection",
)


def main(names: list[str]) -> int:
    """Run benchmarks and continue after a failure. Returns the exit status: 1 if any failed."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False)
        if done.returncode:
            failed.append(name)
    records.main()
    if failed:
        print(f"failed: {', '.join(failed)}; their earlier results stay", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
