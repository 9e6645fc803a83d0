"""The loggers of a run, from records to what each tool shows."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from s4g_ray.config.schema import LoggerName, RunConfig
from s4g_ray.errors import InputError
from s4g_ray.pipeline.loggers import feed as feed_module
from s4g_ray.pipeline.loggers.logger_checks import PACKAGES, check_loggers
from s4g_ray.pipeline.loggers.run_loggers import RunLoggers
from s4g_ray.pipeline.records import parse_record
from s4g_ray.pipeline.report.examples import Example, Tile, encode_data_uri
from s4g_ray.pipeline.run import run
from s4g_ray.pipeline.run_folder import Record, RunFolder
from s4g_ray.progress import Reporter
from s4g_ray.storage import files
from tests.conftest import tiny_config
from tests.support.logging_tools import Series, Tools

ROOT = Path(__file__).parents[3]
NAMES: tuple[LoggerName, ...] = ("tensorboard", "wandb", "mlflow")
STEPS = 4  # of an epoch


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    monkeypatch.setattr(feed_module, "RETRY_S", 0.01)
    return Tools(monkeypatch)


def pixel() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return encode_data_uri(buffer.getvalue())


class Cut(Exception):  # noqa: N818
    """Stands for whatever ends a run early."""


class Session:
    """A driver's session: it resumes with the records that its checkpoint leaves."""

    def __init__(
        self,
        run_dir: str,
        *,
        before: list[Record] | None = None,
        after_epoch: int = 0,
        **sections: Any,
    ) -> None:
        self.config = tiny_config(run_dir, "data", **sections).model_copy(update={"loggers": NAMES})
        self.folder = RunFolder(run_dir, self.config, {}, before or [], [])
        self.folder.forget(after_epoch, after_epoch * STEPS)
        self.loggers = RunLoggers.from_config(self.config, self.folder, Reporter())
        self.folder.on_record = lambda line: self.loggers.on_record(parse_record(line))

    def train(self, first: int, last: int, *, is_cut: bool, evaluated: tuple[int, ...]) -> None:
        """Log steps first .. last, and the evaluations of epochs after all of them."""
        try:
            with self.loggers.running(self.folder.records, lambda: 20.0):
                self.folder.log("workers", workers=2, after_step=first - 1)
                for step in range(first, last + 1):
                    epoch = 1 + (step - 1) // STEPS
                    self.folder.log("step", epoch=epoch, step=step, loss=1 / step)
                    if step % STEPS == 0:
                        self.folder.log("epoch", epoch=epoch, step=step, loss=2 / step, graph="g")
                for epoch in evaluated:
                    self.folder.log("evaluation", epoch=epoch, **{"recall@1%": epoch / 8})
                if is_cut:
                    raise Cut
                tile = Tile(pixel(), "query", "query")
                self.loggers.show([Example("place 1", [tile, tile]), Example("place 2", [tile])])
        except Cut:
            pass


def expected_series() -> Series:
    """Of 12 steps, with evaluations after epochs 1 and 3, resumed after epoch 1."""
    return {
        "step/loss": [(step, 1 / step) for step in range(1, 13)],
        "epoch/loss": [(step, 2 / step) for step in (4, 8, 12)],
        "evaluation/recall@1%": [(4, 1 / 8), (12, 3 / 8)],
        "workers/workers": [(0, 2.0), (4, 2.0)],
    }


def train_in_two_sessions(run_dir: str) -> RunConfig:
    """Cut after step 10 of 12 with the first evaluation done; epoch 1 has the last checkpoint."""
    first = Session(run_dir)
    first.train(1, 10, is_cut=True, evaluated=(1,))
    second = Session(run_dir, before=first.folder.records, after_epoch=1)
    second.train(5, 12, is_cut=False, evaluated=(3,))
    return second.config


def test_each_tool_shows_each_number_once_at_its_step_though_steps_are_repeated(
    tools: Tools, tmp_path: Path
) -> None:
    config = train_in_two_sessions(str(tmp_path / "run"))
    expected = expected_series()
    folder = str(tmp_path / "run/tensorboard")
    assert dict(tools.tensorboard.scalars[folder]) == expected

    (wandb_run,) = tools.wandb.runs.values()
    series: Series = {}
    for row in wandb_run.rows:
        for name, value in row.items():
            if name not in ("step", "epoch", "retrievals"):
                series.setdefault(name, []).append((row["step"], value))
    assert series == expected
    assert wandb_run.axes == {"step": None, "*": "step"}
    assert wandb_run.config == config.model_dump(mode="json")
    assert wandb_run.exit_code == 0

    (mlflow_run,) = tools.mlflow.runs.values()
    expected["evaluation/recall_at_1_percent"] = expected.pop("evaluation/recall@1%")
    assert dict(mlflow_run.metrics) == expected
    assert mlflow_run.params["train.batch_size"] == "16"
    assert mlflow_run.name == "run"
    assert mlflow_run.status == "FINISHED"


def test_each_tool_shows_the_pictures_and_the_configuration_once(
    tools: Tools, tmp_path: Path
) -> None:
    train_in_two_sessions(str(tmp_path / "run"))
    folder = str(tmp_path / "run/tensorboard")
    images = tools.tensorboard.images[folder]
    assert [(tag, step) for tag, step, _ in images] == [("retrievals/1", 12), ("retrievals/2", 12)]
    (text,) = tools.tensorboard.texts[folder]
    assert "      batch_size: 16\n" in text  # indented: shown as code
    (wandb_run,) = tools.wandb.runs.values()
    shown = [row for row in wandb_run.rows if "retrievals" in row]
    assert [row["step"] for row in shown] == [12]
    assert [caption for _, caption in shown[0]["retrievals"]] == ["place 1", "place 2"]
    (mlflow_run,) = tools.mlflow.runs.values()
    assert [name for name, _ in mlflow_run.images] == [
        "retrievals/step_00000012_1.png",
        "retrievals/step_00000012_2.png",
    ]


def test_an_interrupted_run_counts_as_failed_or_killed_until_it_is_resumed(
    tools: Tools, tmp_path: Path
) -> None:
    Session(str(tmp_path / "run")).train(1, 3, is_cut=True, evaluated=())
    assert [held.exit_code for held in tools.wandb.runs.values()] == [1]
    assert [held.status for held in tools.mlflow.runs.values()] == ["KILLED"]


def test_points_that_no_state_knows_of_are_hidden_and_written_again_in_tensorboard(
    tools: Tools, tmp_path: Path
) -> None:
    """The driver was killed after it wrote points, and before it noted them."""
    run_dir = str(tmp_path / "run")
    first = Session(run_dir)
    first.train(1, 4, is_cut=True, evaluated=())
    state = tmp_path / "run/loggers/tensorboard.json"
    early = {**json.loads(state.read_text()), "step": 2, "last_step": 2, "keys": []}
    state.write_text(json.dumps(early))
    second = Session(run_dir, before=first.folder.records, after_epoch=1)
    second.train(5, 5, is_cut=True, evaluated=())
    shown = tools.tensorboard.scalars[f"{run_dir}/tensorboard"]
    assert shown["step/loss"] == [(step, 1 / step) for step in range(1, 6)]
    assert shown["epoch/loss"] == [(4, 0.5)]


def test_a_run_that_continues_with_other_values_is_a_new_run_of_each_tool(
    tools: Tools, tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    first = Session(run_dir)
    first.train(1, 8, is_cut=True, evaluated=())
    rate = {"learning_rate": 0.5}
    branch = Session(run_dir, before=first.folder.records, after_epoch=1, train=rate)
    branch.train(5, 6, is_cut=True, evaluated=())
    assert len(tools.wandb.runs) == len(tools.mlflow.runs) == 2
    newest = list(tools.mlflow.runs.values())[-1]
    assert [step for step, _ in newest.metrics["step/loss"]] == [1, 2, 3, 4, 5, 6]
    shown = tools.tensorboard.scalars[f"{run_dir}/tensorboard"]
    assert [step for step, _ in shown["step/loss"]] == [1, 2, 3, 4, 5, 6]


def test_keys_that_may_change_on_resume_continue_the_run_of_each_tool(
    tools: Tools, tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    first = Session(run_dir)
    first.train(1, 4, is_cut=True, evaluated=())
    second = Session(
        run_dir, before=first.folder.records, after_epoch=1, train={"cpus_per_worker": 2}
    )
    second.train(5, 6, is_cut=True, evaluated=())
    assert len(tools.wandb.runs) == len(tools.mlflow.runs) == 1


def test_below_an_object_store_event_files_are_uploaded(tools: Tools) -> None:
    run_dir = "memory://test-loggers/run"
    train_in_two_sessions(run_dir)
    names = files.list_names(f"{run_dir}/tensorboard")
    assert len(names) == 2  # of two sessions
    uploaded = [
        line
        for name in names
        for line in files.read_bytes(f"{run_dir}/tensorboard/{name}").decode().splitlines()
        if line.startswith("step/loss ")
    ]
    assert sorted(uploaded) == sorted(f"step/loss {step}" for step in range(1, 13))


def test_a_server_that_is_away_does_not_end_the_run_and_gets_all_later(
    tools: Tools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools.mlflow.error = ConnectionError("away")
    first = Session(str(tmp_path / "run"))
    first.train(1, 4, is_cut=True, evaluated=(1,))
    assert not tools.mlflow.runs
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("mlflow: cannot write (ConnectionError: away); the run continues") == 1
    assert "mlflow: 7 records were not written; metrics.jsonl has them" in output
    tools.mlflow.error = None
    second = Session(str(tmp_path / "run"), before=first.folder.records, after_epoch=1)
    second.train(5, 12, is_cut=False, evaluated=(3,))
    (mlflow_run,) = tools.mlflow.runs.values()
    assert mlflow_run.metrics["step/loss"] == expected_series()["step/loss"]
    assert mlflow_run.metrics["evaluation/recall_at_1_percent"] == [(4, 1 / 8), (12, 3 / 8)]


def test_the_environment_names_the_experiment_of_mlflow(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "geo")
    Session(str(tmp_path / "run")).train(1, 1, is_cut=True, evaluated=())
    (mlflow_run,) = tools.mlflow.runs.values()
    assert tools.mlflow.experiments["geo"] == mlflow_run.experiment


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_refused_before_anything_is_written(
    name: LoggerName, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name].module, None)  # importing it fails
    config = tiny_config(tmp_path / "run", "data").model_copy(update={"loggers": (name,)})
    wanted = rf"loggers: {name} needs the package {PACKAGES[name].package} .*s4g-ray\[{name}\]"
    with pytest.raises(InputError, match=wanted):
        run(config)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_the_packages_name_is_no_package(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    with pytest.raises(InputError, match=r"s4g-ray\[wandb\]"):
        check_loggers(["wandb"])


def test_a_missing_key_of_wandb_is_refused_unless_it_is_offline(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.wandb.login_error = RuntimeError("api_key not configured (no-tty)")
    with pytest.raises(InputError, match=r"cannot log in .*WANDB_API_KEY.*WANDB_MODE=offline"):
        check_loggers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(["wandb"])


def test_a_store_that_mlflow_cannot_use_is_refused(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ValueError("unsupported URI 'sqlite:///a.db'")

    monkeypatch.setattr(sys.modules["mlflow"], "MlflowClient", refuse)
    with pytest.raises(InputError, match=r"unsupported URI .*; set MLFLOW_TRACKING_URI"):
        check_loggers(["mlflow"])


def test_all_loggers_pass_the_check_with_their_packages(tools: Tools) -> None:
    check_loggers(NAMES)


def test_each_logger_is_an_extra_that_installs_its_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name, needed in PACKAGES.items():
        assert [text.partition(">=")[0] for text in extras[name]] == [needed.package]


def test_the_stand_in_of_the_summary_writer_has_the_parameters_of_torch(tools: Tools) -> None:
    """Read from torch's source, because its module needs tensorboard."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "utils/tensorboard/writer.py"
    tree = ast.parse(source.read_text())
    (real,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SummaryWriter"]
    methods = {node.name: node for node in real.body if isinstance(node, ast.FunctionDef)}
    fake = sys.modules["torch.utils.tensorboard"].SummaryWriter
    names = ("__init__", "add_scalar", "add_image", "add_text", "flush", "close")
    for name in names:
        wanted = [argument.arg for argument in methods[name].args.args]
        code = getattr(fake, name).__code__
        assert list(code.co_varnames[: code.co_argcount]) == wanted, name


def test_a_logger_that_is_named_twice_is_refused() -> None:
    config = tiny_config("run", "data").model_dump()
    with pytest.raises(ValueError, match="names one twice"):
        RunConfig.model_validate({**config, "loggers": ["wandb", "wandb"]})
