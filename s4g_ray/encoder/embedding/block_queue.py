"""Hold what is left of an embedding job: parts to check, blocks to encode, and parts to join.

Pure, without Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from s4g_ray.encoder.embedding.outcomes import BlockResult, Written
from s4g_ray.encoder.embedding.part_plan import Block, PlannedPart
from s4g_ray.errors import RunError

RETRIES = 3  # of work whose actor died with it


@dataclass(frozen=True)
class Check:
    """A part that an interrupted job has committed: is it whole, and of the same inputs?"""

    part: PlannedPart

    @property
    def name(self) -> str:
        """Return the part's name."""
        return self.part.name


@dataclass(frozen=True)
class Join:
    """A part whose blocks are all written."""

    part: PlannedPart
    blocks: list[Written]

    @property
    def name(self) -> str:
        """Return the part's name."""
        return self.part.name


Work = Check | Block | Join


class BlockQueue:
    """The work on some parts: checks first, then blocks in order, and each join before both.

    committed: the names of the parts to check.
    """

    def __init__(self, parts: Sequence[PlannedPart], committed: Collection[str] = ()) -> None:
        self.results: list[BlockResult] = []
        self.written: dict[str, Written] = {}
        self.total = sum(part.num_images for part in parts)
        self.num_done = 0  # images
        self.num_reused = 0  # parts
        self.num_reused_images = 0  # of these, and of kept blocks of others
        self._parts = {(part.view, part.number): part for part in parts}
        self._joins: deque[Join] = deque()
        self._checks: deque[Check] = deque()
        self._blocks: deque[Block] = deque()
        self._of_part: dict[tuple[str, int], dict[int, Written]] = {}
        self._failures: dict[str, int] = {}
        for part in parts:
            if part.name in committed:
                self._checks.append(Check(part))
            else:
                self._add_blocks(part)

    def _add_blocks(self, part: PlannedPart) -> None:
        self._of_part[part.view, part.number] = {}
        self._blocks.extend(part.blocks)

    @property
    def is_done(self) -> bool:
        """Return whether all parts are written."""
        return len(self.written) == len(self._parts)

    @property
    def num_waiting(self) -> int:
        """Return how much work no actor has."""
        return len(self._joins) + len(self._checks) + len(self._blocks)

    def take(self) -> Work | None:
        """Take the next work; None while actors have all of it."""
        if self._joins:
            return self._joins.popleft()
        if self._checks:
            return self._checks.popleft()
        return self._blocks.popleft() if self._blocks else None

    def finish_check(self, check: Check, written: Written | None) -> None:
        """Keep a committed part; or encode it, where it is not kept."""
        if written is None:
            self._add_blocks(check.part)
            return
        self.written[check.name] = written
        self.num_done += check.part.num_images
        self.num_reused += 1
        self.num_reused_images += check.part.num_images

    def finish_block(self, block: Block, result: BlockResult) -> None:
        """Count a written block; its part is joined next if that was the last."""
        self.results.append(result)
        self.num_done += result.images
        if result.reused:
            self.num_reused_images += result.images
        part = self._parts[block.view, block.part]
        found = self._of_part[block.view, block.part]
        found[block.number] = result.written
        if len(found) == len(part.blocks):
            self._joins.append(Join(part, [found[number] for number in sorted(found)]))

    def finish_join(self, join: Join, written: Written) -> None:
        """Count a written part."""
        self.written[join.name] = written
        del self._of_part[join.part.view, join.part.number]

    def count_failures(self, works: Iterable[Work]) -> None:
        """Count that an actor died with some work. Raises RunError for work that killed several."""
        for work in works:
            self._failures[work.name] = self._failures.get(work.name, 0) + 1
            if self._failures[work.name] > RETRIES:
                raise RunError(
                    f"embedding actors died {RETRIES + 1} times with {work.name}; lower"
                    " embedding.batch_size or embedding.decode_ahead_mb if memory ran out"
                )

    def put_back(self, works: Iterable[Work]) -> None:
        """Put back, as the next, what an actor had."""
        for work in works:
            if isinstance(work, Block):
                self._blocks.appendleft(work)
            elif isinstance(work, Join):
                self._joins.appendleft(work)
            else:
                self._checks.appendleft(work)
