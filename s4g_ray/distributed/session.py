"""The Ray session of a command."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from s4g_ray.config.schema import RunConfig
from s4g_ray.distributed.placement import Node, nodes_of
from s4g_ray.distributed.ray_output import without_ray_lines
from s4g_ray.errors import InputError
from s4g_ray.storage import s3_settings


@contextmanager
def ray_session(config: RunConfig) -> Iterator[list[Node]]:
    """A Ray session: the caller's, that of the configured address, or one on this machine; yields its nodes.

    Processes of the session reach the object store as config.storage says; but for the caller's session, in whose
    runtime environment the caller must have put what object_store.variables(config.storage) gives.

    One on this machine has no dashboard, and asks for a token (~/.ray/auth_token, made where there is none) unless
    RAY_AUTH_MODE says otherwise. Raises InputError when the address does not answer, or ray.metrics_port is taken.
    """
    if ray.is_initialized():
        yield nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        return
    # Ray Train: a dead worker is seen within a second, and nothing but our own lines is printed
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # else Ray stops idle processes but for one a CPU: on few cores, each embedding job would start its tasks' anew
    os.environ.setdefault("RAY_num_workers_soft_limit", str(max(8, os.cpu_count() or 1)))
    warnings.filterwarnings("ignore", module="ray")
    remote = config.ray.address or os.environ.get("RAY_ADDRESS")
    store = s3_settings.apply(config.storage)
    if store:  # of a submitted job, these join its own variables
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    if not remote:
        _check_free(config.ray.metrics_port)
    with without_ray_lines():
        try:
            ray.init(
                address=remote or "local",  # none: ours, even where another runs on this machine
                num_cpus=None if remote else config.ray.num_cpus,
                include_dashboard=None if remote else False,
                _metrics_export_port=None if remote else config.ray.metrics_port,
                # a cluster started here has this process's environment
                runtime_env={"env_vars": store} if remote and store else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise InputError(f"no Ray cluster answers at {remote}: {error}") from error
        try:
            yield nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()


def _check_free(port: int | None) -> None:
    """Raises InputError for a port that is taken: Ray's agent would die of it, and the session with it."""
    if port is None:
        return
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one just given back is free
        try:
            trial.bind(("", port))
        except OSError as error:
            raise InputError(
                f"ray.metrics_port={port} cannot be had: {error.strerror}; choose another"
            ) from error
