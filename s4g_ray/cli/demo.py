"""Run `s4g demo`: from one Landsat scene to a trained model, a gallery, and located photos."""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.config.shipped import find_config
from s4g_ray.data.sphere import format_metres, metres_between
from s4g_ray.gallery.answer import Answer
from s4g_ray.pipeline.run_folder import Record, RunResult
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from s4g_ray.storage.ownership.lease import owning

if TYPE_CHECKING:
    from s4g_ray.gallery.gallery import Gallery

# tiles of further sizes are trained: those of one size alone are learned by heart
CUT: dict[str, Any] = {"train_sizes_m": (1360.0, 2700.0), "queries_per_tile": 6}


@dataclass(frozen=True)
class Located:
    """A photo that was located, or was not, and its true position."""

    uri: str
    answer: Answer
    lat: float
    lon: float

    @property
    def error_m(self) -> float | None:
        """Return the metres from the answer to the truth; None without an answer."""
        if not self.answer.is_located or self.answer.lat is None or self.answer.lon is None:
            return None
        return float(metres_between(self.answer.lat, self.answer.lon, self.lat, self.lon))

    def describe(self) -> str:
        """Describe it in a line."""
        name = self.uri.rsplit("/", 1)[-1]
        answer = self.answer
        if self.error_m is None:
            return f"  {name}: no answer: {answer.reason}"
        radius = ""
        if answer.radius_90_m is not None:
            radius = f", 90 % within {format_metres(answer.radius_90_m)}"
        away = f"the truth is {format_metres(self.error_m)} away"
        return f"  {name}: {answer.lat:.4f}, {answer.lon:.4f}{radius}; {away}"

    def to_json(self) -> dict[str, Any]:
        """Return the answer and its error as JSON."""
        return {**self.answer.to_json(), "error_m": self.error_m}


@dataclass(frozen=True)
class DemoResult:
    """The run, and what was made of it: empty where the run was stopped before its end."""

    run: RunResult
    located: tuple[Located, ...] = ()
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Demo:
    """The demo's configuration. again: the command that resumes it."""

    config: RunConfig
    is_resumed: bool
    again: str

    @classmethod
    def from_overrides(cls, overrides: list[str]) -> Demo:
        """Load the configuration: in a new run folder, or in that of `run_dir=`, which it resumes.

        Raises InputError when a library is missing.
        """
        from s4g_ray.datasets.imagery.libraries import check_libraries

        check_libraries()
        config = load_config(find_config("landsat").path, overrides)
        if any(override.startswith("run_dir=") for override in overrides):
            is_resumed = files.exists(files.join(config.run_dir, "run.json"))
            again = overrides
        else:
            is_resumed = False
            config = config.model_copy(update={"run_dir": _find_free_folder(config.run_dir)})
            again = [*overrides, f"run_dir={config.run_dir}"]
        return cls(config, is_resumed, shlex.join([_program(), "demo", *again]))

    def run(self, reporter: Reporter) -> DemoResult:
        """Cut the data set where it is missing, train, build a gallery, and locate photos.

        What an earlier call has made is kept.
        """
        from s4g_ray.cli.runs.live import follow_run
        from s4g_ray.gallery.gallery import open_gallery
        from s4g_ray.pipeline.run import run

        uri = self.config.data.uri
        self._convert(uri, reporter)
        with follow_run(reporter, self.config, resume=self.is_resumed) as followed:
            result = run(self.config, resume=self.is_resumed, **followed)
        if not result.finished:
            reporter.line(f"resume with: {self.again}")
            return DemoResult(result)
        gallery_uri = self._build_gallery(reporter)
        with open_gallery(gallery_uri) as gallery:
            located = tuple(_locate_photos(gallery, uri, reporter))
            pictures = self._draw(gallery, located)
        paths = [files.join(self.config.run_dir, "report.html"), *pictures]
        reporter.line("")
        reporter.console.print(make_results_table(result.records))
        reporter.line("\n".join(f"  {path}" for path in [*paths, gallery_uri]))
        reporter.line(f"open the page: {shlex.join([_program(), 'serve', gallery_uri])}")
        return DemoResult(result, located, tuple(paths))

    def _build_gallery(self, reporter: Reporter) -> str:
        """Export the model, build a gallery of all tiles of the scene, and calibrate it."""
        from s4g_ray.datasets import landsat
        from s4g_ray.encoder.export import export
        from s4g_ray.encoder.source import DESCRIPTION
        from s4g_ray.gallery.build import build_gallery
        from s4g_ray.gallery.fitting.calibrate import CalibrationOptions, calibrate

        model = files.join(self.config.run_dir, "model")
        gallery = files.join(self.config.run_dir, "gallery")
        if not files.exists(files.join(model, DESCRIPTION)):
            files.remove(model)  # what an interrupted call left
            export(self.config.run_dir, model)
        region = files.join(self.config.data.uri, landsat.REGION)
        build_gallery(model, region, gallery, attribution=landsat.ATTRIBUTION, reporter=reporter)
        options = CalibrationOptions(splits=(self.config.data.test_split,))
        found = calibrate(
            gallery, self.config.data.uri, options=options, reporter=reporter
        ).assessment
        text = f"calibrated; of {found.num_inside:,} other queries {found.share_located:.0%} get an"
        text += " answer"
        if found.coverage_90 is not None and found.median_radius_90_m is not None:
            text += (
                f", {found.coverage_90:.0%} lie within their circle of 90 %, whose median radius is"
                f" {format_metres(found.median_radius_90_m)}"
            )
        reporter.line(text)
        return gallery

    def _convert(self, uri: str, reporter: Reporter) -> None:
        """Cut the data set where it is missing."""
        header = files.join(uri, "dataset.json")
        if files.exists(header):
            return
        with owning(files.absolute(uri), reporter, interrupts=True):
            if not files.exists(header):  # another call may have cut it meanwhile
                convert_landsat("localtileserver", uri, reporter, **CUT)

    def _draw(self, gallery: Gallery, located: tuple[Located, ...]) -> list[str]:
        """Draw the first photo that has an answer, and return the picture's path."""
        from s4g_ray.cli.galleries.locate_picture import draw_answer
        from s4g_ray.datasets.landsat import ATTRIBUTION
        from s4g_ray.gallery.photos.photo import read_photo

        for one in located:
            photo = read_photo(one.uri).pixels
            if one.error_m is not None and photo is not None:
                truth = (one.lat, one.lon)
                picture = draw_answer(gallery, photo, one.answer, truth, attribution=ATTRIBUTION)
                path = files.join(self.config.run_dir, "located.png")
                files.write_bytes(path, picture)
                return [path]
        return []


def convert_landsat(source: str, target: str, reporter: Reporter, **options: Any) -> None:
    """Cut the data set and report the number of its places."""
    from s4g_ray.datasets import landsat

    with reporter.stage("cutting tiles and queries") as update:
        dataset = landsat.convert(source, target, on_progress=update, **options)
    counts = {split: len(dataset.table("references", [split])) for split in ("train", "test")}
    reporter.line(f"cut {counts['train']} train and {counts['test']} test tiles into {dataset.uri}")


def make_results_table(records: list[Record]) -> Table:
    """Make a table of recall and distance, a row for each evaluation."""
    from s4g_ray.pipeline.report.page import result_rows

    table = Table(title="held-out region")
    table.add_column("")
    for heading in ("R@1", "R@5", "R@10", "median error"):
        table.add_column(heading, justify="right")
    for name, row in result_rows(records):
        recalls = [f"{row[f'recall@{k}']:.1%}" for k in (1, 5, 10)]
        table.add_row(name, *recalls, format_metres(row["median_error_m"]))
    return table


def _locate_photos(gallery: Gallery, data_uri: str, reporter: Reporter) -> Iterator[Located]:
    """Locate the photos that no split holds; report each in a line."""
    from s4g_ray.datasets.landsat import PHOTOS
    from s4g_ray.gallery.photos.photo import read_photo

    folder = files.join(data_uri, PHOTOS)
    text = files.read_bytes(files.join(folder, "positions.csv")).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    uris = [files.join(folder, row["path"]) for row in rows]
    answers = gallery.locate([read_photo(uri) for uri in uris])
    reporter.line(f"{len(rows)} further photos of the held-out region:")
    for uri, row, answer in zip(uris, rows, answers, strict=True):
        located = Located(uri, answer, float(row["lat"]), float(row["lon"]))
        reporter.line(located.describe())
        yield located


def _find_free_folder(folder: str) -> str:
    """Return the folder, or the first of folder-2, folder-3, ... that does not exist."""
    candidate = folder
    number = 1
    while files.exists(candidate):
        number += 1
        candidate = f"{folder}-{number}"
    return candidate


def _program() -> str:
    """Return the command as it was called, such as .venv/bin/s4g."""
    return sys.argv[0] if Path(sys.argv[0]).name == "s4g" else "s4g"
