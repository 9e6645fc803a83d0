from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as harness
from benchmarks import gpu_step, loading, planning
from benchmarks.evaluation import draw_embeddings
from benchmarks.projection import (
    DRIVER_BINDS,
    Cluster,
    Rates,
    Stage,
    describe_bottleneck,
    project,
)
from benchmarks.published import evaluation as published_evaluation
from benchmarks.published import loading as published_loading
from benchmarks.published.geography import distance_matrix, nearest
from benchmarks.published.training import PublishedStep
from benchmarks.scale import StageUse, Trial, compute_driver_rates
from benchmarks.support import record as records
from benchmarks.support.process_watch import ProcessWatch, RoleUse
from benchmarks.support.record import (
    Measured,
    Meter,
    apart,
    read_results,
    record,
    render,
    render_page,
    replace_table,
)
from s4g_ray.data.sphere import metres_between
from s4g_ray.evaluation.metrics import retrieval_metrics
from s4g_ray.sampling.geographic_neighbors import geographic_neighbors
from tests.support.step_batches import encoder, make_batch, oracle

RESULT = {
    "title": "Speed",
    "text": "how fast",
    "command": "python -m benchmarks.speed",
    "columns": ["places", "time"],
    "rows": [[35532, "1.5 s"], [10, 0.25]],
    "config": {"k": 128},
    "rates": {"per_s": 3.0},
    "order": 5,
    "date": "2026-01-31",
    "machine": {"cpu": "fast", "cores": 2},
}


def test_the_table_of_faults_holds_the_measured_results() -> None:
    page_of_faults = records.RELIABILITY.read_text()
    assert page_of_faults == replace_table(page_of_faults, read_results()["faults"])
    assert {"a training worker (kill -9)", "the driver (kill -9)"} <= {
        row[0] for row in read_results()["faults"]["rows"]
    }


def test_the_page_of_benchmarks_is_rendered_from_its_results() -> None:
    remedy = "run `python -m benchmarks.support.record`"
    assert records.PAGE.read_text() == render_page(read_results()), remedy


def test_a_result_is_rendered_with_its_command_configuration_date_and_machine() -> None:
    assert render(RESULT).splitlines() == [
        "## Speed",
        "",
        "`python -m benchmarks.speed`: how fast",
        "",
        "| places | time |",
        "|---|---|",
        "| 35,532 | 1.5 s |",
        "| 10 | 0.25 |",
        "",
        "Configuration: k=128. 2026-01-31; cpu fast, cores 2.",
    ]


def test_results_are_written_with_their_machine_and_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    given: dict[str, Any] = {
        k: RESULT[k] for k in ("title", "text", "command", "columns", "rows", "config", "rates")
    }
    for name, order in (("a", 20), ("b", 10), ("c", 10)):
        record(name, order=order, **given)
    found = read_results()
    assert list(found) == ["b", "c", "a"]
    assert found["a"]["rows"] == RESULT["rows"]
    assert found["a"]["rates"] == {"per_s": 3.0}
    assert {"cpu", "cores", "memory", "python", "torch", "numpy", "numba", "ray"} <= set(
        found["a"]["machine"]
    )
    assert json.loads((tmp_path / "results/a.json").read_text()) == found["a"]


def allocate(megabytes: int) -> int:
    return len(np.ones(megabytes * 125_000))


def measured_allocation() -> Measured:
    allocate(1)
    return Meter()(allocate, 300)


def test_the_meter_measures_memory_that_a_call_allocates_and_frees() -> None:
    found = apart(measured_allocation)  # in a process in which nothing else frees memory meanwhile
    assert found.value == 300 * 125_000
    assert 0.25 < found.extra_gb < 0.36
    assert 0 < found.seconds < 60


def test_apart_runs_in_another_process() -> None:
    assert apart(os.getpid) != os.getpid()
    assert apart(allocate, 2) == 250_000


def test_an_unknown_benchmark_is_refused_and_a_failing_one_sets_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "PAGE", tmp_path / "benchmarks.md")
    (tmp_path / "reliability.md").write_text(records.RELIABILITY.read_text())
    monkeypatch.setattr(records, "RELIABILITY", tmp_path / "reliability.md")
    assert harness.main(["neighbours"]) == 2
    assert "unknown benchmark 'neighbours'; there are neighbors, mining" in capsys.readouterr().err
    monkeypatch.setattr(harness, "NAMES", ("support.machine", "no_such_module"))
    assert harness.main(["support.machine"]) == 0
    assert harness.main([]) == 1
    assert "failed: no_such_module" in capsys.readouterr().err
    assert (tmp_path / "benchmarks.md").read_text() == render_page(read_results())


def test_the_published_geography_is_exact_and_agrees_with_the_one_here() -> None:
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(40, 41, 700), rng.uniform(7, 8, 700)
    assert distance_matrix(lat, lon)[3, 600] == pytest.approx(
        float(metres_between(lat[3], lon[3], lat[600], lon[600]))
    )
    assert np.array_equal(nearest(lat, lon, 20), geographic_neighbors(lat, lon, 20)[0])


def test_the_published_evaluations_agree_with_the_one_here() -> None:
    data = draw_embeddings(300, 1, 300, 16, 1.0)
    found = retrieval_metrics(*data, protocol="paper")
    for name, value in published_evaluation.recalls(*data).items():
        assert found[name] == pytest.approx(value), name
    data = draw_embeddings(20, 6, 300, 8, 1.0)
    found = retrieval_metrics(*data, protocol="paper")
    assert 0 < found["ap"] < 1
    assert published_evaluation.average_precision(*data) == pytest.approx(found["ap"])
    assert published_evaluation.average_precision_of_matrix(*data) == pytest.approx(found["ap"])


def test_the_published_loading_agrees_with_the_one_here(tmp_path: Path) -> None:
    table = loading.cut_images(tmp_path, "s", (75, 80), 3)
    found = loading.load_here(table, (38, 40), antialias=False, normalised=True)
    levels = (found - published_loading.load_batch(table.uris, (38, 40))) * loading.STD
    assert levels.abs().max() <= 2.01
    assert levels.abs().mean() < 0.5


KINDS_COLUMNS = [
    "kind",
    "vectors",
    "nprobe or ef",
    "planned GB",
    "seen GB",
    "build s",
    "recall@128",
    "queries/s",
]
MEASURED: dict[str, dict[str, Any]] = {
    "neighbors": {
        "rates": {
            "neighbors_per_s_per_core": 6e6,
            "bytes_per_place": 300.0,
            "disk_bytes_per_pair": 5.0,
        },
    },
    "evaluation": {"rates": {"product_gflops": 300.0}, "config": {"threads": 2}},
    "planning_scale": {"rates": {"pairs_per_s": 1e6, "bytes_per_pair": 60.0}},
    "index_kinds": {
        "config": {"threads": 2, "dim": 256, "lists": 4000},
        "columns": KINDS_COLUMNS,
        "rows": [
            ["flat", 10**6, "", 1.0, 1.0, 2.0, 1.0, 100],
            ["ivf_sq8", 10**6, 8, 0.3, 0.3, 60.0, 0.7, 4000],
            ["ivf_sq8", 10**6, 32, 0.3, 0.3, 60.0, 0.95, 1500],
            ["ivf_sq8", 10**6, 128, 0.3, 0.3, 60.0, 0.99, 500],
        ],
    },
    "scale": {"rates": {"open": 5.0, "embed": 5.0, "mine": 1.0}},
}


def test_the_projection_takes_the_cheapest_search_effort_with_enough_recall() -> None:
    rates = Rates.read(MEASURED)
    assert (rates.ivf_nprobe, rates.product_flops) == (32, 150e9)
    assert rates.ivf_scan_values_per_s == pytest.approx(1500 * (32 * 250 + 4000) * 256 / 2)


def test_the_planners_benchmark_records_what_the_projection_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(planning, "apart", lambda function, *arguments: function(*arguments))
    planning.record_scale([8192])
    assert "Batch plans at scale" in capsys.readouterr().out
    rates = Rates.read({**MEASURED, "planning_scale": read_results()["planning_scale"]})
    assert rates.planned_pairs_per_s > 1000
    assert rates.planning_bytes_per_pair >= 0


def test_the_projection_equals_sums_computed_by_hand() -> None:
    stages = {stage.name: stage for stage in project(10**8, Rates.read(MEASURED), Cluster())}
    assert stages["exact search, GPUs"].hours == pytest.approx(
        2 * 1e16 * 1024 / (64 * 989e12 * 0.4) / 3600
    )
    assert stages["exact search, CPUs"].hours == pytest.approx(
        2 * 1e16 * 1024 / (768 * 150e9) / 3600
    )
    assert stages["geographic graph"].hours == pytest.approx(1e8 * 128 / (6e6 * 96) / 3600)
    assert stages["planning"].gigabytes == pytest.approx(57.2)
    assert stages["geographic graph"].gigabytes == pytest.approx(30)
    assert stages["graph on disk"].gigabytes == pytest.approx(64)
    embedding = stages["embedding, ConvNeXt-B, 384 px"]
    training = stages["training, one epoch"]
    assert embedding.hours == pytest.approx(2e8 * 90.2e9 / (64 * 989e12 * 0.35) / 3600)
    assert training.hours == pytest.approx(3 * 2e8 * 90.2e9 / (64 * 989e12 * 0.35) / 3600)
    assert (embedding.binds, training.binds) == ("GPU arithmetic", "GPU arithmetic")
    slow = {s.name: s for s in project(10**8, Rates.read(MEASURED), Cluster(store_gb_per_s=1))}[
        embedding.name
    ]
    assert slow.hours == pytest.approx(2e8 * 60e3 / 1e9 / 3600)
    assert slow.binds == "reading the object store"
    assert stages["index, ivf_sq8"].gigabytes == pytest.approx(1e8 * (1.5 * (1024 + 8) + 8) / 1e9)


def test_the_driver_binds_where_it_takes_longer_than_the_cluster() -> None:
    stages = {stage.name: stage for stage in project(10**8, Rates.read(MEASURED), Cluster())}
    embedding = stages["embedding, ConvNeXt-B, 384 px"]
    assert embedding.driver_hours == pytest.approx(1e8 * 5e-6 / 3600)
    assert embedding.binds == "GPU arithmetic"
    opening = stages["opening the data set"]
    assert opening.hours == opening.driver_hours == pytest.approx(1e8 * 5e-6 / 3600)
    slow_driver = copy.deepcopy(MEASURED)
    slow_driver["scale"]["rates"]["embed"] = 1000.0
    stages = {stage.name: stage for stage in project(10**8, Rates.read(slow_driver), Cluster())}
    embedding = stages["embedding, ConvNeXt-B, 384 px"]
    assert embedding.hours == pytest.approx(1e8 * 1e-3 / 3600)
    assert embedding.binds == DRIVER_BINDS


def test_what_the_driver_does_for_a_place_is_the_difference_between_two_trials(
    tmp_path: Path,
) -> None:
    trials = []
    for places, cpu_s in ((1000, 7.0), (11_000, 7.5)):
        trial = Trial(tmp_path / str(places), places)
        trial.uses.append(StageUse("embed", 1.0, {"driver": RoleUse(cpu_s)}, 0, 0, 0, {}))
        trials.append(trial)
    assert compute_driver_rates(trials) == {"embed": 50.0}
    assert compute_driver_rates(trials[1:]) == {"embed": 681.82}


BURN = """
import sys, time
held = b"x" * 160_000_000
while time.process_time() < 0.7:
    pass
print("done", flush=True)
sys.stdin.read()  # it lives until it has been watched
"""


def test_a_watch_sees_the_time_and_memory_of_a_process_and_its_children() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}], check=True)"
    pipe = subprocess.PIPE
    with (
        subprocess.Popen([sys.executable, "-c", parent], stdin=pipe, stdout=pipe) as process,
        ProcessWatch(process.pid, every_s=0.02) as watch,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        watch.count_cpu_s()
        process.communicate()
        assert process.returncode == 0
    uses = watch.uses()
    assert uses["driver"].num_processes == 1
    assert uses["ray"].num_processes == 1
    assert 0.65 < uses["ray"].cpu_s < 1.5
    assert 0.15 < uses["ray"].peak_gb < 0.25


def test_ten_times_the_places_take_a_hundred_times_the_exact_search_and_ten_times_the_rest() -> (
    None
):
    rates = Rates.read(MEASURED)
    small, large = (project(n, rates, Cluster()) for n in (10**8, 10**9))
    for a, b in zip(small, large, strict=True):
        assert b.gigabytes == pytest.approx(10 * a.gigabytes)
        if a.hours is None or b.hours is None:
            continue
        if a.name == "planning":  # more places make more cells, which more cores plan
            assert a.hours < b.hours < 10.001 * a.hours
            continue
        exponent = np.log10(b.hours / a.hours)
        wanted = 1.0
        if "exact" in a.name:
            wanted = 2.0
        elif "IVF" in a.name:
            wanted = 1.5
        assert exponent == pytest.approx(wanted, abs=0.05), a.name


def test_the_bottleneck_is_the_longest_stage_with_the_fastest_search() -> None:
    stages = [
        Stage("embedding", 1, 3.0, "GPUs"),
        Stage("exact search, CPUs", 1, 90.0, "CPUs"),
        Stage("IVF search, CPUs", 1, 2.0, "codes"),
        Stage("index, flat", 9, None, "fits"),
    ]
    assert describe_bottleneck(stages) == "embedding (3.0 h; GPUs)"
    assert (
        describe_bottleneck([*stages, Stage("exact search, GPUs", 1, 1.0, "-")])
        == "embedding (3.0 h; GPUs)"
    )
    assert (
        describe_bottleneck([Stage("planning", 1, 1.0, "-"), *stages[1:3]])
        == "IVF search, CPUs (2.0 h; codes)"
    )


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_a_projection_without_a_result_or_rate_names_the_benchmark_to_run(name: str) -> None:
    without = {key: value for key, value in MEASURED.items() if key != name}
    command = f"python -m benchmarks {name.removesuffix('_scale')}"
    with pytest.raises(SystemExit, match=rf"results/{name}.json; run `{command}`"):
        Rates.read(without)
    changed = copy.deepcopy(MEASURED)
    if name == "index_kinds":
        changed[name]["rows"] = changed[name]["rows"][:2]
        with pytest.raises(SystemExit, match=r"no row of ivf_sq8 has recall@128 >= 0\.9"):
            Rates.read(changed)
        return
    changed[name]["rates"] = {}
    with pytest.raises(SystemExit, match=rf"results/{name}.json holds no rate '\w+'; run"):
        Rates.read(changed)


@pytest.mark.usefixtures("one_thread")
def test_steps_on_a_gpu_are_measured_here_on_the_cpu() -> None:
    arguments = Namespace(model="test_convnext", size=32, pairs=4, steps=1)
    bench = gpu_step.Bench(arguments, torch.device("cpu"))
    rows = [bench.run(case) for case in gpu_step.cases(4) if not case.compile]
    assert len(rows) == 8
    for step, pairs, tflops, mfu, memory in rows:
        assert step.endswith(" ms")
        assert float(pairs) > 0
        assert float(tflops) >= 0
        assert (mfu, memory) == ("unknown", "-")
    assert 0 < bench.time_snapshot() < 5


def test_a_step_in_the_published_form_has_the_gradient_of_ours() -> None:
    batch = make_batch()
    wanted, gradients = oracle(encoder(), batch)
    published = PublishedStep(encoder(), torch.device("cpu"), half=False)
    before = {name: p.detach().clone() for name, p in published.encoder.named_parameters()}
    assert published.step(batch.queries, batch.references) == pytest.approx(wanted, rel=1e-6)
    after = dict(published.encoder.named_parameters())
    for name, gradient in gradients.items():
        # the first step of AdamW goes against the sign of the gradient
        moved = before[name] * (1 - 1e-5) - after[name].detach()
        is_clear = gradient.abs() > 1e-6
        assert torch.equal(moved.sign()[is_clear], gradient.sign()[is_clear]), name
