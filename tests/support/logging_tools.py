"""Stand-ins of TensorBoard, Weights & Biases and MLflow, with the parameters of the real ones.

They keep in memory what a user of the tool would see. Parameters are those of torch 2.15, wandb
0.31.0 and mlflow-skinny 3.17.2.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

Series = dict[str, list[tuple[int, float]]]  # (step, value) by name


class EventFolders:
    """What TensorBoard shows, by folder: a new writer hides the points from its purge_step on."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self.images: dict[str, list[tuple[str, int, tuple[int, ...]]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.num_files = 0

    def module(self) -> ModuleType:
        folders = self

        class SummaryWriter:
            def __init__(
                self,
                log_dir: Any = None,
                comment: str = "",
                purge_step: int | None = None,
                max_queue: int = 10,
                flush_secs: int = 120,
                filename_suffix: str = "",
            ) -> None:
                self.log_dir = str(log_dir)
                folders.num_files += 1
                self.path = Path(self.log_dir) / f"events.out.tfevents.{folders.num_files}"
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.lines: list[str] = []
                series = folders.scalars.setdefault(self.log_dir, defaultdict(list))
                folders.images.setdefault(self.log_dir, [])
                folders.texts.setdefault(self.log_dir, [])
                if purge_step is not None:
                    for points in series.values():
                        points[:] = [point for point in points if point[0] < purge_step]

            def add_scalar(
                self,
                tag: str,
                scalar_value: float,
                global_step: int | None = None,
                walltime: float | None = None,
                new_style: bool = False,
                double_precision: bool = False,
            ) -> None:
                assert global_step is not None
                folders.scalars[self.log_dir][tag].append((global_step, scalar_value))
                self.lines.append(f"{tag} {global_step}")

            def add_image(
                self,
                tag: str,
                img_tensor: Any,
                global_step: int | None = None,
                walltime: float | None = None,
                dataformats: str = "CHW",
            ) -> None:
                assert global_step is not None
                assert dataformats == "HWC"
                assert img_tensor.dtype == np.uint8
                folders.images[self.log_dir].append((tag, global_step, img_tensor.shape))

            def add_text(
                self,
                tag: str,
                text_string: str,
                global_step: int | None = None,
                walltime: float | None = None,
            ) -> None:
                folders.texts[self.log_dir].append(text_string)

            def flush(self) -> None:
                self.path.write_text("\n".join(self.lines))

            def close(self) -> None:
                self.flush()

        module: Any = ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = SummaryWriter
        return module  # type: ignore[no-any-return]


class WandbServer:
    """Runs of Weights & Biases, by id: rows, configuration, pictures and the last exit code."""

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.login_error: Exception | None = None

    def module(self) -> ModuleType:
        server = self

        class Run:
            def __init__(self, held: SimpleNamespace) -> None:
                self.id = held.id
                self.held = held

            def define_metric(
                self,
                name: str,
                step_metric: str | None = None,
                step_sync: bool | None = None,
                hidden: bool | None = None,
                summary: str | None = None,
                overwrite: bool | None = None,
            ) -> None:
                self.held.axes[name] = step_metric

            def log(
                self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
            ) -> None:
                assert step is None, "the server drops rows whose step falls"
                self.held.rows.append(dict(data))

            def finish(self, exit_code: int | None = None) -> None:
                self.held.exit_code = exit_code

        def init(
            entity: str | None = None,
            project: str | None = None,
            dir: str | None = None,  # noqa: A002
            id: str | None = None,  # noqa: A002
            name: str | None = None,
            notes: str | None = None,
            tags: Any = None,
            config: dict[str, Any] | None = None,
            config_exclude_keys: Any = None,
            config_include_keys: Any = None,
            allow_val_change: bool | None = None,
            group: str | None = None,
            job_type: str | None = None,
            mode: str | None = None,
            force: bool | None = None,
            reinit: Any = None,
            resume: Any = None,
            resume_from: str | None = None,
            fork_from: str | None = None,
            save_code: bool | None = None,
            tensorboard: bool | None = None,
            sync_tensorboard: bool | None = None,
            monitor_gym: bool | None = None,
            settings: Any = None,
        ) -> Run:
            run_id = id or f"run{len(server.runs)}"
            if run_id not in server.runs:
                server.runs[run_id] = SimpleNamespace(
                    id=run_id, name=name, config=config, rows=[], axes={}, exit_code=None
                )
            assert id is None or resume == "allow"
            return Run(server.runs[run_id])

        def login(**options: Any) -> bool:
            if server.login_error is not None:
                raise server.login_error
            return True

        def settings_of(**values: Any) -> dict[str, Any]:
            assert values.keys() <= {"console", "quiet"}
            return values

        def image_of(data_or_path: Any, caption: str | None = None) -> tuple[Any, str | None]:
            return data_or_path.size, caption

        module: Any = ModuleType("wandb")
        module.init = init
        module.login = login
        module.Settings = settings_of
        module.Image = image_of
        return module  # type: ignore[no-any-return]


class MlflowServer:
    """Runs of MLflow, by id. A request fails while `error` is set; names and sizes are limited."""

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.experiments = {"Default": "0"}
        self.error: Exception | None = None
        self.num_requests = 0

    def answer(self) -> None:
        self.num_requests += 1
        if self.error is not None:
            raise self.error

    def modules(self) -> dict[str, ModuleType]:
        server = self

        class MlflowClient:
            def get_experiment_by_name(self, name: str) -> Any:
                server.answer()
                found = server.experiments.get(name)
                return None if found is None else SimpleNamespace(experiment_id=found)

            def create_experiment(
                self, name: str, artifact_location: str | None = None, tags: Any = None
            ) -> str:
                server.answer()
                return server.experiments.setdefault(name, str(len(server.experiments)))

            def create_run(
                self,
                experiment_id: str,
                start_time: int | None = None,
                tags: Any = None,
                run_name: str | None = None,
            ) -> Any:
                server.answer()
                run_id = f"id{len(server.runs)}"
                server.runs[run_id] = SimpleNamespace(
                    experiment=experiment_id,
                    name=run_name,
                    status="RUNNING",
                    params={},
                    metrics=defaultdict(list),
                    images=[],
                )
                return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

            def update_run(
                self, run_id: str, status: str | None = None, name: str | None = None
            ) -> None:
                server.answer()
                server.runs[run_id].status = status

            def log_batch(
                self,
                run_id: str,
                metrics: Any = (),
                params: Any = (),
                tags: Any = (),
                synchronous: bool | None = None,
            ) -> None:
                server.answer()
                assert len(metrics) <= 1000
                assert len(params) <= 100
                for param in params:
                    assert len(param.value) <= 500
                    assert server.runs[run_id].params.setdefault(param.key, param.value)
                for metric in metrics:
                    assert re.fullmatch(r"[\w\-. :/]+", metric.key, re.ASCII), metric.key
                    assert 1e12 < metric.timestamp < 1e13, "milliseconds since 1970"
                    server.runs[run_id].metrics[metric.key].append((metric.step, metric.value))

            def log_image(
                self,
                run_id: str,
                image: Any,
                artifact_file: str | None = None,
                key: str | None = None,
                step: int | None = None,
                timestamp: int | None = None,
                synchronous: bool | None = None,
            ) -> None:
                server.answer()
                server.runs[run_id].images.append((artifact_file, image.size))

            def set_terminated(
                self, run_id: str, status: str | None = None, end_time: int | None = None
            ) -> None:
                server.answer()
                server.runs[run_id].status = status

        def metric_of(key: str, value: float, timestamp: int, step: int) -> SimpleNamespace:
            return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)

        def param_of(key: str, value: str) -> SimpleNamespace:
            return SimpleNamespace(key=key, value=value)

        mlflow: Any = ModuleType("mlflow")
        mlflow.MlflowClient = MlflowClient
        entities: Any = ModuleType("mlflow.entities")
        entities.Metric = metric_of
        entities.Param = param_of
        return {"mlflow": mlflow, "mlflow.entities": entities}


class Tools:
    """All three, in place of the packages."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tensorboard = EventFolders()
        self.wandb = WandbServer()
        self.mlflow = MlflowServer()
        modules = {
            "torch.utils.tensorboard": self.tensorboard.module(),
            "wandb": self.wandb.module(),
            **self.mlflow.modules(),
        }
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
