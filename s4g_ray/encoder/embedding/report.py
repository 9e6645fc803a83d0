"""Define the report of an embedding job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s4g_ray.amounts import count_noun
from s4g_ray.encoder.embedding.outcomes import BlockResult

SHOWN = 10  # images that could not be decoded, listed in the summary


@dataclass(frozen=True)
class EmbeddingReport:
    """Counts and speed of an embedding job.

    warm_images_per_s is the rate of the actors together; 0 when all parts are those of an earlier
    job.
    """

    images: int  # in the table
    seconds: float
    warm_images_per_s: float
    bad_images: tuple[str, ...]  # why each image that was skipped could not be decoded
    reused_parts: int = 0  # committed by an interrupted job
    reused_images: int = 0  # of those parts, and of the blocks of others that it committed

    def lines(self, one: str, many: str | None = None) -> list[str]:
        """Return a summary for the user, with the first skipped images; one, many: their nouns."""
        num_bad = len(self.bad_images)
        left_out = f", left out {num_bad}" if num_bad else ""
        lines = [f"embedded {count_noun(self.images, one, many)}{left_out} in {self.seconds:.0f} s"]
        lines.extend(f"  {reason}" for reason in self.bad_images[:SHOWN])
        if num_bad > SHOWN:
            lines.append(f"  and {num_bad - SHOWN} more")
        return lines


def warm_rate(results: Sequence[BlockResult]) -> float:
    """Return the images per second of all actors together.

    An actor's time runs from the start of its first block to the end of its last. It includes
    reading, decoding, encoding, writing and the waits between blocks, but not the start of the
    actor. Blocks kept from an earlier job do not count.
    """
    of_actors: dict[str, list[BlockResult]] = {}
    for result in results:
        if not result.reused:
            of_actors.setdefault(result.actor, []).append(result)
    rate = 0.0
    for found in of_actors.values():
        seconds = max(r.finished for r in found) - min(r.started for r in found)
        rate += sum(r.images for r in found) / seconds
    return rate
