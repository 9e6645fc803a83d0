"""Measure building a gallery, adding a hundredth of it, removing that again, and opening it.

    python -m benchmarks.gallery [--count 100000]

Each is a command or a process of its own, as a user starts it: its time holds its imports and,
where it embeds many tiles, the start of Ray.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.locate import CONFIG, write_weights
from benchmarks.support.packed_tiles import with_absolute_uris, write_tiles
from benchmarks.support.record import Cell, record
from s4g_ray.data.dataset import GeoDataset, write_dataset
from s4g_ray.data.schema import SCHEMAS

ENCODER = "tf_efficientnet_lite0"
PIXELS = 64
ADDED = 0.01
OPENINGS = 5
OPEN = """
import sys, time
started = time.perf_counter()
from s4g_ray import open_gallery
imported = time.perf_counter()
gallery = open_gallery(sys.argv[1])
print(imported - started, time.perf_counter() - imported)
"""


def cut_part(tiles: GeoDataset, folder: Path, first: int, last: int) -> str:
    """Write the tiles of ids first..last - 1 as a data set of their own; return its URI."""
    table = tiles.references.to_table()
    ids = table["id"].to_numpy()
    table = table.filter(pa.array((ids >= first) & (ids < last)))
    table = with_absolute_uris(table, tiles.uri)
    empty = SCHEMAS["queries"].empty_table()
    return write_dataset(str(folder), table, empty, name=folder.name).uri


def run(*arguments: str) -> float:
    """Run an s4g command; return its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "s4g_ray.cli.app", "gallery", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


def measure_opening(gallery: str) -> tuple[float, float]:
    """Return the seconds of the imports, and of opening a gallery, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, gallery], capture_output=True, text=True, check=True
    )
    imports, opening = map(float, done.stdout.split())
    return imports, opening


def main() -> None:
    """Measure and record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    count = parser.parse_args().count
    num_added = round(count * ADDED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiles = write_tiles(folder / "tiles", count + num_added, PIXELS)
        base = cut_part(tiles, folder / "base", 0, count)
        more = cut_part(tiles, folder / "more", count, count + num_added)
        weights = str(folder / "weights.safetensors")
        write_weights(ENCODER, weights)
        gallery = str(folder / "gallery")
        sizes = [f"data.{view}_size=[{PIXELS},{PIXELS}]" for view in ("query", "reference")]
        overrides = [f"model.name={ENCODER}", *sizes]
        seconds = {"build": run("build", weights, base, gallery, "--config", CONFIG, *overrides)}
        opened = [measure_opening(gallery) for _ in range(OPENINGS)]
        seconds["add"] = run("add", gallery, more)
        ids = folder / "ids.txt"
        ids.write_text("\n".join(map(str, range(count, count + num_added))))
        seconds["remove"] = run("remove", gallery, "--ids", str(ids))
    imports, opening = np.median(opened, axis=0)
    rows: list[list[Cell]] = [
        ["s4g gallery build", count, f"{seconds['build']:.1f}", "100%"],
        ["s4g gallery add", num_added, *_relate(seconds, "add")],
        ["s4g gallery remove", num_added, *_relate(seconds, "remove")],
        ["open_gallery", count, f"{opening:.2f}", ""],
        ["the imports before it", "", f"{imports:.2f}", ""],
    ]
    record(
        "gallery",
        title="Building, changing and opening a gallery",
        text=(
            "seconds of whole commands, and of opening in a new process (the median of"
            f" {OPENINGS}). The larger the encoder, the smaller is the share of what adding costs"
            " beside embedding."
        ),
        command="python -m benchmarks.gallery",
        columns=["", "tiles", "seconds", "of building"],
        rows=rows,
        config={"encoder": ENCODER, "tiles": f"JPEG, {PIXELS} pixels", "D": 1280},
        order=94,
    )


def _relate(seconds: dict[str, float], name: str) -> tuple[str, str]:
    return f"{seconds[name]:.1f}", f"{seconds[name] / seconds['build']:.1%}"


if __name__ == "__main__":
    main()
