"""Which errors of a worker end the run, and what they say."""

from __future__ import annotations

import torch

from s4g_ray.config.schema import RunConfig
from s4g_ray.errors import BadImageError, GpuMemoryError, RunError
from s4g_ray.training.failures import failure_of


def config(**train: object) -> RunConfig:
    return RunConfig.model_validate({"run_dir": "run", "data": {"uri": "data"}, "train": train})


def test_errors_that_another_start_would_meet_again_end_the_run() -> None:
    error = BadImageError("broken.png")
    assert failure_of(error, config()) is error
    assert failure_of(ValueError("a bug"), config()) is None
    assert failure_of(RuntimeError("connection closed by peer"), config()) is None
    assert failure_of(KeyError("out of memory"), config()) is None


def test_a_worker_out_of_memory_names_the_settings_that_need_less() -> None:
    messages = []
    errors = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ]
    for error in errors:
        failure = failure_of(error, config(batch_size=128, num_workers=4))
        assert isinstance(failure, RunError)
        messages.append(str(failure))
    assert messages[0] == (
        "a worker ran out of memory with 32 of train.batch_size=128 pairs (CUDA out of memory."
        " Tried to allocate 20 GiB.); lower train.micro_batch_size (now all 32), or set"
        " model.grad_checkpointing=true, or use more train.num_workers, and resume; or"
        " lower train.batch_size with --resume --from-epoch N"
    )
    assert "can't allocate memory" in messages[1]
    for text in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublas"):
        assert isinstance(failure_of(RuntimeError(text), config(use_gpu=True)), GpuMemoryError)
    ready = RunConfig.model_validate(
        {
            "run_dir": "run",
            "data": {"uri": "data"},
            "train": {"batch_size": 128, "num_workers": [2, 4]},
            "model": {"grad_checkpointing": True},
        }
    )
    remedy = (
        "; lower train.micro_batch_size (now all 32), or use more train.num_workers, and resume"
    )
    assert remedy in str(failure_of(errors[0], ready))
    assert "with 32 or more of train.batch_size=128 pairs" in str(failure_of(errors[0], ready))
    small = failure_of(errors[0], config(batch_size=128, num_workers=4, micro_batch_size=8))
    assert "train.micro_batch_size (now 8)" in str(small)
