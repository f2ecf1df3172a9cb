"""Who has which chunk, where several workers share the work and may die.

A worker has two chunks at a time, so that it reads the second during the forward pass of the first,
until there is one left for each.
The chunks of one that dies are done by others; a chunk that was there at two deaths is cut in
halves, each of which is then done alone, until the one item that kills is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from camoxpert.errors import PeerError
from camoxpert.inference.engine import Chunk, ChunkResult, Row, Spec
from camoxpert.inference.local import Chunks

AT_ONCE = 2
"""Chunks that a worker has at a time."""
FATAL_DEATHS = 2
"""Deaths of a worker with a chunk after which the chunk is cut, or its only item given up."""
MOST_DEATHS = 20
"""Deaths in a row, without a chunk done between them, after which the run gives up."""


@dataclass
class _Task:
    """A chunk on its way through the workers.

    Attributes:
        chunk: the chunk.
        deaths: workers that died with it.
        start: position of its first item in the original chunk.
        parts: rows by position in the original chunk, where it was cut; shared by its parts.
        total: items of the original chunk.
    """

    chunk: Chunk
    deaths: int = 0
    start: int = 0
    parts: dict[int, Row] = field(default_factory=dict)
    total: int = 0

    @property
    def suspect(self) -> bool:
        """Whether it is done alone, so that a death has one cause."""
        return self.deaths > 0


class Schedule:
    """The chunks that are not done, and who has them.

    Args:
        spec: names items that no worker can do.
        items: all.
        size: items of a chunk.

    Attributes:
        deaths: of workers.
    """

    def __init__(self, spec: Spec, items: Sequence[object], size: int) -> None:
        self.deaths = 0
        self._spec = spec
        self._chunks, self._size = Chunks(items, size), size
        self._waiting: deque[_Task] = deque()
        self._held: dict[str, dict[int, _Task]] = {}
        self._number = 0
        self._in_a_row = 0

    @property
    def finished(self) -> bool:
        """Whether every item has its row."""
        return not (self._chunks.left or self._waiting or any(self._held.values()))

    def next_for(self, worker: str, *, workers: int, most: int = AT_ONCE) -> Chunk | None:
        """Return a chunk for a worker to do, with a number of its own; None: it has enough.

        The last chunks, one for each worker, go to those that have none: a worker hands its rows
        in a batch late, and one that is a little ahead would take what another could begin with.

        Args:
            worker: its name.
            workers: how many there are.
            most: chunks that it may have.
        """
        held = self._held.setdefault(worker, {})
        if workers > 1 and self._chunks.left <= workers * self._size:
            most = 1
        if len(held) >= most or any(task.suspect for task in held.values()):
            return None
        task = self._next_task(idle=not held)
        if task is None:
            return None
        self._number += 1
        held[self._number] = task
        return Chunk(self._number, task.chunk.items)

    def _next_task(self, *, idle: bool) -> _Task | None:
        """Return the next task: a suspect one only for a worker that has nothing else."""
        if self._waiting and (idle or not self._waiting[0].suspect):
            return self._waiting.popleft()
        if self._waiting:
            return None
        chunk = self._chunks.take()
        return None if chunk is None else _Task(chunk, total=len(chunk.items))

    def done(self, worker: str, result: ChunkResult) -> Iterator[ChunkResult]:
        """Note the rows of a chunk; yield the original chunk if it is complete."""
        self._in_a_row = 0
        task = self._held[worker].pop(result.number)
        for position, row in enumerate(result.rows):
            task.parts[task.start + position] = row
        yield from _completed(task, worker)

    def items_of(self, worker: str) -> int:
        """Return how many items a worker has."""
        return sum(len(task.chunk.items) for task in self._held.get(worker, {}).values())

    def lost(self, worker: str, cause: str) -> Iterator[ChunkResult]:
        """Note the death of a worker; yield the chunks that it completes: killers are given up.

        Raises:
            PeerError: workers die one after the other, and nothing gets done.
        """
        self.deaths += 1
        self._in_a_row += 1
        if self._in_a_row >= MOST_DEATHS:
            raise PeerError(
                f"{self._in_a_row} workers ended one after the other without getting anything "
                f"done; the last one, {worker}: {cause}. What is done is written; the same command "
                "continues."
            )
        for task in self._held.pop(worker, {}).values():
            task.deaths += 1
            yield from self._put_back(task, cause)

    def _put_back(self, task: _Task, cause: str) -> Iterator[ChunkResult]:
        """Queue a task again: whole, in halves, or not at all where its only item kills."""
        items = task.chunk.items
        if task.deaths < FATAL_DEATHS:
            self._waiting.append(task)
        elif len(items) == 1:
            reason = f"the worker process ends whenever it gets it: {cause}"
            row = {"item": items[0].name, **self._spec.failed(items[0], reason), "worker": ""}
            task.parts[task.start] = row
            yield from _completed(task, "")
        else:
            half = (len(items) + 1) // 2
            for start, part in ((0, items[:half]), (half, items[half:])):
                chunk = Chunk(task.chunk.number, part)
                self._waiting.append(
                    _Task(chunk, FATAL_DEATHS - 1, task.start + start, task.parts, task.total)
                )


def _completed(task: _Task, worker: str) -> Iterator[ChunkResult]:
    """Yield the original chunk of a task if all its rows are there."""
    if len(task.parts) == task.total:
        rows = [task.parts[position] for position in range(task.total)]
        yield ChunkResult(task.chunk.number, rows, worker)
