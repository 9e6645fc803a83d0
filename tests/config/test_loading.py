from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from s4g_ray.config.loading import dump_config, load_config, parse_config
from s4g_ray.errors import InputError
from s4g_ray.storage.files import write_bytes

MINIMAL = {"run_dir": "runs/x", "data": {"uri": "data/x"}, "augment": {"rotate": "reference"}}
CONFIGS = Path(__file__).parents[2] / "configs"


def write_config(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid_and_survive_a_round_trip(
    path: Path, tmp_path: Path
) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


# arXiv 2303.11851 and its published code: the values that all data sets share
PAPER = {
    "model.name": "convnext_base.fb_in22k_ft_in1k_384",
    "model.temperature": 0.07,
    "data.reference_size": (384, 384),
    "train.batch_size": 128,
    "train.learning_rate": 1e-3,
    "train.weight_decay": 0.01,
    "train.clip_value": 100.0,
    "train.label_smoothing": 0.1,
    "train.precision": "fp16",
    "data.antialias": False,
    "protocol": "paper",
    "augment.flip_probability": 0.5,
    "augment.rotate_probability": 0.75,
    "augment.jpeg_probability": 0.5,
    "augment.jpeg_quality": (90, 100),
    "augment.color_probability": 0.5,
    "augment.color_strength": 0.15,
    "augment.blur_probability": 0.3,
    "augment.dropout_probability": 0.3,
    "embedding.batch_size": 128,
    "seed": 1,
}
NEIGHBORS = {
    "sampling.mode": "similarity",
    "sampling.num_hard_negatives": 64,
    "sampling.neighbor_pool_size": 128,
    "mining.every_epochs": 4,
    "evaluation.every_epochs": 4,
    "augment.rotate": "panorama",
    "train.epochs": 40,
    "train.warmup_epochs": 1.0,
}
OF_DATA_SET: dict[str, dict[str, object]] = {
    "cvusa": {
        **NEIGHBORS,
        "data.query_size": (round(224 / 1232 * 768), 768),
        "data.test_split": "test",
    },
    "cvact": {
        **NEIGHBORS,
        "data.query_size": (140, 768),
        "data.test_split": "val",
        "evaluation.radii_m": (5, 25, 50),
    },
    "vigor_same": {**NEIGHBORS, "data.query_size": (384, 768)},
    "vigor_cross": {**NEIGHBORS, "data.query_size": (384, 768)},
    "university1652": {
        "data.query_size": (384, 384),
        "train.epochs": 1,
        "train.warmup_epochs": 0.1,
        "sampling.mode": "random",
        "augment.rotate": "reference",
    },
}


@pytest.mark.parametrize("name", OF_DATA_SET)
def test_the_papers_configurations_hold_the_papers_values(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    for key, wanted in {**PAPER, **OF_DATA_SET[name]}.items():
        section, _, leaf = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, leaf) == wanted, key


@pytest.mark.parametrize("name", OF_DATA_SET)
def test_the_papers_configurations_augment_by_the_loader(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.train.use_gpu
    assert not config.augmentation.is_on_device("cuda")
    strict = load_config(CONFIGS / f"{name}.yaml", ["protocol=strict"])
    assert strict.augmentation.is_on_device("cuda")


def test_the_paper_s_protocol_keeps_the_neighbors_of_a_tile_s_last_panorama() -> None:
    path = CONFIGS / "vigor_same.yaml"
    assert load_config(path).settled_mining.merge_queries is False
    assert load_config(path, ["protocol=strict"]).settled_mining.merge_queries is True
    assert load_config(path, ["mining.merge_queries=true"]).settled_mining.merge_queries is True


def test_two_workers_on_one_gpu_are_refused_and_one_with_half_a_gpu_is_accepted() -> None:
    load_config(CONFIGS / "cvusa.yaml", ["train.gpus_per_worker=0.5"])
    load_config(CONFIGS / "cvusa.yaml", ["train.num_workers=4"])
    with pytest.raises(InputError, match="two workers on one GPU"):
        load_config(CONFIGS / "cvusa.yaml", ["train.num_workers=2", "train.gpus_per_worker=0.5"])


def test_overrides_are_yaml_values_and_replace_those_of_the_file(tmp_path: Path) -> None:
    path = write_config(tmp_path, {**MINIMAL, "train": {"epochs": 7}})
    config = load_config(
        path, ["train.epochs=3", "data.query_size=[140, 768]", "model.pretrained=false"]
    )
    assert config.train.epochs == 3
    assert config.data.query_size == (140, 768)
    assert config.model.pretrained is False


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.epoch", "train.epochs"),
        ("sampelr.num_hard_negatives", "sampling.num_hard_negatives"),
        ("train.lerning_rate", "train.learning_rate"),
        ("epochs", "train.epochs"),
        ("sede", "seed"),
        ("mining.every_epoch", "mining.every_epochs"),
        ("traning.batch_size", "train.batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(tmp_path: Path, key: str, nearest: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write_config(tmp_path, MINIMAL), [f"{key}=3"])
    assert str(caught.value) == f"unknown key {key!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=63", "batch_size=63 is not divisible by num_workers=2"),
        (
            "sampling.num_hard_negatives=200",
            "num_hard_negatives=200 exceeds neighbor_pool_size=128",
        ),
        ("train.epochs=0", "train.epochs=0"),
        ("train.epochs=x", "train.epochs='x'"),
        ("train.warmup_epochs=50", "warmup_epochs=50 exceeds epochs=40"),
        ("augment.flip_probability=1.5", "augment.flip_probability=1.5"),
        ("augment.jpeg_quality=[95, 90]", "jpeg_quality=[95, 90]"),
        ("data.on_bad_image=ignore", "data.on_bad_image='ignore'"),
        ("train.learning_rate=.nan", "train.learning_rate=nan"),
        ("data.query_size=[4, 4]", "below 8 pixels"),
        ("data.query_fov_deg=0", "query_fov_deg: 0 is no field of view: give degrees above 0"),
        ("data.query_fov_deg=wide", "'wide' is no field of view"),
        ("data.query_fov_deg=[70, 400]", "[70, 400] is no field of view"),
        ("data.query_fov_deg=[90]", "[90] is no range of two rising values"),
        ("data.query_fov_deg=[180, 70]", "[180, 70] is no range of two rising values"),
        ("data.query_fov_deg=[1, 360]", "query_fov_deg=1 leaves 1 pixels of width, below 8"),
        (
            "data.reference_size=[64, 96]",
            "data.reference_size=[64, 96] is not square, but augment.rotate=reference",
        ),
        ("mining.schedule=beside", "mining.schedule='beside'"),
        (
            "mining.max_staleness_epochs=2",
            "max_staleness_epochs=2 is below every_epochs + lag_epochs - 1 = 3",
        ),
        ("train.num_workers=[3, 2]", "num_workers=[3, 2] must be [min, max]"),
        ("embedding.num_actors=[3, 2]", "num_actors=[3, 2] must be [min, max]"),
        ("data.val_split=test", "data.val_split='test' is the test or the train split"),
        ("train", "not of the form"),
        ("train.epochs.x=1", "unknown key"),
        ("train=3", "train=3"),
    ],
)
def test_the_error_of_an_impossible_value_names_it(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write_config(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)


def test_an_empty_section_accepts_overrides_and_an_object_store_may_hold_the_file(
    tmp_path: Path,
) -> None:
    path = write_config(tmp_path, {**MINIMAL, "train": None})
    assert load_config(path, ["train.epochs=3"]).train.epochs == 3
    write_bytes("memory://c/config.yaml", path.read_bytes())
    assert load_config("memory://c/config.yaml", ["train.epochs=4"]).train.epochs == 4


def test_a_missing_key_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.uri: this key is required"):
        parse_config({"run_dir": "x", "data": {}})
    with pytest.raises(InputError, match="cannot read the configuration"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
