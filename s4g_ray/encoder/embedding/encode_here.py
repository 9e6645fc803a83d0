"""Run an embedding job in this process: for few images, starting actors takes longer."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

from s4g_ray.config.schema import RunConfig
from s4g_ray.encoder.embedding.block_queue import BlockQueue, Join
from s4g_ray.encoder.embedding.outcomes import EncodingJob
from s4g_ray.encoder.embedding.part_plan import Block
from s4g_ray.errors import BadImageError
from s4g_ray.progress import Update

if TYPE_CHECKING:
    from s4g_ray.encoder.embedding.block_encoder import BlockEncoder

AT_ONCE = 2  # blocks in work: one is encoded while the next is decoded


def encode_here(
    config: RunConfig, job: EncodingJob, queue: BlockQueue, on_progress: Update
) -> None:
    """Do all work of a queue. Raises the errors of BlockEncoder."""
    import torch

    from s4g_ray.encoder.embedding.block_encoder import BlockEncoder

    embedding = config.placed_embedding
    num_threads = torch.get_num_threads()
    encoder = BlockEncoder(
        config.model,
        max(embedding.threads_per_actor, os.cpu_count() or 1),
        embedding.decoders,
        round(embedding.decode_ahead_mb * 1e6),
        torch.device("cuda" if embedding.gpus_per_actor else "cpu"),
    )
    attempt = replace(job, token=uuid4().hex)
    try:
        _do_all(encoder, attempt, queue, on_progress)
    except BadImageError as error:
        raise BadImageError(f"{error}; fix the image, or set data.on_bad_image=skip") from error
    finally:
        torch.set_num_threads(num_threads)


def _do_all(
    encoder: BlockEncoder, job: EncodingJob, queue: BlockQueue, on_progress: Update
) -> None:
    with ThreadPoolExecutor(AT_ONCE, "blocks") as pool:
        while not queue.is_done:
            work = queue.take()
            if isinstance(work, Block):
                blocks = [work]
                while len(blocks) < AT_ONCE:
                    following = queue.take()
                    if not isinstance(following, Block):
                        if following is not None:
                            queue.put_back([following])
                        break
                    blocks.append(following)
                calls = [pool.submit(encoder.encode, job, block) for block in blocks]
                for block, call in zip(blocks, calls, strict=True):
                    queue.finish_block(block, call.result())
                    on_progress(queue.num_done, queue.total)
            elif isinstance(work, Join):
                queue.finish_join(work, encoder.join(job, work.part, work.blocks))
            elif work is not None:
                queue.finish_check(work, encoder.find_part(job, work.part))
