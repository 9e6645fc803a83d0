"""MlflowLogger: a run of MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ... apply."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from s4g_ray.pipeline.loggers.pictures import Picture
from s4g_ray.pipeline.loggers.points import Point

# limits of MLflow's REST interface
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
PARAM_LENGTH = 500  # of a value, in characters; stores of version 1 take no more


class MlflowLogger:
    """Writes to a run of MLflow, which a resumed run continues by its id.

    config: by dotted key; it becomes the run's parameters.
    """

    batch_size = 50

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._config = config
        self._client: Any = None
        self._run_id: str | None = None
        self._has_params = False

    def open(self, run_id: str | None, last_step: int) -> str:
        """Start a run with its parameters, or continue the one with this id."""
        del last_step  # the tool appends; points that are written are not written again
        self._client = import_module("mlflow").MlflowClient()
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
            return run_id
        if self._run_id is None:  # else a try has failed after it
            created = self._client.create_run(self._find_experiment(), run_name=self._name)
            self._run_id = str(created.info.run_id)
        self._log_params(self._run_id)
        return self._run_id

    def _find_experiment(self) -> str:
        """Return the id of the experiment that the environment names, or of MLflow's default."""
        if os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name))

    def _log_params(self, run_id: str) -> None:
        entities = import_module("mlflow.entities")
        params = [
            entities.Param(key, str(value)[:PARAM_LENGTH]) for key, value in self._config.items()
        ]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])

    def write(self, points: Sequence[Point]) -> None:
        """Log the metrics of points, with the time at which they were recorded."""
        metrics = list(self._make_metrics(points))
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def _make_metrics(self, points: Sequence[Point]) -> Iterator[Any]:
        entities = import_module("mlflow.entities")
        for point in points:
            milliseconds = int(point.time * 1000)
            for name, value in point.values.items():
                yield entities.Metric(metric_name(name), value, milliseconds, point.step)

    def show(self, pictures: Sequence[Picture], step: int) -> None:
        """Log pictures as artifacts: retrievals/step_00000012_1.png."""
        for number, picture in enumerate(pictures, start=1):
            name = f"retrievals/step_{step:08d}_{number}.png"
            self._client.log_image(self._run_id, picture.image, artifact_file=name)

    def commit(self) -> None:
        """Do nothing: each call is answered when it is stored."""

    def close(self, *, finished: bool) -> None:
        """End the run; one that is to be resumed counts as killed."""
        status = "FINISHED" if finished else "KILLED"
        self._client.set_terminated(self._run_id, status, int(time.time() * 1000))


def metric_name(name: str) -> str:
    """Replace what MLflow allows in no name: `recall@1%` becomes `recall_at_1_percent`."""
    spelled = name.replace("@", "_at_").replace("%", "_percent")
    return re.sub(r"[^\w\-. :/]", "_", spelled, flags=re.ASCII)
