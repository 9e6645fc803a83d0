"""The order of work, and what becomes of it when actors die."""

from __future__ import annotations

import numpy as np
import pytest

from s4g_ray.encoder.embedding.block_queue import RETRIES, BlockQueue, Check, Join
from s4g_ray.encoder.embedding.outcomes import BlockResult, Written
from s4g_ray.encoder.embedding.part_plan import Block, plan_parts
from s4g_ray.errors import RunError
from s4g_ray.storage.manifest import Part

IDS = np.arange(64)
PARTS = plan_parts("queries", IDS, IDS, part_rows=32, batch_size=2)  # two parts of two blocks


def written(name: str) -> Written:
    return Written(Part(name, 16, 100, "sha"))


def result(block: Block) -> BlockResult:
    return BlockResult(written(block.name), len(block.rows), "a", 0.0, 1.0)


def test_a_part_is_joined_before_the_next_blocks_when_its_last_block_is_written() -> None:
    queue = BlockQueue(PARTS)
    first, second, third = queue.take(), queue.take(), queue.take()
    assert isinstance(first, Block)
    assert isinstance(second, Block)
    assert isinstance(third, Block)
    queue.finish_block(second, result(second))
    queue.finish_block(first, result(first))
    join = queue.take()
    assert isinstance(join, Join)
    assert join.part is PARTS[0]
    assert join.blocks == [written(first.name), written(second.name)]
    queue.finish_join(join, written(join.name))
    assert (queue.num_done, queue.total, queue.is_done) == (32, 64, False)
    fourth = queue.take()
    assert isinstance(fourth, Block)
    assert queue.take() is None
    for block in (fourth, third):
        queue.finish_block(block, result(block))
    last = queue.take()
    assert isinstance(last, Join)
    queue.finish_join(last, written(last.name))
    assert queue.is_done
    assert list(queue.written) == [part.name for part in PARTS]


def test_committed_parts_are_checked_first_and_encoded_when_they_are_not_kept() -> None:
    queue = BlockQueue(PARTS, {PARTS[0].name, PARTS[1].name})
    for kept in (written("kept"), None):
        check = queue.take()
        assert isinstance(check, Check)
        queue.finish_check(check, kept)
    assert (queue.num_reused, queue.num_reused_images, queue.num_done) == (1, 32, 32)
    block = queue.take()
    assert isinstance(block, Block)
    assert block.part == 1


def test_work_of_a_dead_actor_comes_first_and_work_that_kills_actors_ends_the_job() -> None:
    queue = BlockQueue(PARTS)
    first, second = queue.take(), queue.take()
    assert first is not None
    assert second is not None
    for _ in range(RETRIES):
        queue.put_back([second, first])
        queue.count_failures([second, first])
        assert (queue.take(), queue.take()) == (first, second)
    queue.put_back([second, first])  # of actors that made room: not their fault
    with pytest.raises(RunError, match=r"died 4 times with queries/part-00000/block-00001; lower"):
        queue.count_failures([second])
