"""Follow a group of workers: place it before other actors, report losses, move it off lost nodes.

Ray Train's controller, a process of its own, imports this module; so it needs no timm, which comes
with worker.py.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from s4g_ray.errors import reason_of

DRAINED = "its node is about to be taken away"


class GroupEvents(WorkerGroupCallback, ControllerCallback):
    """Act on what happens to a group of workers; runs in Ray Train's controller.

    mailbox: a handle of the run's Mailbox. gate: a handle of its Gate; None where no order is
    needed.
    """

    def __init__(self, mailbox: Any, gate: Any = None) -> None:
        self.mailbox = mailbox
        self.gate = gate
        self.is_reported = False  # the loss of this group
        self.is_moving = False

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        """Give the driver a handle of the controller, to end it by."""
        controller = ray.get_runtime_context().current_actor
        ray.get(self.mailbox.set_controller.remote(controller))

    def before_worker_group_start(self, worker_group_context: Any) -> None:  # noqa: ARG002
        """Have actors make room, before Ray Train asks for the room of a new group."""
        self.is_reported = False
        self.is_moving = False
        ray.get(self.mailbox.start_group.remote())
        if self.gate is not None:
            ray.get(self.gate.close.remote())

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:  # noqa: ARG002
        """Let actors start: the processes of all workers have started."""
        if self.gate is not None:
            ray.get(self.gate.open.remote())
        return {}

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Post the lost ranks and a reason, once, without waiting: the controller calls this.

        Has the workers save a checkpoint and end when the node of one is drained.
        """
        notice = worker_group_status.get_preemption_info()
        if notice is not None and not self.is_moving:
            self.is_moving = True
            self.mailbox.move.remote()
            self._post_loss(list(notice.preempted_ranks), DRAINED)
        errors = worker_group_status.errors
        if errors:
            ranks = sorted(errors)
            self._post_loss(ranks, reason_of(errors[ranks[0]]).split(". ")[0])

    def _post_loss(self, ranks: list[int], reason: str) -> None:
        if not self.is_reported:
            self.is_reported = True
            self.mailbox.post.remote({"kind": "lost", "ranks": ranks, "reason": reason})


def train_or_move(job: dict[str, Any]) -> None:
    """Train as train_worker does; raise RayActorError when the workers must move to other nodes.

    Ray Train counts that error as a preemption and not as a failure, and starts a new group. A
    return would end the training.
    """
    from s4g_ray.training.worker import train_worker

    train_worker(job)
    if ray.get(job["mailbox"].must_move.remote()):
        raise RayActorError(error_msg=f"the worker left: {DRAINED}", preempted=True)
