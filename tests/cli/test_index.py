from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from s4g_ray.cli.index import index_app
from s4g_ray.config.loading import dump_config
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.errors import InputError
from tests.conftest import NUM_TRAIN, tiny_config, write_synthetic


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(index_app, ["plan", *arguments], env={"COLUMNS": "200"})


def test_kind_memory_and_times_are_printed_before_anything_is_built() -> None:
    done = plan(
        "--vectors",
        "1000000",
        "--dim",
        "64",
        "--kind",
        "ivf_rabitq",
        "--shards",
        "4",
        "--queries",
        "5000",
    )
    assert done.exit_code == 0, done.stderr
    for words in (
        "1,000,000 of D=64",
        "memory of a version",
        "while one is built",
        "the version in service, the new one",
        "why",
        "ivf_rabitq in 4 shards: ",
        "ivf_rabitq (approximate",
        "lists",
        "2,048",
        "bits a value",
        "MB in each of 4 shards",
        " of it training",
        "search of 5,000 queries",
        " a second",
        "extrapolated, by counted work",
        "Shards work at the same time, each on cores of its own",
    ):
        assert words in done.stdout, words


def test_json_holds_the_plan_the_share_of_a_shard_and_the_rates() -> None:
    done = plan(
        "--vectors",
        "50000",
        "--dim",
        "32",
        "--memory-gb",
        "0.004",
        "--shards",
        "2",
        "--threads",
        "1",
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["plan"]["kind"], result["plan"]["num_vectors"], result["num_shards"]) == (
        "sqfp16",
        50_000,
        2,
    )
    assert result["shard_gb"] == pytest.approx(50_000 * (2 * 32 + 8) / 1e9 / 2)
    assert result["peak_gb"] == pytest.approx(3 * result["shard_gb"] + 0.5)
    assert result["reason"] == result["plan"]["reason"]
    assert result["num_queries"] == 50_000
    assert result["cost"]["search_s"] > 0
    assert result["rates"]["num_threads"] == 1


def test_nodes_give_room_for_shards_that_are_counted() -> None:
    done = plan(
        *("--vectors", "30000000", "--dim", "64", "--kind", "sqfp16", "--json"),
        *("--nodes", "3", "--node-gb", "8", "--node-cores", "4", "--shards", "auto"),
        *("--queries", "1000"),
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["num_shards"] == 2  # 4.08 GB, three times while it swaps, do not fit in one
    assert result["peak_gb"] < 8


def test_a_configuration_gives_vectors_dim_and_keys_and_options_override_it(
    synthetic: GeoDataset, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        dump_config(tiny_config(tmp_path / "run", synthetic.uri, mining={"index_kind": "sqfp16"}))
    )
    result = json.loads(plan(str(path), "mining.num_shards=3", "--json").stdout)
    assert (result["plan"]["kind"], result["plan"]["num_vectors"], result["num_shards"]) == (
        "sqfp16",
        NUM_TRAIN,
        3,
    )
    assert result["plan"]["dim"] == 64  # timm's test_convnext
    result = json.loads(
        plan(str(path), "--kind", "flat", "--vectors", "70", "--dim", "5", "--json").stdout
    )
    assert [result["plan"][key] for key in ("kind", "num_vectors", "dim")] == ["flat", 70, 5]
    on_gpu = plan(str(path), "mining.gpus_per_shard=1", "--vectors", "500000").stdout
    assert "from recorded rates of a GPU" in on_gpu
    assert not (tmp_path / "run").exists()


def test_the_references_of_a_run_and_of_its_gallery_are_counted_apart(tmp_path: Path) -> None:
    """Uses a data set with 9 train references that have no query."""
    path = tmp_path / "config.yaml"
    uri = write_synthetic(tmp_path / "data", num_gallery=9).uri
    path.write_text(dump_config(tiny_config(tmp_path / "run", uri)))
    alone = json.loads(plan(str(path), "--json").stdout)
    assert (alone["plan"]["num_vectors"], alone["num_queries"]) == (NUM_TRAIN, NUM_TRAIN)
    assert "gallery" not in alone
    result = json.loads(plan(str(path), "sampling.gallery_negatives=4", "--json").stdout)
    assert result["plan"] == alone["plan"]
    assert (result["gallery"]["plan"]["num_vectors"], result["gallery"]["num_queries"]) == (
        9,
        NUM_TRAIN,
    )
    printed = plan(str(path), "sampling.gallery_negatives=4", "--queries", "50").stdout
    for words in (
        "references of pairs",
        "references of gallery",
        "9 of D=64",
        "search of 50 queries",
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "how many vectors? Give --vectors N and --dim D, or a CONFIG"),
        (["--vectors", "9"], "how many values has a vector? Give --dim D"),
        (["--vectors", "0", "--dim", "3"], "0 vectors of D=3: both must be at least 1"),
        (["--vectors", "9", "--dim", "3", "--queries", "0"], "--queries 0 is below 1"),
        (["--vectors", "9", "--dim", "3", "--kind", "ivf"], "mining.index_kind='ivf'"),
        (["--vectors", "9", "--dim", "3", "--shards", "0"], "mining.num_shards: '0' is neither"),
        (["--vectors", "9", "--dim", "3", "--nodes", "0"], "--nodes, --node-gb and --node-cores"),
        (
            ["--vectors", "100000000", "--dim", "256", "--nodes", "2", "--node-gb", "4"],
            "the nodes have 4, 4 GB free: add nodes",
        ),
        (
            ["--vectors", "10000000", "--dim", "256", "--memory-gb", "0.1"],
            "raise mining.index_memory_gb",
        ),
        (["mining.num_shards=2"], "KEY=VALUE changes a CONFIG; name that first"),
        (["/no/such.yaml"], "cannot read the configuration /no/such.yaml"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str) -> None:
    error = plan(*arguments).exception
    assert isinstance(error, InputError)  # which s4g turns into exit code 2
    assert message in str(error)
    assert len(str(error).splitlines()) == 1


def test_help_needs_no_slow_import() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from s4g_ray.cli.index import index_app\n"
        "assert CliRunner().invoke(index_app, ['plan', '--help']).exit_code == 0\n"
        "assert not {'torch', 'faiss', 'numba', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
