"""Ray Train: the driver's end of a training, from the set-up of its workers to what they post.

Ray Train's controller, a process of its own, imports this module for _Losses: what the driver alone
needs of worker.py is imported where it is used, for timm comes with it.
"""

from __future__ import annotations

import os
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
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import RunError, reason_of
from s4g_ray.storage import files
from s4g_ray.training.mailbox import Mailbox, Message, Stop

if TYPE_CHECKING:
    from s4g_ray.encoder.precision import Numerics


class _Losses(UserCallback):
    """Tells the driver, from Ray Train's controller, that workers were lost."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Called by the controller, which must not wait."""
        reasons = {
            rank: reason_of(error).split(". ")[0]
            for rank, error in sorted(worker_exceptions.items())
        }
        self.mailbox.post.remote(
            {"kind": "lost", "ranks": list(reasons), "reason": next(iter(reasons.values()), "")}
        )


class Training:
    """Ray Train's fit, in a thread of the driver, and the driver's end of the mailbox.

    Workers start from the newest published checkpoint. When some are lost, all start again from
    there, up to train.max_failures times; elastic ones with as many as there is room for.
    """

    def __init__(self, config: RunConfig, numerics: Numerics) -> None:
        self._config = config
        self._scratch = _make_scratch(config.run_dir)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox: Any = (
            ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        )
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{config.ray.start_timeout_s:g}"
        self._trainer = make_trainer(config, numerics, self.mailbox, self._scratch)
        self._error: BaseException | None = None
        self._failure: Exception | None = None  # that a worker has posted
        self._starting_since: float | None = time.monotonic()
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # handed to the driver's main thread, which raises it
            self._error = error

    def post_plan(self, epoch: int, uri: str) -> None:
        """Give every rank the plan of an epoch."""
        self._ask(self.mailbox.put_plan, epoch, uri)

    def take(self, timeout_s: float = 1.0) -> list[Message]:
        """What the workers have posted, waited for up to a time.

        Raises what a worker failed with, and RunError when they died more often than
        train.max_failures, or could not start.
        """
        from s4g_ray.training.worker import FAILURES

        if self._failure is not None:
            raise self._failure
        alive = self._thread.is_alive()
        taken: list[Message] = self._ask(self.mailbox.take, timeout_s)
        for message in taken:
            if (
                message["kind"] == "failed"
            ):  # raised by the next call: what was posted before counts
                self._failure = self._failure or FAILURES[message["error"]](message["message"])
            if message["kind"] in ("started", "lost"):
                self._starting_since = time.monotonic() if message["kind"] == "lost" else None
        if not taken and not alive:
            raise RunError(f"training ended early: {_last_line(self._error)}") from self._error
        self._check_start()
        return taken

    @property
    def is_training(self) -> bool:
        """Whether workers have started, and have not ended."""
        return self._thread.is_alive() and self._starting_since is None

    def _check_start(self) -> None:
        """Raises RunError when workers have been starting for too long: Ray Train would try for ever."""
        train, each = self._config.train, self._config.ray.start_timeout_s
        limit = each * (1 + train.max_failures)
        if self._starting_since is not None and time.monotonic() - self._starting_since > limit:
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}  # type: ignore[no-untyped-call]
            raise RunError(
                f"no worker has started within {limit:g} s ({train.workers[0]} of {train.cpus_per_worker:g} CPUs and"
                f" {train.gpus:g} GPUs are needed, {free} is free); give back what is taken, or raise"
                " ray.start_timeout_s, and resume"
            )

    def stop(self, how: Stop = "stop") -> None:
        """Tell the workers to end after their step, with a checkpoint (`save`) or without."""
        self._ask(self.mailbox.stop, how)

    def close(self, timeout_s: float = 30.0) -> None:
        """Let the workers end, and wait for them. Raises nothing: why the run ends is what counts."""
        with suppress(RunError):
            self.stop()
        self._thread.join(timeout_s)
        ray.kill(self.mailbox)
        with suppress(RunError):
            files.remove(self._scratch)

    def _ask(self, method: Any, *arguments: Any) -> Any:
        """What the mailbox answers. Raises RunError when it has died."""
        try:
            return ray.get(method.remote(*arguments))
        except RayError as error:
            raise RunError(
                f"the mailbox between driver and workers died: {reason_of(error)}; resume"
            ) from error


def make_trainer(config: RunConfig, numerics: Numerics, mailbox: Any, scratch: str) -> TorchTrainer:
    from s4g_ray.training.worker import train_worker

    cfg = config.train
    least, most = cfg.workers
    return TorchTrainer(
        train_worker,
        # the controller unpickles this too: nothing of encoder/, which would import timm there
        train_loop_config={"config": config, "numerics": asdict(numerics), "mailbox": mailbox},
        torch_config=TorchConfig(backend="nccl" if cfg.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
            use_gpu=cfg.use_gpu,
            resources_per_worker={"CPU": cfg.cpus_per_worker, "GPU": cfg.gpus},
            placement_strategy=cfg.placement,
            label_selector=cfg.label_selector or None,  # type: ignore[call-arg]
            elastic_resize_monitor_interval_s=cfg.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=f"s4g-{os.getpid()}-{time.time_ns()}",  # unique: Ray resumes a name that it knows
            storage_path=scratch,
            failure_config=FailureConfig(
                max_failures=cfg.max_failures, controller_failure_limit=cfg.max_failures
            ),
            callbacks=[_Losses(mailbox)],  # type: ignore[list-item]
        ),
    )


def _make_scratch(run_dir: str) -> str:
    """A folder for what Ray Train says of itself, on the driver's node; our checkpoints lie elsewhere.

    Never on an object store: Ray would go there by a client of its own, and only checkpoints
    reported to Ray, which ours are not, must be seen by all nodes.
    """
    if not files.is_local(run_dir):
        return tempfile.mkdtemp(prefix="s4g-ray-train-")
    folder = files.join(run_dir, ".ray_train")
    files.remove(folder)  # of a driver that was killed
    return folder


def _last_line(error: BaseException | None) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (
        lines[-1].strip() if error is not None and lines else "the workers stopped without an error"
    )
