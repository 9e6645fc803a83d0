"""write_comparison: one page about several runs: curves, results, and what differs in them.

Runs that differ in the seed alone form a group: its mean, its standard error, and its differences
to the first group, paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s4g_ray.amounts import count_noun
from s4g_ray.config.loading import flatten_config
from s4g_ray.errors import InputError
from s4g_ray.pipeline.report.comparison_charts import Line, color_of, draw_curves
from s4g_ray.pipeline.report.examples import shorten_middle
from s4g_ray.pipeline.report.page import EvaluatedRun
from s4g_ray.pipeline.report.templates import render_page
from s4g_ray.pipeline.run_folder import FREE_ON_RESUME, Record
from s4g_ray.storage import files

RESULTS = {
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "recall@1%": "R@1 %",
    "hit_rate": "hit rate",
    "median_error_m": "median error",
}
PAIRED = ("recall@1", "recall@10")  # whose differences between groups are shown
UNTOLD = {"run_dir", "loggers", "data.uri"}  # keys that tell runs apart, but no results
SEED = "seed"
# keys that may change within a run, and change what it learns
OF_RESULTS = {
    "mining.index_kind",
    "mining.nprobe",
    "mining.ef_search",
    "mining.when_late",
    "mining.max_staleness_epochs",
    "sampling.max_pairs_per_cell",
}
DATASET = "data set"  # stands among the keys where runs were made on different ones
LONGEST_LABEL = 60


@dataclass(frozen=True)
class ComparedRun:
    """A run with the name that tells it from the others."""

    name: str
    run: EvaluatedRun
    values: Mapping[str, Any]  # of all keys, flat

    @property
    def last(self) -> Record:
        """The last evaluation."""
        return self.run.of_kind("evaluation")[-1]

    def results(self) -> dict[str, float]:
        """Return the metrics of the last evaluation that the page shows."""
        return {key: self.last[key] for key in RESULTS if self.last.get(key) is not None}

    def curve(self, kind: str, key: str, x: str) -> tuple[list[float], list[float]]:
        """Return a curve of records; x: step or epoch. Leaves out what is not finite."""
        steps = {record["epoch"]: record["step"] for record in self.run.of_kind("epoch")}
        steps[0] = 0
        points = []
        for record in self.run.of_kind(kind):
            at = record["epoch"] if x == "epoch" else steps.get(record["epoch"])
            if at is not None and record.get(key) is not None:
                points.append((float(at), float(record[key])))
        return [at for at, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seeds alone; a group may be a single run.

    Of a seed with several runs (with other workers, or made twice) their mean counts once.
    """

    label: str
    runs: list[ComparedRun]

    def mean(self, key: str) -> tuple[float, float] | None:
        """Return the mean of a result and its standard error, NaN for one seed; None if unknown."""
        if any(key not in run.results() for run in self.runs):
            return None
        return _mean_and_error(list(_by_seed(self.runs, key).values()))

    def difference(self, other: RunGroup, key: str) -> tuple[float, float, int] | None:
        """Return the mean of this group's values less another's, paired by seed; its error; count.

        None for fewer than two seeds in common.
        """
        own = _by_seed(self.runs, key)
        others = _by_seed(other.runs, key)
        seeds = sorted(own.keys() & others.keys())
        if len(seeds) < 2:
            return None
        mean, error = _mean_and_error([own[seed] - others[seed] for seed in seeds])
        return mean, error, len(seeds)


def _by_seed(runs: Sequence[ComparedRun], key: str) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for run in runs:
        if key in run.results():
            values.setdefault(run.values[SEED], []).append(run.results()[key])
    return {seed: float(np.mean(of_seed)) for seed, of_seed in values.items()}


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return float(values[0]), math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


@dataclass(frozen=True)
class Comparison:
    """Several runs, the keys in which they differ, and their groups."""

    runs: list[ComparedRun]
    differing: list[str]
    groups: list[RunGroup]

    @classmethod
    def read(cls, run_dirs: Sequence[str]) -> Comparison:
        """Read runs. Raises InputError for one that is not evaluated, or that is given twice."""
        found = [EvaluatedRun.read(run_dir) for run_dir in run_dirs]
        uris = [run.uri.rstrip("/") for run in found]
        for uri in uris:
            if uris.count(uri) > 1:
                raise InputError(f"{uri} is given {uris.count(uri)} times; give each run once")
        values = [_read_values(run) for run in found]
        names = name_apart(uris)
        runs = [ComparedRun(*each) for each in zip(names, found, values, strict=True)]
        keys = list(dict.fromkeys(key for one in values for key in one))
        differing = [key for key in keys if len({repr(one.get(key)) for one in values}) > 1]
        return cls(runs, differing, _group(runs, differing))

    @property
    def has_seeds(self) -> bool:
        """Whether any group has several runs."""
        return len(self.groups) < len(self.runs)

    def warnings(self) -> list[str]:
        """Return reasons why results of the runs cannot be compared."""
        found = []
        if len({run.run.info["dataset"]["fingerprint"] for run in self.runs}) > 1:
            found.append("These runs were made on different data sets.")
        differing = [
            key
            for key in ("queries", "references", "protocol")
            if len({run.last.get(key) for run in self.runs}) > 1
        ]
        if differing:
            found.append(f"Their last evaluations differ in {', '.join(differing)}.")
        for group in self.groups:
            num_seeds = len({run.values[SEED] for run in group.runs})
            if num_seeds < len(group.runs):
                found.append(
                    f"{group.label}: {len(group.runs)} runs have {count_noun(num_seeds, 'seed')};"
                    " of a seed's runs the mean counts."
                )
        if len({run.last["epoch"] for run in self.runs}) > 1:
            found.append("Their last evaluations are of different epochs.")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        runs = []
        for run in self.runs:
            x, y = run.curve("evaluation", "recall@1", "step")
            values = {key: run.values.get(key) for key in self.differing}
            evaluated = {"epoch": run.last["epoch"], **run.results()}
            curve = {"step": x, "recall@1": y}
            runs.append(
                {
                    "name": run.name,
                    "run_dir": run.run.uri,
                    "differing": values,
                    "results": evaluated,
                    "curve": curve,
                }
            )
        groups = []
        for group in self.groups:
            means = {key: group.mean(key) for key in RESULTS}
            shown = {key: _finite(mean) for key, mean in means.items() if mean is not None}
            groups.append(
                {
                    "label": group.label,
                    "runs": [run.name for run in group.runs],
                    "mean_and_standard_error": shown,
                }
            )
        return {
            "differing": self.differing,
            "runs": runs,
            "groups": groups,
            "warnings": self.warnings(),
        }


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _read_values(run: EvaluatedRun) -> dict[str, Any]:
    values = {k: v for k, v in flatten_config(run.config).items() if k not in UNTOLD}
    dataset = run.info["dataset"]
    values[DATASET] = f"{dataset['name']} ({dataset['fingerprint'][:8]})"
    return values


def name_apart(uris: Sequence[str]) -> list[str]:
    """Name folders by the fewest last parts of their paths that tell them apart."""
    parts = [uri.split("/") for uri in uris]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return list(uris)


def _group(runs: Sequence[ComparedRun], differing: Sequence[str]) -> list[RunGroup]:
    """Group runs that differ in the seed alone, in the order of their first runs.

    Values of how and where a run computes may differ, too.
    """
    told = [key for key in differing if key != SEED and key not in FREE_ON_RESUME - OF_RESULTS]
    members: dict[str, list[ComparedRun]] = {}
    for run in runs:
        members.setdefault(repr([run.values.get(key) for key in told]), []).append(run)
    groups = list(members.values())
    if len(groups) == len(runs):
        return [RunGroup(group[0].name, group) for group in groups]
    keys = _choose_keys([group[0] for group in groups], told)
    labels = [_label(group[0], keys) for group in groups]
    for i, label in enumerate(labels):  # shortened ones may be equal
        if label in labels[:i]:
            labels[i] = f"{label} ({i + 1})"
    return [RunGroup(label, group) for label, group in zip(labels, groups, strict=True)]


def _choose_keys(runs: Sequence[ComparedRun], keys: Sequence[str]) -> list[str]:
    """Choose few keys whose values tell all runs apart: each time the one that splits most."""
    chosen: list[str] = []
    while _count_apart(runs, chosen) < len(runs):
        best = max(keys, key=lambda key: _count_apart(runs, [*chosen, key]))
        chosen.append(best)
    return chosen


def _count_apart(runs: Sequence[ComparedRun], keys: Sequence[str]) -> int:
    return len({repr([run.values.get(key) for key in keys]) for run in runs})


def _label(run: ComparedRun, keys: Sequence[str]) -> str:
    """Return what tells a group from others; the names of keys without their sections."""
    parts = [f"{key.rsplit('.', 1)[-1]} {format_value(run.values.get(key))}" for key in keys]
    return shorten_middle(", ".join(parts) or "all runs", LONGEST_LABEL)


def format_value(value: Any) -> str:
    """Format a value of a configuration as YAML has it, in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    return str(value)


def write_comparison(run_dirs: Sequence[str], target: str) -> Comparison:
    """Write a page about several runs to `target`, a file or s3://..., and return what it shows.

    Raises InputError as Comparison.read does.
    """
    compared = Comparison.read(run_dirs)
    first = compared.groups[0]
    page = render_page(
        "comparison.html.j2",
        compared=compared,
        columns={k: v for k, v in RESULTS.items() if any(k in r.results() for r in compared.runs)},
        paired=PAIRED,
        results=RESULTS,
        differences={
            (number, key): group.difference(first, key)
            for number, group in enumerate(compared.groups)
            for key in PAIRED
            if number
        },
        format_value=format_value,
        is_finite=math.isfinite,
        legend=[(color_of(i), group.label) for i, group in enumerate(compared.groups)],
        charts=_draw_charts(compared),
    )
    files.write_bytes(files.absolute(target), page)
    return compared


def _draw_charts(compared: Comparison) -> list[tuple[str, str]]:
    """Draw each curve that a run has, with its caption."""
    wanted = [
        ("evaluation", "recall@1", "step", "R@1, %", "Recall at 1 over the steps"),
        ("evaluation", "recall@10", "step", "R@10, %", "Recall at 10 over the steps"),
        ("evaluation", "recall@1", "epoch", "R@1, %", "Recall at 1 over the epochs"),
        ("epoch", "loss", "step", "loss", "Training loss: easy batches have a lower one"),
        ("epoch", "hardness", "epoch", "hardness", "Hardness: nearest places that share a batch"),
    ]
    charts = []
    for kind, key, x, label, caption in wanted:
        lines = []
        for number, group in enumerate(compared.groups):
            for run in group.runs:
                at, values = run.curve(kind, key, x)
                scale = 100 if key.startswith("recall") else 1
                lines.append(Line(number, at, [scale * value for value in values]))
        if any(line.x for line in lines):
            charts.append((draw_curves(lines, x, label), caption))
    return charts
