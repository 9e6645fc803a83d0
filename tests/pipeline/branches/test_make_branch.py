"""Branches of a run: what is kept, what is recorded, what is refused, and interruptions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s4g_ray.config.loading import load_config
from s4g_ray.config.schema import RunConfig
from s4g_ray.data.dataset import GeoDataset
from s4g_ray.encoder.checkpoint import newest_checkpoint
from s4g_ray.encoder.source import open_source
from s4g_ray.errors import InputError, RunError
from s4g_ray.pipeline.branches.branch import check_branch
from s4g_ray.pipeline.branches.make_branch import make_branch
from s4g_ray.pipeline.run_folder import RunFolder, find_start
from s4g_ray.pipeline.run_start import check_start
from s4g_ray.storage import files
from tests.support.branched_runs import NUMERICS, STEPS, read_tree, run_config, write_run
from tests.support.faulty_s3 import Store

LATER = (  # what followed epoch 2, but the indexes and what was not published
    "checkpoints/epoch=0003/",
    "checkpoints/epoch=0004/",
    "checkpoints/step=0015/",
    "embeddings/v=0003/",
    "neighbors/v=0003/",
    "plans/epoch=0003.parquet",
    "plans/epoch=0004.parquet",
    "report.html",
)
REWRITTEN = ("config.yaml", "metrics.jsonl", "run.json")
HALVED = {"train": {"learning_rate": 5e-4}}
CHANGED = {"train.learning_rate": [1e-3, 5e-4]}


@pytest.fixture(scope="module")
def finished(synthetic: GeoDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which the tests copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    write_run(str(run), synthetic)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> str:
    shutil.copytree(finished, tmp_path / "run")
    return str(tmp_path / "run")


Resume = Callable[..., RunFolder]


@pytest.fixture
def resume(run: str, synthetic: GeoDataset) -> Resume:
    def reopen(from_epoch: int | None = None, **sections: dict[str, Any]) -> RunFolder:
        config = run_config(run, synthetic.uri, **sections)
        return RunFolder.open(config, synthetic, resume=True, from_epoch=from_epoch)

    return reopen


def branch(folder: RunFolder) -> RunFolder:
    """Make the branch of a folder, as the driver does."""
    make_branch(folder)
    folder.start()
    return folder


def records(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def info_of(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / "run.json").read_text())
    return found


def test_what_followed_is_kept_and_what_was_before_stays(run: str, resume: Resume) -> None:
    before = read_tree(run)
    folder = resume(2, **HALVED)
    assert read_tree(run) == before
    branch(folder)
    after = read_tree(run)
    kept = read_tree(f"{run}/branches/0001")
    for name, content in before.items():
        is_later = name.startswith(LATER)
        is_dropped = name.startswith(("index/v=0003/", "embeddings/v=0004/"))
        assert (after.get(name) == content) is not (is_later or is_dropped or name in REWRITTEN)
        assert (kept.get(name) == content) is (is_later or name in ("config.yaml", "metrics.jsonl"))
    assert kept.keys() - before.keys() == {"branch.yaml"}
    below = {name for name in after if not name.startswith("branches/")}
    assert below <= before.keys()
    newest = newest_checkpoint(run)
    assert newest is not None
    assert (newest.epoch, newest.step, newest.batch) == (2, 2 * STEPS, 0)


def test_the_branch_is_recorded_and_the_run_continues_with_its_values(
    run: str, resume: Resume
) -> None:
    former = records(run)
    folder = resume(2, **HALVED)
    assert folder.branch is not None
    assert folder.branch.summary() == (
        "branch from epoch 2: train.learning_rate 0.001 -> 0.0005; what followed is kept in"
        " branches/0001"
    )
    start = find_start(folder)
    assert start is not None
    assert start.epoch == 2
    branch(folder)
    *lines, last = records(run)
    assert lines == [
        line for line in former if line.get("epoch", line.get("during_epoch")) in (1, 2)
    ]
    assert (last["kind"], last["from_epoch"], last["changed"]) == ("branch", 2, CHANGED)
    assert last["removed"] == ["index/v=0003"]
    info = info_of(run)
    entry = {key: last[key] for key in ("name", "from_epoch", "changed", "removed")}
    assert (info["status"], info["branches"]) == ("running", [entry])
    assert "branching" not in info
    assert load_config(f"{run}/config.yaml").train.learning_rate == 5e-4
    # a plain resume continues the branch, with its values alone
    assert resume(**HALVED).branch is None
    with pytest.raises(InputError, match=r"train\.learning_rate: 0\.0005 -> 0\.001"):
        resume()
    assert folder.records == records(run)


def test_the_command_that_made_a_branch_continues_it_when_it_is_repeated(
    run: str, resume: Resume
) -> None:
    branch(resume(2, **HALVED))
    assert resume(2, **HALVED).branch is None
    again = resume(2, train={"learning_rate": 2.5e-4}).branch
    assert again is not None
    assert (again.name, again.changed) == ("0002", {"train.learning_rate": [5e-4, 2.5e-4]})
    earlier = resume(0, **HALVED)
    assert earlier.branch is not None
    branch(earlier)
    assert [line["kind"] for line in records(run)] == ["branch"]
    names = [entry["name"] for entry in info_of(run)["branches"]]
    assert names == ["0001", "0002"]


def test_the_former_line_is_evaluated_and_exported_but_not_resumed(
    run: str, resume: Resume, synthetic: GeoDataset
) -> None:
    branch(resume(2, **HALVED))
    former = f"{run}/branches/0001"
    source = open_source(former, synthetic.uri)
    assert source.checkpoint == f"{former}/checkpoints/epoch=0004"
    assert source.config.train.learning_rate == 1e-3
    config = run_config(former, synthetic.uri)
    for from_epoch in (None, 3):
        with pytest.raises(InputError, match="evaluated and exported, not resumed; set run_dir to"):
            RunFolder.open(config, synthetic, resume=True, from_epoch=from_epoch)


def test_the_best_epoch_is_one_before_the_branch_whose_checkpoint_is_there(
    run: str, resume: Resume
) -> None:
    # epoch 1 was better than epoch 2, but its checkpoint is removed
    branch(resume(2, **HALVED))
    assert info_of(run)["best"] == {"epoch": 2, "metric": "recall@1", "value": 0.3}
    branch(resume(0, **HALVED))
    assert "best" not in info_of(run)


def test_choices_of_the_first_start_are_kept_unless_their_keys_change(
    run: str, resume: Resume
) -> None:
    branch(resume(3, **HALVED))
    assert (info_of(run)["numerics"], info_of(run)["exact_engine"]) == (NUMERICS, "torch")
    branch(resume(2, train={"precision": "bf16"}))
    assert "numerics" not in info_of(run)
    assert info_of(run)["exact_engine"] == "torch"
    branch(resume(2, train={"precision": "bf16"}, mining={"exact_engine": "faiss"}))
    assert "exact_engine" not in info_of(run)


@pytest.mark.s3
def test_a_run_in_an_object_store_branches_as_a_local_one_does(
    run: str, resume: Resume, synthetic: GeoDataset, store: Store, tmp_path: Path
) -> None:
    remote = "s3://data/branched"
    filesystem, root = files.filesystem_of(remote)
    for name, content in read_tree(run).items():
        files.write_bytes(f"{remote}/{name}", content.replace(run.encode(), remote.encode()))
    config = run_config(remote, synthetic.uri, **HALVED)
    branch(RunFolder.open(config, synthetic, resume=True, from_epoch=2))
    branch(resume(2, **HALVED))
    for path in filesystem.find(root):
        content = files.read_bytes(f"s3://{path}").replace(remote.encode(), run.encode())
        files.write_bytes(f"{tmp_path}/copy/{path.removeprefix(root)}", content)
    assert without_times(read_tree(tmp_path / "copy")) == without_times(read_tree(run))


class KilledError(Exception):
    """Stands for the death of the driver."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the driver die before its `number`th change of a file; return the changes so far."""
    changes: list[str] = []
    for name in ("_write_whole", "move", "remove"):
        function = getattr(files, name)

        def change(uri: str, *more: Any, function: Any = function, name: str = name) -> Any:
            if len(changes) == number:
                raise KilledError
            changes.append(f"{name} {uri}")
            return function(uri, *more)

        monkeypatch.setattr(files, name, change)
    return changes


def without_times(tree: dict[str, bytes]) -> dict[str, Any]:
    """Parse metrics.jsonl, whose lines carry the time."""
    lines = [json.loads(line) for line in tree["metrics.jsonl"].splitlines()]
    parsed = [{key: value for key, value in line.items() if key != "time"} for line in lines]
    return {**tree, "metrics.jsonl": parsed}


def test_a_branch_that_was_interrupted_anywhere_is_completed_by_either_command(
    run: str, resume: Resume, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        changes = kill_at(patch, 1000)
        branch(resume(2, **HALVED))
    wanted = without_times(read_tree(run))
    before = read_tree(finished)
    first = changes.index(f"_write_whole {run}/run.json")
    assert first < len(changes) - 10
    for number in range(len(changes)):
        shutil.rmtree(run)
        shutil.copytree(finished, run, copy_function=os.link)  # files are replaced whole
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(KilledError):
                branch(resume(2, **HALVED))
        has_begun = number > first
        if not has_begun:  # the run is as it was, and resumes so
            tree = read_tree(run)
            assert {name: tree[name] for name in before} == before
            assert resume().branch is None
        elif "branching" in info_of(run):
            with pytest.raises(InputError, match=r"interrupted while it branched from epoch 2"):
                resume()
            with pytest.raises(InputError, match=r"give .* --resume --from-epoch 2"):
                resume(0, **HALVED)
        folder = resume(2 if number % 2 or not has_begun else None, **HALVED)
        if folder.branch is None:  # all was done
            folder.start()
        else:
            branch(folder)
        assert without_times(read_tree(run)) == wanted, number


def test_an_interrupted_branch_may_be_completed_with_other_values(
    run: str, resume: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 9)
        with pytest.raises(KilledError):
            branch(resume(2, **HALVED))
    assert info_of(run)["branching"]["changed"] == CHANGED
    branch(resume(2, train={"clip_value": 1.0}))
    (entry,) = info_of(run)["branches"]
    assert entry["changed"] == {"train.clip_value": [100.0, 1.0]}
    assert load_config(f"{run}/config.yaml").train.clip_value == 1.0


@pytest.mark.parametrize(
    ("from_epoch", "sections", "message"),
    [
        (1, {}, r"no checkpoint after epoch 1.* after epochs 0, 2, 3, 4: choose one"),
        (-1, {}, r"no checkpoint after epoch -1"),
        (4, {}, r"from epoch 4 has no epoch to train with train\.epochs=4; raise"),
        (
            2,
            {"model": {"temperature": 0.1}},
            r"model\.temperature: 0\.07 -> 0\.1\), which a branch",
        ),
        (2, {"data": {"query_size": [64, 32]}}, r"data\.query_size: \[32, 32\] -> \[64, 32\]"),
        (2, {"evaluation": {"radii_m": [5]}}, r"evaluation\.radii_m: .* set them back, or start"),
        (2, {"embedding": {"dtype": "float32"}}, r"embedding\.dtype"),
        (2, {"sampling": {"exclude_radius_m": 5}}, r"sampling\.exclude_radius_m"),
        (
            3,
            {"mining": {"every_epochs": 1, "schedule": "overlap", "lag_epochs": 2}},
            r"epoch 4 would use the graph mined after epoch 1, but .* name another epoch",
        ),
    ],
)
def test_what_a_branch_cannot_be_is_refused_and_nothing_is_written(
    run: str, resume: Resume, from_epoch: int, sections: dict[str, Any], message: str
) -> None:
    shutil.rmtree(f"{run}/neighbors/v=0001")
    before = read_tree(run)
    with pytest.raises(InputError, match=message):
        resume(from_epoch, **HALVED | sections)
    assert read_tree(run) == before


def test_a_paper_run_keeps_its_batch_size(run: str, synthetic: GeoDataset) -> None:
    config = run_config(run, synthetic.uri)
    changes = {"train.batch_size": [16, 8]}
    check_branch(run, config, changes, 2)
    paper = config.model_copy(update={"protocol": "paper"})
    with pytest.raises(InputError, match="whose schedule counts steps of one size; set it back"):
        check_branch(run, paper, changes, 2)


def test_a_damaged_checkpoint_is_refused_before_anything_moves(run: str, resume: Resume) -> None:
    path = Path(run) / "checkpoints/epoch=0002/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    before = read_tree(run)
    with pytest.raises(RunError, match=r"epoch=0002/model\.safetensors differs from the published"):
        resume(2, **HALVED)
    assert read_tree(run) == before


def test_an_epoch_is_named_only_for_a_run_that_is_resumed(run: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="new holds no run that could continue after epoch 2"):
        check_start(str(tmp_path / "new"), resume=True, from_epoch=2)
    with pytest.raises(InputError, match="--from-epoch 2 continues a run that exists; add"):
        check_start(run, resume=False, from_epoch=2)


def test_a_plain_resume_names_the_epochs_that_could_take_other_values(resume: Resume) -> None:
    with pytest.raises(
        InputError, match=r"0\.0005\); set them back, .*--from-epoch N .* 0, 2, 3, 4"
    ):
        resume(**HALVED)
    with pytest.raises(InputError) as caught:
        resume(**HALVED, model={"temperature": 0.1})
    assert "--from-epoch" not in str(caught.value)
    assert caught.match(r"train\.learning_rate: .*model\.temperature|model\.temp.*train\.learning")


def test_memory_is_saved_without_a_branch(resume: Resume) -> None:
    folder = resume(
        train={"micro_batch_size": 4},
        model={"grad_checkpointing": True},
        embedding={"batch_size": 8},
    )
    assert folder.branch is None
    config: RunConfig = folder.config
    assert (config.train.micro_batch_size, config.embedding.batch_size) == (4, 8)


def test_what_follows_the_newest_epoch_is_nothing_and_more_epochs_may_be_trained(
    run: str, resume: Resume
) -> None:
    before = read_tree(run)
    branch(resume(4, train={"epochs": 6}))
    after = read_tree(run)
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {*REWRITTEN, "report.html"}
    assert info_of(run)["branches"][0]["changed"] == {"train.epochs": [4, 6]}
