"""Runs, exports and weights are evaluated on small data sets in the layouts of the paper's."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset, open_dataset
from s4g_ray.data.image_table import ImageTable, View
from s4g_ray.data.images import load_view
from s4g_ray.data.schema import gallery_splits
from s4g_ray.data.sphere import metres_between
from s4g_ray.data.tables.batch_plan import load_plan
from s4g_ray.data.tables.embedding_table import read_embeddings
from s4g_ray.data.tables.neighbor_graph import NeighborGraph
from s4g_ray.datasets import cvact, cvusa, university1652, vigor
from s4g_ray.distributed.placement import Node
from s4g_ray.encoder.actors import EncoderPool
from s4g_ray.encoder.checkpoint import load_encoder
from s4g_ray.encoder.encoder import Encoder
from s4g_ray.encoder.export import export
from s4g_ray.encoder.precision import Numerics
from s4g_ray.encoder.source import EncoderSource, find_checkpoint
from s4g_ray.encoder.weights import encode_weights
from s4g_ray.errors import InputError
from s4g_ray.evaluation.metrics import PROTOCOLS
from s4g_ray.evaluation.tables import evaluation_tables
from s4g_ray.pipeline.run import run
from s4g_ray.pipeline.run_folder import RunResult
from s4g_ray.pipeline.stages.evaluate import evaluate
from s4g_ray.storage import files
from tests.evaluation.test_metrics import metrics_loop, scores_loop
from tests.support.source_trees import cvact_tree, cvusa_tree, university_tree, vigor_tree

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("warm_pool")]
CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = [  # the paper's configuration, on a processor and in seconds
    "model.name=test_convnext",
    "model.pretrained=false",
    "train.use_gpu=false",
    "train.precision=fp32",
    "train.channels_last=false",
    "train.batch_size=8",
    "train.num_workers=2",
    "train.warmup_epochs=0",
    "train.loader_processes=0",
    "train.log_every_steps=1",
    "sampling.num_hard_negatives=2",
    "embedding.gpus_per_actor=0",
    "embedding.part_mb=0.005",
]
Made = tuple[RunConfig, RunResult, GeoDataset]


def paper_config(name: str, folder: Path, dataset: GeoDataset, *overrides: str) -> RunConfig:
    where = [f"run_dir={folder / 'run'}", f"data.uri={dataset.uri}"]
    return load_config(CONFIGS / f"{name}.yaml", [*SMALL, *where, *overrides])


@pytest.fixture(scope="module")
def cvusa_run(warm_pool: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("cvusa")
    dataset = cvusa.convert(
        str(cvusa_tree(folder / "source", train=24, test=10)), str(folder / "data")
    )
    config = paper_config(
        "cvusa",
        folder,
        dataset,
        "data.query_size=[32,131]",
        "data.reference_size=[48,48]",
        "train.epochs=2",
        "sampling.neighbor_pool_size=8",
        "train.precision=fp16",
    )
    return config, run(config), dataset


@pytest.fixture(scope="module")
def vigor_run(warm_pool: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("vigor")
    source = str(vigor_tree(folder / "source", tiles_per_city=12))
    dataset = vigor.convert(source, str(folder / "data"), area="same")
    config = paper_config(
        "vigor_same",
        folder,
        dataset,
        "data.query_size=[32,64]",
        "data.reference_size=[48,48]",
        "train.epochs=2",
        "mining.every_epochs=1",
        "sampling.neighbor_pool_size=6",
        "protocol=strict",
        "train.batch_size=6",
        "train.num_workers=1",
    )
    return config, run(config), dataset


def by_hand(
    encoder: Encoder, queries: ImageTable, gallery: ImageTable, config: RunConfig
) -> list[NDArray[Any]]:
    """Embeddings of both tables, from the images, without the job."""
    numerics = Numerics("fp16" if config.train.precision == "fp16" else "fp32")
    views: list[tuple[ImageTable, View]] = [(queries, "queries"), (gallery, "references")]
    with torch.inference_mode():
        images = [
            torch.stack(
                [
                    load_view(table, row, view, config.data, seed=config.seed)
                    for row in range(len(table))
                ]
            )
            for table, view in views
        ]
        encoder.eval()
        return [
            numerics.embed(encoder, batch, view).float().numpy()
            for batch, (_, view) in zip(images, views, strict=True)
        ]


def semi_positives_by_query(dataset: GeoDataset, split: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for query, place in zip(*dataset.semi_positives(split).expand(), strict=True):
        found.setdefault(int(query), []).append(int(place))
    return found


def evaluated_by_hand(
    config: RunConfig, dataset: GeoDataset, split: str, protocol: str
) -> dict[str, float]:
    """The metrics of a run's last checkpoint by plain loops, image by image."""
    encoder = load_encoder(config.model, find_checkpoint(config.run_dir)).eval()
    queries, gallery = (
        dataset.table("queries", [split]),
        dataset.table("references", gallery_splits(split)),
    )
    vectors = by_hand(encoder, queries, gallery, config)
    semi = semi_positives_by_query(dataset, split)
    lists = [semi.get(int(i), []) for i in queries.ids]
    metres = np.full((len(queries), len(gallery)), np.inf)
    places = queries.place_ids.tolist(), gallery.place_ids.tolist()
    found = metrics_loop(scores_loop(*vectors), *places, lists, metres, protocol)
    return {key: value for key, value in found.items() if "_within_" not in key}


@pytest.mark.parametrize("made", ["cvusa_run", "vigor_run"])
def test_a_run_with_the_papers_configuration_reports_what_plain_loops_find(
    made: str, request: pytest.FixtureRequest
) -> None:
    config, result, dataset = request.getfixturevalue(made)
    wanted = evaluated_by_hand(config, dataset, "test", config.protocol)
    if made == "cvusa_run":
        wanted = {
            key: value for key, value in wanted.items() if not key.startswith("hit_rate")
        }  # no semi-positives
    assert {key: result.metrics[key] for key in wanted} == pytest.approx(wanted)
    assert all(np.isfinite(r["loss"]) for r in result.records if r["kind"] == "epoch")
    (evaluation,) = [r for r in result.records if r["kind"] == "evaluation"]
    assert evaluation["protocol"] == config.protocol
    assert sorted(evaluation["regions"]) == ([] if made == "cvusa_run" else sorted(vigor.CITIES))
    report = (Path(config.run_dir) / "report.html").read_text()
    assert ("hit rate" in report, "Chicago" in report) == (made == "vigor_run",) * 2
    assert f"protocol {config.protocol}" in report


def test_no_batch_holds_a_tile_and_its_semi_positive_in_the_strict_protocol(
    vigor_run: Made,
) -> None:
    config, _, dataset = vigor_run
    semi = semi_positives_by_query(dataset, "train")
    queries = dataset.table("queries", ["train"])
    place_of = dict(zip(queries.ids.tolist(), queries.place_ids.tolist(), strict=True))
    barred = {(place_of[query], int(place)) for query, places in semi.items() for place in places}
    met = 0
    for epoch in (1, 2):
        for batch in load_plan(f"{config.run_dir}/plans/epoch={epoch:04d}.parquet")[0].tolist():
            pairs = itertools.permutations([place_of[query] for query in batch], 2)
            met += sum(pair in barred for pair in pairs)
    assert barred
    assert met == 0
    for version in (0, 1):  # geographic, then mined
        graph = NeighborGraph.load(f"{config.run_dir}/neighbors/v={version:04d}")
        assert set(graph.place_ids.tolist()) == set(place_of.values())
        for place, neighbors in zip(
            graph.place_ids.tolist(), graph.neighbors.tolist(), strict=True
        ):
            assert not {
                n for n in neighbors if n >= 0 and ((place, n) in barred or (n, place) in barred)
            }
            assert [n for n in neighbors if n >= 0]


def test_an_export_and_its_weights_evaluate_exactly_as_the_run_does(
    vigor_run: Made, tmp_path: Path
) -> None:
    config, _, dataset = vigor_run
    target = tmp_path / "model"
    description = export(config.run_dir, str(target))
    assert (description["architecture"], description["data"]["query_size"]) == (
        "test_convnext",
        [32, 64],
    )
    assert description["mean"] == [0.5, 0.5, 0.5]
    trained = load_encoder(config.model, find_checkpoint(config.run_dir))
    state = torch.load(target / "model.pth", weights_only=True)
    assert list(state) == ["logit_scale", *(f"model.{key}" for key in trained.model.state_dict())]
    for name in ("model.pth", "model.safetensors", ""):
        again = Encoder.build(config.model.model_copy(update={"pretrained": str(target / name)}))
        assert (
            encode_weights(again)
            == encode_weights(trained)
            == (target / "model.safetensors").read_bytes()
        )
    for source in (str(target), str(target / "model.pth"), config.run_dir):
        (found,) = evaluate(source, dataset.uri)
        for protocol in PROTOCOLS:
            wanted = evaluated_by_hand(config, dataset, "test", protocol)
            assert {k: found.score.metrics[protocol][k] for k in wanted} == pytest.approx(wanted)
    for name in ("model.pth", "model.json", "run.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("kept")
        with pytest.raises(InputError, match=f"holds {name} already"):
            export(config.run_dir, str(tmp_path / name))
        assert (tmp_path / name / name).read_text() == "kept"
    for key in ("data", "architecture", "format"):
        value = json.loads((target / "model.json").read_text())
        del value[key]
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged/model.json").write_text(json.dumps(value))
        with pytest.raises(InputError, match=r"lacks its architecture|is not of format"):
            evaluate(str(tmp_path / "damaged"), dataset.uri)


def test_fields_of_view_share_the_gallery_and_the_actors_and_are_those_of_the_images(
    cvusa_run: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, dataset = cvusa_run
    out = tmp_path / "out"
    start = EncoderPool.start_actors
    starts = []

    def count(pool: EncoderPool) -> Any:
        starts.append(pool)
        return start(pool)

    monkeypatch.setattr(EncoderPool, "start_actors", count)
    # actors of its own
    monkeypatch.setattr("s4g_ray.pipeline.stages.evaluation_job.EncoderPool", EncoderPool)
    rows = tmp_path / "queries.parquet"
    found = evaluate(
        config.run_dir,
        dataset.uri,
        fovs=[360, 90],
        heading="random",
        out=str(out),
        queries_out=str(rows),
        top=4,
    )
    assert len(starts) == 1
    told = pq.read_table(rows).to_pylist()
    for evaluation in found:
        own = [row for row in told if row["fov_deg"] == evaluation.fov_deg]
        metrics = evaluation.score.metrics["strict"]
        assert len(own) == metrics["queries"]
        assert np.mean([row["rank"] <= 5 for row in own]) == pytest.approx(metrics["recall@5"])
        median = np.median([row["top_metres"][0] for row in own])
        assert median == pytest.approx(metrics["median_error_m"])
        assert all(len(row["top_ids"]) == 4 for row in own)
    assert [(e.fov_deg, e.heading) for e in found] == [(360, "random"), (90, "random")]
    encoder = load_encoder(config.model, find_checkpoint(config.run_dir)).eval()
    table = dataset.table("queries", ["test"])
    for evaluation in found:
        assert isinstance(evaluation.fov_deg, float)
        data = config.data.model_copy(
            update={"query_heading": "random", "query_fov_deg": evaluation.fov_deg}
        )
        seen = torch.stack(
            [load_view(table, row, "queries", data, seed=config.seed) for row in range(len(table))]
        )
        assert seen.shape[-1] == round(131 * evaluation.fov_deg / 360)
        with torch.inference_mode():
            wanted = torch.nn.functional.normalize(encoder.embed(seen, "queries")).numpy()
        stored = read_embeddings(str(out / f"queries-fov={evaluation.fov_deg:g}-random"), "queries")
        order = np.argsort(stored.ids)
        np.testing.assert_allclose(
            stored.vectors[order], wanted, atol=2e-3
        )  # the run computes in fp16
    assert (out / "result.json").exists()
    kept = [
        "evaluation.json",
        "queries-fov=360-random",
        "queries-fov=90-random",
        "references",
        "result.json",
    ]
    with pytest.raises(InputError, match="holds a finished evaluation"):
        evaluate(config.run_dir, dataset.uri, out=str(out))
    assert sorted(path.name for path in out.iterdir()) == kept
    (out / "result.json").unlink()  # as if it had been interrupted before the end
    shutil.rmtree(out / "queries-fov=90-random")
    before = (out / "references/_MANIFEST.json").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"was begun with .*'seed': 1.*, not .*'seed': 5"):
        evaluate(
            config.run_dir,
            dataset.uri,
            overrides=["seed=5"],
            fovs=[360],
            heading="random",
            out=str(out),
        )
    again = evaluate(config.run_dir, dataset.uri, fovs=[360, 90], heading="random", out=str(out))
    assert [e.score.metrics for e in again] == [e.score.metrics for e in found]
    assert (out / "references/_MANIFEST.json").stat().st_mtime_ns == before
    text = rendered(evaluation_tables(found))
    assert "360° random" in text
    assert "recall@1" in text


def test_a_view_is_black_outside_where_training_drew_it_from_a_range(
    cvusa_run: Made, tmp_path: Path
) -> None:
    config, _, dataset = cvusa_run
    drawn = ["data.query_fov_deg=[60, 360]"]
    wanted: list[tuple[Sequence[float], str, float | tuple[float, float]]] = [
        ([90], "90", (90.0, 90.0)),
        ([], "60-360", (60.0, 360.0)),
    ]
    encoder = load_encoder(config.model, find_checkpoint(config.run_dir)).eval()
    table = dataset.table("queries", ["test"])
    for fovs, name, fov in wanted:
        out = tmp_path / name
        (found,) = evaluate(config.run_dir, dataset.uri, overrides=drawn, fovs=fovs, out=str(out))
        assert found.fov_deg == (90 if fovs else fov)
        data = config.data.model_copy(update={"query_fov_deg": fov})
        seen = torch.stack(
            [load_view(table, row, "queries", data, seed=config.seed) for row in range(len(table))]
        )
        assert tuple(seen.shape[-2:]) == config.data.query_size
        with torch.inference_mode():
            embedded = torch.nn.functional.normalize(encoder.embed(seen, "queries")).numpy()
        queries = out / f"queries-fov={name}-{config.data.query_heading}"
        stored = read_embeddings(str(queries), "queries")
        np.testing.assert_allclose(
            stored.vectors[np.argsort(stored.ids)], embedded, atol=2e-3
        )  # the run computes in fp16


def rendered(tables: list[Any]) -> str:
    buffer = io.StringIO()
    for table in tables:
        Console(file=buffer, width=80).print(table)
    return buffer.getvalue()


def test_weights_trained_on_one_data_set_are_evaluated_on_another(
    cvusa_run: Made, vigor_run: Made
) -> None:
    config, _, _ = cvusa_run
    other = vigor_run[2]
    (found,) = evaluate(config.run_dir, other.uri)
    assert (found.dataset, found.split) == ("vigor_same", "test")
    assert found.score.metrics["strict"]["references"] == len(other.table("references", ["test"]))
    text = rendered(evaluation_tables([found]))
    assert "by region" in text
    assert "Chicago" in text
    made_with = found.as_dict()["made_with"]
    assert (made_with["source"], made_with["epoch"], made_with["query_size"]) == (
        config.run_dir,
        2,
        [32, 131],
    )
    assert found.as_dict(["paper"]).keys() >= {"paper", "regions", "fov_deg"}


def test_a_run_in_fp16_goes_on_with_the_scaler_where_it_stopped(
    cvusa_run: Made, tmp_path: Path
) -> None:
    config, _, _ = cvusa_run
    whole, part = Path(config.run_dir), tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints/epoch=0002")
    shutil.rmtree(part / "embeddings")
    info = json.loads((part / "run.json").read_text())
    files.write_json(str(part / "run.json"), {**info, "status": "running"})
    run(config.model_copy(update={"run_dir": str(part)}), resume=True)
    ours, theirs = (folder / "checkpoints/epoch=0002" for folder in (part, whole))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    states = [
        torch.load(folder / "training_state.pt", weights_only=True) for folder in (ours, theirs)
    ]
    assert states[0]["scaler"] == states[1]["scaler"]
    assert states[0]["scaler"]["_growth_tracker"] == 6  # steps in both epochs: it was restored


def test_cvact_is_scored_on_val_and_on_test_within_five_metres(
    ray_cluster: None, tmp_path: Path
) -> None:
    source = cvact_tree(tmp_path / "source", train=2, val=3, test=6, unlisted=1)
    dataset = cvact.convert(str(source), str(tmp_path / "data"))
    sizes = ["data.query_size=[32,64]", "data.reference_size=[48,48]", "train.precision=fp32"]
    config = paper_config("cvact", tmp_path, dataset, *sizes)
    encoder = Encoder.build(config.model)
    torch.save(encoder.state_dict(), tmp_path / "published.pth")
    for split, count in (("val", 3), ("test", 7)):
        (found,) = evaluate(
            str(tmp_path / "published.pth"),
            dataset.uri,
            config=config,
            split=None if split == "val" else split,
        )
        metrics = found.score.metrics["strict"]
        assert (found.split, metrics["queries"], metrics["references"]) == (split, count, count)
        queries, gallery = dataset.table("queries", [split]), dataset.table("references", [split])
        scores = scores_loop(*by_hand(encoder, queries, gallery, config))
        best = [int(np.argmax(row)) for row in scores]
        located = np.flatnonzero(np.isfinite(queries.lat))
        metres = [
            metres_between(
                queries.lat[i], queries.lon[i], gallery.lat[best[i]], gallery.lon[best[i]]
            )
            for i in located
        ]
        assert metrics["recall@1_within_5m"] == pytest.approx(np.mean([m <= 5 for m in metres]))
        assert "recall@10_within_25m" in metrics


def test_weights_are_used_in_the_precision_of_their_configuration_and_runs_in_their_own(
    tmp_path: Path,
) -> None:
    config = load_config(
        CONFIGS / "cvusa.yaml", ["train.precision=fp16", "train.channels_last=auto"]
    )
    auto = config.model_copy(
        update={"train": config.train.model_copy(update={"precision": "auto"})}
    )
    assert EncoderSource("x", config).numerics_for(config.train) == Numerics("fp16")
    assert EncoderSource("x", auto).numerics_for(auto.train) == Numerics("fp32")
    chosen = Numerics("bf16", channels_last=True)
    of_run = EncoderSource("x", auto, "checkpoint", asdict(chosen))
    assert of_run.numerics_for(auto.train) == chosen
    assert of_run.numerics_for(config.train) == Numerics("fp16")


def test_images_that_are_left_out_are_counted_and_listed_with_the_result(
    ray_cluster: None, tmp_path: Path
) -> None:
    dataset = cvusa.convert(
        str(cvusa_tree(tmp_path / "source", train=2, test=4)), str(tmp_path / "data")
    )
    broken = dataset.table("references", ["test"]).uris[1]
    Path(broken).write_bytes(b"")
    sizes = ["data.query_size=[32,64]", "data.reference_size=[48,48]", "train.precision=fp32"]
    config = paper_config("cvusa", tmp_path, dataset, *sizes, "data.on_bad_image=skip")
    torch.save(Encoder.build(config.model).state_dict(), tmp_path / "published.pth")
    (found,) = evaluate(str(tmp_path / "published.pth"), dataset.uri, config=config)
    (reason,) = found.as_dict()["bad_images"]
    assert broken in reason
    assert found.score.metrics["strict"]["queries_without_reference"] == 1
    assert "(1 image left out)" in rendered(evaluation_tables([found]))


def test_university_is_scored_with_its_distractors_and_as_published_without(
    ray_cluster: None, tmp_path: Path
) -> None:
    source = university_tree(tmp_path / "source", test=6, distractors=5, drones=4)
    both: dict[str, Callable[[], GeoDataset]] = {
        "d2s": lambda: university1652.convert(str(source), str(tmp_path / "d2s")),
        "s2d": lambda: university1652.convert(
            str(source), str(tmp_path / "s2d"), query_view="satellite", reference_view="drone"
        ),
    }
    torch.manual_seed(0)
    encoder = Encoder.build(load_config(CONFIGS / "university1652.yaml", SMALL).model)
    torch.save(encoder.state_dict(), tmp_path / "published.pth")
    for make in both.values():
        dataset = make()
        config = paper_config(
            "university1652",
            tmp_path,
            dataset,
            "data.query_size=[48,48]",
            "data.reference_size=[48,48]",
        )
        (found,) = evaluate(str(tmp_path / "published.pth"), dataset.uri, config=config)
        queries = dataset.table("queries", ["test"])
        for protocol, splits in (("strict", ["test", "gallery"]), ("paper", ["test"])):
            gallery = dataset.table("references", splits)
            vectors = by_hand(encoder, queries, gallery, config)
            places = queries.place_ids.tolist(), gallery.place_ids.tolist()
            far = np.full((len(queries), len(gallery)), np.inf)
            wanted = metrics_loop(
                scores_loop(*vectors), *places, [[]] * len(queries), far, protocol
            )
            metrics = found.score.metrics[protocol]  # type: ignore[index]
            assert metrics["references"] == len(gallery)
            for key in ("recall@1", "recall@5", "ap"):
                assert metrics[key] == pytest.approx(wanted[key])
        assert found.score.metrics["paper"]["recall@1"] >= found.score.metrics["strict"]["recall@1"]


def test_sources_that_cannot_be_evaluated_are_refused(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no run, no export"):
        evaluate(str(tmp_path), synthetic.uri)
    torch.save({"logit_scale": torch.ones([])}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="name a configuration with --config"):
        evaluate(str(tmp_path / "w.pth"), synthetic.uri)
    config = load_config(CONFIGS / "cvusa.yaml", SMALL)
    for overrides, options, message in (
        ([], {"split": "val"}, "no queries of split 'val'; it has test, train"),
        ([], {"epoch": 3}, "has no epochs to choose from"),
        ([], {"heading": "north"}, "data.query_heading"),
        ([], {"fovs": [0]}, "query_fov_deg"),
        (["data.query_heading=known"], {}, "24 of 24 test queries have no heading_deg"),
        (["data.query_heading=as_is"], {}, r"w\.pth.* does not fit Encoder, .* missing model"),
        (["data.query_heading=as_is"], {"out": str(tmp_path)}, "was not begun by an evaluation"),
        (["data.size=3"], {}, "unknown key 'data.size'"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(
                str(tmp_path / "w.pth"),
                synthetic.uri,
                config=config,
                overrides=overrides,
                **options,
            )
    assert open_dataset(synthetic.uri).name == "synthetic"


@pytest.mark.parametrize("cpus", [(2.0, 2.0), (0.0, 2.0)])
def test_several_nodes_without_a_folder_of_all_are_refused_before_anything_is_embedded(
    cpus: tuple[float, ...], synthetic: GeoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(CONFIGS / "cvusa.yaml", [*SMALL, "data.query_heading=as_is"])
    torch.save(Encoder.build(config.model).state_dict(), tmp_path / "w.pth")
    nodes = [Node(number) for number in cpus]
    monkeypatch.setattr(
        "s4g_ray.pipeline.stages.evaluation_job.ray_session", lambda *_: nullcontext(nodes)
    )
    with pytest.raises(
        InputError, match=r"^the cluster has 2 nodes; give --out s3://\.\.\. or a folder that all"
    ):
        evaluate(str(tmp_path / "w.pth"), synthetic.uri, config=config)
