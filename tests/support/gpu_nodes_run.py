"""Workers and embedding actors that share logical GPUs on nodes that die, come and are drained.

    python -m tests.support.gpu_nodes_run FOLDER [no-gate | no-release]

No node has a real GPU: stand-ins that use none take the place of the encoder, of the steps and of
NCCL. Placement, the pool, the mailbox, the callbacks and Ray Train are those of a run. Prints as
JSON where everything was after each event. no-gate: as without an order of placement; no-release:
actors keep their GPUs when workers are placed again. Both end with a RunError.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
import ray.train
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from s4g_ray.distributed.placement_gate import PlacementGate, make_gate
from s4g_ray.encoder import actors
from s4g_ray.encoder.precision import Numerics
from s4g_ray.training import trainer, worker_group
from tests.conftest import tiny_config

Spot = tuple[str, str]  # node, GPU
STEPS = "steps"  # a file: the step of the newest checkpoint
STEP_S = 0.02
RESTART_S = 2.0  # for lost actors to take the GPUs that the lost workers' group has left
START_S = 120.0  # for workers and actors


def find_spot() -> Spot:
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_accelerator_ids()["GPU"][0]


class StandInActor:
    def __init__(self, *_: Any) -> None:
        self.spot = find_spot()

    def release_memory(self) -> None:
        pass

    def find_spot(self) -> Spot:
        return self.spot


def train_worker(job: dict[str, Any]) -> None:
    """Count steps as a worker does that publishes a checkpoint when it is told to save."""
    mailbox = job["mailbox"]
    rank = ray.train.get_context().get_world_rank()
    saved = Path(job["config"].run_dir, STEPS)
    step = int(saved.read_text()) if saved.exists() else 0
    ray.get(mailbox.post.remote({"kind": "worker", "step": step, "spot": find_spot()}))
    if rank == 0:
        ray.get(mailbox.post.remote({"kind": "started"}))
    stop = mailbox.wait_for_stop.remote()
    while not ray.wait([stop], timeout=STEP_S)[0]:
        step += 1
    if rank == 0 and ray.get(stop) == "save":
        saved.write_text(str(step))


def train_or_move(job: dict[str, Any]) -> None:
    """Call the real function around the stand-in."""
    module: Any = ModuleType("s4g_ray.training.worker")
    module.train_worker = train_worker
    sys.modules[module.__name__] = module
    worker_group.train_or_move(job)


def replace_gpu_code() -> None:
    """Put the stand-ins in place, in this process; others get them from here."""
    module: Any = ModuleType("s4g_ray.training.worker")
    module.FAILURES = {}
    sys.modules[module.__name__] = module

    def make_trainer(loop: Any, *, torch_config: Any, **options: Any) -> Any:
        assert torch_config.backend == "nccl"
        return DataParallelTrainer(loop, **options)

    replaced: Any = trainer
    replaced.TorchTrainer = make_trainer
    replaced.train_or_move = train_or_move
    replaced = actors
    replaced.EncoderActor = StandInActor


class Scene:
    """A training with its pool, whose first job begins before the training."""

    def __init__(self, folder: str, mode: str) -> None:
        config = tiny_config(
            folder,
            "d",
            train={
                "use_gpu": True,
                "gpus_per_worker": 0.7,
                "num_workers": 4,
                "cpus_per_worker": 1,
                "max_failures": 1,  # the node that dies; the drained one does not count
            },
            embedding={"num_actors": 4},
            ray={"start_timeout_s": START_S},
        )
        self.messages: list[dict[str, Any]] = []
        gate: PlacementGate | None = None
        if mode != "no-gate":
            gate = make_gate(True) if mode != "no-release" else PlacementGate(releases=False)
        self.pool = actors.EncoderPool(config.model, config.placed_embedding, START_S, gate)
        first = threading.Thread(target=self.find_actors)
        first.start()
        if gate is None:
            first.join()
        handle = gate.actor if gate is not None else None
        self.training = trainer.Training(config, Numerics(), handle)

    def find_actors(self) -> list[Spot]:
        """Run a job; return where its actors are."""
        with self.pool.job() as found:
            spots: list[Spot] = ray.get([actor.find_spot.remote() for actor in found])
            return spots

    def find_workers(self) -> list[dict[str, Any]]:
        """Follow the training until a group of workers has started; return their messages."""
        found: list[dict[str, Any]] = []
        while len(found) < 4:
            for message in self.training.take():
                self.messages.append(message)
                if message["kind"] == "lost":
                    found = []
                if message["kind"] == "worker":
                    found.append(message)
        return found

    def describe(self) -> dict[str, Any]:
        """Return where workers and actors are, once both have started."""
        workers = self.find_workers()
        return {
            "workers": [message["spot"] for message in workers],
            "steps": [message["step"] for message in workers],
            "actors": self.find_actors(),
            "lost": [m["reason"] for m in self.messages if m["kind"] == "lost"],
        }


def drain(node_id: str) -> None:
    """Announce that a node will be taken away, as a cloud does."""
    raylet: Any = ray._raylet
    reasons: Any = autoscaler_pb2
    accepted, why = raylet.GcsClient(address=ray.get_runtime_context().gcs_address).drain_node(
        node_id,
        reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "preemption",
        int((time.time() + 600) * 1000),
    )
    assert accepted, why


def await_death(node_id: str) -> None:
    """Wait until Ray has noticed that a node died: it then starts the node's actors elsewhere."""
    while any(node["Alive"] and node["NodeID"] == node_id for node in ray.nodes()):  # type: ignore[no-untyped-call]
        time.sleep(0.1)


def main() -> None:
    # conftest has set the first to 0
    os.environ.update(
        RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="1", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2"
    )
    folder = sys.argv[1]
    mode = sys.argv[2] if len(sys.argv) > 2 else ""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=4, num_gpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    replace_gpu_code()
    scene = Scene(folder, mode)
    try:
        found = [scene.describe()]
        cluster.remove_node(nodes[1], allow_graceful=False)
        while not any(message["kind"] == "lost" for message in scene.messages):
            scene.messages += scene.training.take()
        await_death(nodes[1].node_id)
        time.sleep(RESTART_S)
        nodes.append(cluster.add_node(num_cpus=4, num_gpus=2))
        found.append(scene.describe())
        nodes.append(cluster.add_node(num_cpus=4, num_gpus=2))
        drain(nodes[2].node_id)
        found.append(scene.describe())
        ids = [node.node_id for node in nodes]
        saved = int(Path(folder, STEPS).read_text())
        print(json.dumps({"nodes": ids, "found": found, "saved": saved}))
    finally:
        scene.training.close(5)
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
