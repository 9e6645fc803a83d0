"""All benchmarks, or those that are named, each in a process of its own; then docs/benchmarks.md.

python -m benchmarks [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.support import record as records

# in this order: the last reckons with what the others measured
NAMES = (
    "neighbors",
    "mining",
    "planning",
    "evaluation",
    "service",
    "index_kinds",
    "embedding",
    "precision",
    "micro_batches",
    "loading",
    "packing",
    "object_reads",
    "overlap",
    "faults",
    "projection",
)


def main(names: list[str]) -> int:
    """Run them all, even after one that fails; the exit status is 1 if any did."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    records.main()
    if failed:
        print(f"failed: {', '.join(failed)}; what they measured before stays", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
