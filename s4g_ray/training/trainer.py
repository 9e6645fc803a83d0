"""Start the workers of a training with Ray Train, and follow them on the driver."""

from __future__ import annotations

import math
import os
import re
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s4g_ray.amounts import count_noun
from s4g_ray.config.schema import RunConfig
from s4g_ray.config.training_schema import TrainConfig
from s4g_ray.errors import RunError, reason_of
from s4g_ray.freed_memory import keeping_variables
from s4g_ray.storage import files
from s4g_ray.training.failures import FAILURES
from s4g_ray.training.mailbox import Mailbox, Message, Stop
from s4g_ray.training.worker_group import GroupEvents, train_or_move

if TYPE_CHECKING:
    from s4g_ray.encoder.precision import Numerics

KILLED_S = 10.0  # for the thread that fits to learn that its controller was killed


class Training:
    """A training in progress: Ray Train's fit in a thread of the driver, and the mailbox.

    Workers start from the newest published checkpoint. When workers are lost, all start again from
    there, up to train.max_failures times; elastic trainings with as many workers as the cluster has
    room for. gate: a handle of the Gate that is open while workers are placed, if any.
    """

    def __init__(self, config: RunConfig, numerics: Numerics, gate: Any = None) -> None:
        self._config = config
        self._scratch = _make_scratch(config.run_dir)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox: Any = (
            ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        )
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{config.ray.start_timeout_s:g}"
        events = GroupEvents(self.mailbox, gate)
        self._trainer = make_trainer(config, numerics, events, self._scratch)
        self.result: ray.train.Result | None = None
        self._error: BaseException | None = None
        self._failure: Exception | None = None  # posted by a worker
        self._starting_since: float | None = time.monotonic()
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self.result = self._trainer.fit()
        except BaseException as error:  # the driver's main thread raises it
            self._error = error

    def post_plan(self, epoch: int, uri: str) -> None:
        """Post the plan of an epoch to all ranks."""
        self._ask(self.mailbox.put_plan, epoch, uri)

    def take(self, timeout_s: float = 1.0) -> list[Message]:
        """Return the messages that the workers posted; wait for the first for up to timeout_s.

        Raises what a worker failed with, and RunError when they died more often than
        train.max_failures, or could not start.
        """
        if self._failure is not None:
            raise self._failure
        alive = self._thread.is_alive()
        messages: list[Message] = self._ask(self.mailbox.take, timeout_s)
        for message in messages:
            kind = message["kind"]
            if kind == "failed" and self._failure is None:
                # raised by the next call: the messages posted before it still count
                self._failure = FAILURES[message["error"]](message["message"])
            elif kind == "started":
                self._starting_since = None
            elif kind == "lost":
                self._starting_since = time.monotonic()
        if not messages and not alive:
            raise RunError(f"training ended early: {_last_line(self._error)}") from self._error
        self._check_start()
        return messages

    @property
    def is_training(self) -> bool:
        """Return whether workers have started and not ended."""
        return self._thread.is_alive() and self._starting_since is None

    @property
    def waits_for(self) -> str:
        """Return what an epoch that begins now waits for until its first step."""
        if self.is_training:
            return "its plan and first steps"
        return f"{count_noun(self._config.train.workers[0], 'worker')} to start"

    def _check_start(self) -> None:
        """Raise RunError when workers take too long to start: Ray Train would try for ever."""
        train = self._config.train
        limit_s = self._config.ray.start_timeout_s * (1 + train.max_failures)
        if self._starting_since is None or time.monotonic() - self._starting_since <= limit_s:
            return
        available = ray.available_resources()  # type: ignore[no-untyped-call]
        free = {name: num for name, num in available.items() if name in ("CPU", "GPU")}
        raise RunError(
            f"no worker has started within {limit_s:g} s ({train.workers[0]} of"
            f" {train.cpus_per_worker:g} CPUs and {train.gpus:g} GPUs are needed, {free} is free);"
            " free resources, or raise ray.start_timeout_s, and resume"
        )

    def stop(self, how: Stop = "stop") -> None:
        """Tell the workers to stop after their step; with `save`, publish a checkpoint first."""
        self._ask(self.mailbox.stop, how)

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the workers and wait for them for up to timeout_s.

        Raises no RunError, so that the error that ends the run is not replaced.
        """
        with suppress(RunError):
            self.stop()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._end_controller()
        ray.kill(self.mailbox)
        with suppress(RunError):
            files.remove(self._scratch)

    def _end_controller(self) -> None:
        """End Ray Train's controller, and the workers with it, and wait for the thread that fits.

        A thread in a call of Ray while its session ends may end the process without a word.
        """
        with suppress(RunError):
            controller = self._ask(self.mailbox.get_controller)
            if controller is not None:
                ray.kill(controller)
        self._thread.join(KILLED_S)

    def _ask(self, method: Any, *arguments: Any) -> Any:
        """Call the mailbox and return its answer. Raises RunError when it has died."""
        try:
            return ray.get(method.remote(*arguments))
        except RayError as error:
            raise RunError(
                f"the mailbox between driver and workers died: {reason_of(error)}; resume"
            ) from error


def make_trainer(
    config: RunConfig, numerics: Numerics, events: GroupEvents, scratch: str
) -> TorchTrainer:
    """Return Ray Train's trainer, not started; scratch: the folder for Ray Train's own files."""
    cfg = config.train
    min_workers, max_workers = cfg.workers
    num_workers: Any = max_workers
    if min_workers < max_workers:
        num_workers = (min_workers, max_workers)
    return TorchTrainer(
        train_or_move,
        # the controller unpickles this too: no object of encoder/, which would import timm there
        train_loop_config={
            "config": config,
            "numerics": asdict(numerics),
            "mailbox": events.mailbox,
        },
        torch_config=TorchConfig(
            backend="nccl" if cfg.use_gpu else "gloo", timeout_s=math.ceil(cfg.collective_timeout_s)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=cfg.use_gpu,
            resources_per_worker={"CPU": cfg.cpus_per_worker, "GPU": cfg.gpus},
            placement_strategy=cfg.placement,
            label_selector=cfg.label_selector or None,  # type: ignore[call-arg]
            elastic_resize_monitor_interval_s=cfg.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=_name_fit(config.run_dir),
            storage_path=scratch,
            failure_config=FailureConfig(
                max_failures=cfg.max_failures,
                controller_failure_limit=cfg.max_failures,
                max_preemption_failures=-1,  # nodes that announced their end do not count
            ),
            callbacks=[events],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": worker_variables(cfg)},  # type: ignore[call-arg]
        ),
    )


def worker_variables(train: TrainConfig) -> dict[str, str]:
    """Return the environment variables of the workers.

    train.env; on GPUs NCCL's warnings, on CPUs those that keep freed memory.
    """
    if train.use_gpu:
        variables = {"NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN")}
    else:
        variables = keeping_variables()
    return {**variables, **train.env}


def _make_scratch(run_dir: str) -> str:
    """Return a folder on the driver's node for Ray Train's own files; checkpoints lie elsewhere.

    It is never on an object store, which Ray would access with a client of its own. Other nodes
    need not reach it: they must share only checkpoints that are reported to Ray, and ours are not.
    """
    if not files.is_local(run_dir):
        return tempfile.mkdtemp(prefix="s4g-ray-train-")
    folder = files.join(run_dir, ".ray_train")
    files.remove(folder)  # left by a driver that was killed
    return folder


def _name_fit(run_dir: str) -> str:
    """Return a name by which Ray's dashboard shows the run: that of its folder, and the time.

    Unique, for Ray resumes a name that it knows.
    """
    folder = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_dir.rstrip("/").rsplit("/", 1)[-1])
    return f"s4g-{folder}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"


def _last_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error is None or not lines:
        return "the workers stopped without an error"
    return lines[-1]
