"""Connect to a Ray cluster, or start one on this machine."""

from __future__ import annotations

import logging
import os
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.node import Node as RayNode

from s4g_ray.config.schema import RayConfig
from s4g_ray.distributed.placement import Node, nodes_of
from s4g_ray.distributed.ray_output import without_ray_lines
from s4g_ray.distributed.start_checks import check_session, find_address, is_connected
from s4g_ray.distributed.start_limit import TooLateError, limited
from s4g_ray.errors import InputError, RunError, reason_of
from s4g_ray.storage import s3_settings
from s4g_ray.storage.s3_settings import StorageConfig

LEAST_START_S = 60.0  # for Ray itself, where ray.start_timeout_s is shorter
BUSY = "timed out during startup"  # in the error of ray.init
LOGS = "its logs are in /tmp/ray/session_latest/logs, or below RAY_TMPDIR or TMPDIR"


@contextmanager
def ray_session(cluster: RayConfig, storage: StorageConfig) -> Iterator[list[Node]]:
    """Open a Ray session and yield its nodes.

    Uses the session that the caller has opened; else it connects to cluster.address or RAY_ADDRESS;
    else it starts a cluster on this machine. That cluster has no dashboard, and requires a token
    (~/.ray/auth_token, created when missing) unless RAY_AUTH_MODE is set otherwise.

    Processes of the session access the object store as `storage` configures it. In a session of the
    caller, the caller must put s3_settings.variables(storage) into the runtime environment.

    Raises InputError when the address does not answer, ray.metrics_port is taken, or Ray's folders
    cannot be used, and RunError when Ray does not start.
    """
    if is_connected():
        yield nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        return
    check_session(cluster)
    address = find_address(cluster)
    _set_ray_variables(has_nodes=bool(address))
    _forbid_starts_by_chance()
    warnings.filterwarnings("ignore", module="ray")
    store_variables = s3_settings.apply(storage)
    if store_variables:  # in a submitted job, Ray adds them to the job's own variables
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    with without_ray_lines():
        try:
            _init_ray(address, cluster, store_variables)
            yield nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()


def _set_ray_variables(*, has_nodes: bool) -> None:
    """Set Ray's variables, unless they are set, for this process and those that it starts.

    has_nodes: of a cluster that exists, which may be drained.
    """
    # Ray Train: notice a dead worker within a second, and print no lines of Ray's
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # an actor that asks once a second whether a node of a worker is drained
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", str(int(has_nodes)))
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray keeps one idle process a CPU and stops the others: on few cores, each embedding
    # job would then start new processes for its tasks.
    os.environ.setdefault("RAY_num_workers_soft_limit", str(max(8, os.cpu_count() or 1)))


def _forbid_starts_by_chance() -> None:
    """Have Ray start by ray.init alone.

    Else a thread that outlives the session, such as that of a round in progress, starts a cluster
    by its next call of Ray, which a command that was interrupted then waits for.
    """
    module: Any = ray._private.auto_init_hook
    module.enable_auto_connect = False


def _init_ray(address: str | None, cluster: RayConfig, store_variables: dict[str, str]) -> None:
    """Connect to an address, or start a cluster on this machine when there is none."""
    # a cluster that starts here inherits this process's environment
    env = {"env_vars": store_variables} if address and store_variables else None
    limit_s = max(cluster.start_timeout_s, LEAST_START_S)
    if address:
        late = (
            f"the Ray cluster at {address} does not accept this command within {limit_s:g} s; look"
            " at its nodes (`ray status`), or raise ray.start_timeout_s"
        )
    else:
        late = (
            f"Ray did not start on this machine within {limit_s:g} s, which is busy; run the"
            f" command again, or raise ray.start_timeout_s; {LOGS}"
        )
    try:
        with limited(limit_s, late):
            _start_in_time(
                limit_s,
                address=address or "local",  # a new cluster, even where another one runs here
                num_cpus=None if address else cluster.num_cpus,
                include_dashboard=None if address else False,
                _metrics_export_port=None if address else cluster.metrics_port,
                runtime_env=env,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except TooLateError as error:
        raise (InputError if address else RunError)(late) from error
    except Exception as error:  # Ray raises plain ones, too
        if address:
            raise InputError(
                f"no Ray cluster answers at {address}: {reason_of(error)}; start it, correct"
                " ray.address or RAY_ADDRESS, or unset them to use this machine"
            ) from error
        if BUSY in str(error):
            raise RunError(late) from error
        raise RunError(f"Ray cannot start on this machine: {reason_of(error)}; {LOGS}") from error


def _start_in_time(limit_s: float, **options: Any) -> None:
    """Call ray.init, again and again where a new node is not up in Ray's own time.

    A raylet waits 15 s for its agents and then dies, and ray.init waits 30 s for the raylet. None
    of Ray's variables changes either (seen with Ray 2.60). On a busy machine the agents' imports
    take longer, and less the second time.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            ray.init(**options)
            return
        except BaseException as error:  # also the limit's, and Ctrl-C
            _end_failed_start(error)
            if BUSY not in str(error) or time.monotonic() > deadline:
                raise


def _end_failed_start(error: BaseException) -> None:
    """End the processes of a node that failed to start, which ray.shutdown() does not know."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, RayNode):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
