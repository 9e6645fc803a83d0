"""What a run exports, scraped as Prometheus would while it runs."""

from __future__ import annotations

import html
import socket
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.distributed.session import ray_session
from s4g_ray.errors import InputError
from s4g_ray.pipeline.prometheus import METRICS, Record, Sample, last_values, run_tag, samples_of
from s4g_ray.pipeline.records import read_records
from tests.conftest import tiny_config, with_validation, write_synthetic
from tests.support.dashboards import (
    OF_GPUS,
    dashboard_queries,
    exported_name,
    label_names,
    metric_names,
)
from tests.support.fault_site.agent_ports import free_ports
from tests.support.faulty_runs import TRAINER, Command, held, records, steps, title_of

HOSTILE = "<script>alert(1)</script>"
SPLITS = {"evaluation": "test", "validation": "val"}
Series = tuple[str, frozenset[tuple[str, str]]]  # a name, and tags of ours


def test_a_record_gives_samples_of_its_fields_and_none_of_nulls() -> None:
    epoch = {
        "kind": "epoch",
        "time": 5.0,
        "epoch": 2,
        "loss": 0.1,
        "load_wait": 0.25,
        "graph_age": None,
        "workers": 2,
    }
    assert list(samples_of(epoch, SPLITS)) == [
        ("s4g_epoch", 2, {}),
        ("s4g_load_wait_ratio", 0.25, {}),
    ]
    mining = {"kind": "mining", "epoch": 2, "collection": "pairs", "recall": 0.5}
    assert list(samples_of(mining, SPLITS)) == [("s4g_index_recall", 0.5, {"collection": "pairs"})]
    assert list(samples_of({**mining, "recall": None}, SPLITS)) == []
    seconds = {
        "kind": "round",
        "time": 5.0,
        "epoch": 2,
        "embed_s": 1.5,
        "mine_s": 2.0,
        "evaluate_s": 0.5,
    }
    assert list(samples_of(seconds, SPLITS)) == [("s4g_round_seconds", 4.0, {})]
    assert list(samples_of({"kind": "baseline", "epoch": 0, "recall@1": 0.5}, SPLITS)) == []


def test_recall_has_split_and_rank_as_tags_and_no_other_metric_is_taken_for_it() -> None:
    line = {
        "kind": "validation",
        "recall@1": 0.5,
        "recall@1%": 0.75,
        "recall@1_within_50m": 0.9,
        "queries": 4.0,
    }
    assert list(samples_of(line, SPLITS)) == [
        ("s4g_recall", 0.5, {"split": "val", "rank": "1"}),
        ("s4g_recall", 0.75, {"split": "val", "rank": "1%"}),
    ]
    assert {s.tags["split"] for s in samples_of({**line, "kind": "evaluation"}, SPLITS)} == {"test"}


def test_a_resumed_run_shows_last_values_and_counts_anew() -> None:
    lines: list[Record] = [
        {"kind": "step", "step": 1, "loss": 3.0},
        {"kind": "workers", "workers": 2},
        {"kind": "lost", "ranks": [0, 1]},
        {"kind": "evaluation", "recall@1": 0.25},
        {"kind": "validation", "recall@1": 0.5},
        {"kind": "step", "step": 2, "loss": 2.0},
    ]
    assert set(map(str, last_values(lines, SPLITS))) == {
        str(sample)
        for sample in (
            Sample("s4g_step", 2),
            Sample("s4g_loss", 2.0),
            Sample("s4g_workers", 0),
            Sample("s4g_recall", 0.25, {"split": "test", "rank": "1"}),
            Sample("s4g_recall", 0.5, {"split": "val", "rank": "1"}),
        )
    }


@pytest.mark.parametrize(
    ("run", "tag"),
    [
        ("/data/a/earth", "a/earth"),
        ("s3://bucket/b/earth/", "b/earth"),
        ("s3://bucket/c", "bucket/c"),
        ("/d", "d"),
        ("/x/a run (2)", "x/a run (2)"),
        ("/x/tïny 100%", "x/t%C3%AFny 100%25"),  # Ray refuses tags beyond ASCII
    ],
)
def test_runs_of_one_name_in_different_folders_have_different_tags(run: str, tag: str) -> None:
    assert run_tag(run) == tag


def test_a_metrics_port_that_is_taken_is_refused_before_ray_starts(
    synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests have a session
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        config = tiny_config(tmp_path, synthetic.uri, ray={"metrics_port": port})
        wanted = rf"^ray\.metrics_port={port} cannot be used: Address already in use;"
        with pytest.raises(InputError, match=wanted), ray_session(config.ray, config.storage):
            pytest.fail("a session was started")


class Scraper:
    """All values that each series has shown so far."""

    def __init__(self, port: int, run: str) -> None:
        self.run = run  # the tag
        self.url = f"http://127.0.0.1:{port}/metrics"
        self.labels: dict[str, set[str]] = defaultdict(set)  # by the name of a metric
        self.heads: list[
            str
        ] = []  # command lines of the processes that serve a dashboard, or would
        self.values: dict[Series, list[float]] = defaultdict(list)

    def scrape(self) -> bool:
        """Scrape once; return whether there was an answer: the agent runs within the run alone."""
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return False
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.labels[sample.name] |= sample.labels.keys()
                ours = {
                    k: v
                    for k, v in sample.labels.items()
                    if k in ("run", "split", "rank", "collection", "queue")
                }
                if sample.name.startswith("ray_s4g_"):
                    self.values[sample.name, frozenset(ours.items())].append(sample.value)
        return True

    def of(self, name: str, **tags: str) -> list[float]:
        """What a series of the run has shown, rising."""
        return sorted(set(self.values[name, frozenset({"run": self.run, **tags}.items())]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Scraper, Command]:
    """A run in which a worker dies, a round fails once and two images are bad, and its scrapes."""
    folder = tmp_path_factory.mktemp("metrics")
    dataset = with_validation(write_synthetic(folder / "source"), folder / "data", name=HOSTILE)
    for view, number in (("queries", 3), ("references", 4)):
        (folder / f"source/images/{view}/{number}.png").write_bytes(b"no image")
    (port,) = free_ports(1)
    config = tiny_config(
        folder / "run",
        dataset.uri,
        ray={"num_cpus": 4, "metrics_port": port},
        train={"epochs": 3, "max_failures": 1},
        data={"val_split": "val", "on_bad_image": "skip"},
        mining={"schedule": "overlap", "lag_epochs": 1},
    )
    refused = {
        "at": "neighbors/v=0001/_MANIFEST",
        "do": "refuse",
        "marker": str(folder / "refused"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        patch.setenv("HOME", str(folder))
        patch.delenv("RAY_AUTH_MODE")
        # the run does not end before a worker has died
        waits = held("checkpoints/epoch=0003/training_state", folder / "killed")
        command = Command(config, [refused, waits], forked=False)
    scraper = Scraper(port, f"{folder.name}/run")
    try:
        command.wait_for(lambda: scraper.scrape() and steps(config)[-1:] >= [2])
        scraper.heads = [
            title
            for title in map(title_of, command.processes())
            if "dashboard/dashboard.py" in title
        ]
        command.kill(TRAINER)
        (folder / "killed").touch()
        deadline = time.monotonic() + 900
        while command.process.poll() is None and time.monotonic() < deadline:
            scraper.scrape()
            time.sleep(0.2)
    finally:
        command.end()
    return config, scraper, command


@pytest.mark.cluster
def test_every_metric_is_seen_in_a_run(run: tuple[RunConfig, Scraper, Command]) -> None:
    _, scraper, command = run
    assert command.process.returncode == 0, command.output
    wanted = set(map(exported_name, METRICS))
    assert {name for name in scraper.labels if name.startswith("ray_s4g_")} == wanted
    tags: dict[str, set[str]] = defaultdict(set)
    for name, found in scraper.values:
        tags[name] |= {key for key, _ in found}
    for name, metric in METRICS.items():
        assert tags[exported_name(name)] == {"run", *metric.tags}, name


@pytest.mark.cluster
def test_every_query_of_the_dashboard_names_metrics_and_labels_that_the_run_exports(
    run: tuple[RunConfig, Scraper, Command],
) -> None:
    _, scraper, _ = run
    queries = dashboard_queries()
    assert len(queries) > len(METRICS)
    for query in queries:
        for name in metric_names(query) - OF_GPUS:
            assert name in scraper.labels, query
            assert label_names(query) <= scraper.labels[name], query


@pytest.mark.cluster
def test_values_are_those_of_metrics_jsonl(run: tuple[RunConfig, Scraper, Command]) -> None:
    config, scraper, _ = run

    def logged(kind: str, field: str) -> list[float]:
        return [record[field] for record in records(config, kind)]

    for name, kind, field in (
        ("loss", "step", "loss"),
        ("learning_rate", "step", "learning_rate"),
        ("epoch", "epoch", "epoch"),
        ("pairs_per_second", "epoch", "pairs_per_s"),
        ("load_wait_ratio", "epoch", "load_wait"),
        ("mining_wait_ratio", "epoch", "wait_share"),
        ("graph_age_epochs", "epoch", "graph_age"),
        ("hardness", "epoch", "hardness"),
        ("pairs_left_out", "epoch", "pairs_left_out"),
    ):
        seen = scraper.of(f"ray_s4g_{name}")
        assert seen, name
        assert all(value in [pytest.approx(v) for v in logged(kind, field)] for value in seen), name
    for split, kind in (("test", "evaluation"), ("val", "validation")):
        for rank in ("1", "5", "10", "1%"):
            seen = scraper.of("ray_s4g_recall", split=split, rank=rank)
            assert seen
            assert set(seen) <= set(logged(kind, f"recall@{rank}"))
    assert scraper.of("ray_s4g_index_recall", collection="pairs") == [1.0]
    assert scraper.of("ray_s4g_rounds_failed_total") == [1.0]
    assert (
        scraper.of("ray_s4g_workers_lost_total")[-1]
        == sum(len(r["ranks"]) for r in records(config, "lost"))
        > 0
    )
    # 0 between two groups of workers is not always scraped
    assert scraper.of("ray_s4g_workers") in ([0.0, 2.0], [2.0])
    assert (
        scraper.of("ray_s4g_bad_images_total")[-1]
        == len(read_records(config.run_dir, "bad_images.jsonl"))
        == 2
    )
    for queue in ("rounds", "plans", "batches"):
        assert scraper.of("ray_s4g_queue_length", queue=queue)


@pytest.mark.cluster
def test_a_local_session_asks_for_a_token_and_has_no_dashboard(
    run: tuple[RunConfig, Scraper, Command],
) -> None:
    config, scraper, _ = run
    assert (Path(config.run_dir).parent / ".ray/auth_token").read_text()
    assert scraper.heads, "nothing of the session was seen"
    assert all("--disable-frontend" in head for head in scraper.heads)


@pytest.mark.cluster
def test_the_report_shows_names_of_a_data_set_as_text(
    run: tuple[RunConfig, Scraper, Command],
) -> None:
    page = (Path(run[0].run_dir) / "report.html").read_text()
    assert HOSTILE not in page
    assert page.count(html.escape(HOSTILE)) >= 2  # the data set's name, and that of a region
