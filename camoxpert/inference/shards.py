"""Parts of one job on machines that do not know of each other, such as a SLURM array or torchrun.

Each part takes every Nth photo and keeps a ledger of its own in the common folder; ``merge`` puts
them together into the ledger and the table of the whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TypeVar

from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.annotations import begin_coco, join_coco
from camoxpert.inference.ledger import OK, Ledger, open_ledger
from camoxpert.inference.plan import remove_unfinished
from camoxpert.runs.jobs import ItemRow
from camoxpert.text import bullet_list, count

T = TypeVar("T")
RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
"""Environment variables of (number from 0, count), in order of preference."""
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
NAME = re.compile(r"predictions\.(\d+)-of-(\d+)\.jsonl")
ROWS = 1000


@dataclass(frozen=True)
class Shard:
    """One part of a job.

    Attributes:
        number: from 1.
        of: parts.
    """

    number: int
    of: int

    @property
    def ledger(self) -> str:
        """Name of its ledger."""
        return f"predictions.{self.number}-of-{self.of}.jsonl"

    def part(self, items: Sequence[T]) -> list[T]:
        """Return its items: every Nth, so that parts with large images are rare."""
        return list(items[self.number - 1 :: self.of])


def choose_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """Return the part that ``--shard`` names.

    Args:
        text: ``2/8``, or ``auto``: from the variables of torchrun or SLURM.
        environment: variables.

    Raises:
        ConfigError: not a part, or no variables.
    """
    if text == "auto":
        return _from_environment(environment)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(
            f"--shard {text}: give number and count such as 2/8, the first is 1/8; or auto under "
            "torchrun and SLURM."
        )
    return Shard(int(found[1]), int(found[2]))


def _from_environment(environment: Mapping[str, str]) -> Shard:
    values = {name: environment[name] for name in ARRAY if environment.get(name, "").isdigit()}
    if len(values) == len(ARRAY):
        task, first, number = (int(values[name]) for name in ARRAY)
        return Shard(task - first + 1, number)
    for rank, size in RANKS:
        if environment.get(rank, "").isdigit() and environment.get(size, "").isdigit():
            return Shard(int(environment[rank]) + 1, int(environment[size]))
    raise ConfigError(
        "--shard auto reads the variables of torchrun (RANK, WORLD_SIZE) or SLURM, and there are "
        "none. Give number and count, such as --shard 2/8."
    )


def merge(folder: Path, kinds: Sequence[str]) -> tuple[int, list[tuple[str, str]]]:
    """Put the ledgers of all parts into one, with the table; remove them.

    Repeating it after a kill is harmless.

    Args:
        folder: of the results.
        kinds: of files that rows list.

    Returns:
        The number of items with results, and (item, reason) of those without.

    Raises:
        DataError: a part is missing, unfinished, at work, or was made with other settings.
    """
    parts = _parts(folder)
    heads: list[tuple[Path, object]] = []
    with open_ledger(folder, kinds) as whole:
        ledgers = [Ledger(folder, kinds, name=path.name, table=None) for path in parts]
        faults = [f"{ledger.path.name}: not finished" for ledger in ledgers if not ledger.finished]
        heads = [(ledger.path, _compared(ledger.earlier)) for ledger in ledgers if ledger.earlier]
        if whole.earlier is not None:
            heads.insert(0, (whole.path, _compared(whole.earlier)))
        faults += [
            f"{path.name}: made with other settings than {heads[0][0].name}"
            for path, head in heads
            if head != heads[0][1]
        ]
        if faults:
            raise DataError(
                f"The parts in {folder} cannot be merged:\n{bullet_list(faults)}\nRun the same "
                "commands again for parts that are not finished."
            )
        if whole.earlier is None and heads:
            first = next(ledger for ledger in ledgers if ledger.earlier)
            whole.restart(first.earlier or {})
        waiting: list[ItemRow] = []
        order = list(whole.index)
        for row in _alternating([ledger.rows() for ledger in ledgers]):
            order.append(row["item"])
            waiting.append(row)
            if len(waiting) == ROWS:
                whole.append(waiting)
                waiting = []
        if waiting:
            whole.append(waiting)
        remove_unfinished(folder)
        coco = any("coco" in whole.index.has_kinds(name) for name in whole.index)
        joined = begin_coco(folder, wanted=coco, changes=True)
        whole.finish(order, complete=True)
        if joined:
            join_coco(folder, whole.rows())
        for path in parts:
            path.unlink()
        failed = [name for name in whole.index if whole.index.status(name) != OK]
        return len(whole.made), [(name, str(whole.row(name)["reason"])) for name in failed]


def _parts(folder: Path) -> list[Path]:
    """Return the ledgers of all parts, in order.

    Raises:
        DataError: there are none, of several counts, or some are missing.
    """
    found = {
        (int(match[2]), int(match[1])): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := NAME.fullmatch(path.name))
    }
    if not found:
        raise DataError(
            f"{folder} holds no ledger of a part (predictions.1-of-N.jsonl). Run predict with "
            "--shard first, with the same -o."
        )
    counts = sorted({of for of, _ in found})
    missing = [f"{n}/{of}" for of in counts for n in range(1, of + 1) if (of, n) not in found]
    if len(counts) > 1 or missing:
        raise DataError(
            f"{folder} holds {count(len(found), 'ledger')} of parts"
            + (f"; missing: {', '.join(missing[:8])}" if missing else "")
            + (f"; of several divisions: {', '.join(map(str, counts))}" if len(counts) > 1 else "")
            + ". Run the missing parts first."
        )
    return [found[key] for key in sorted(found)]


def _compared(head: Mapping[str, object] | None) -> dict[str, object]:
    """Return the head without the path of the model, which may differ between machines."""
    return {key: value for key, value in (head or {}).items() if key != "checkpoint"}


def _alternating(parts: Sequence[Iterator[ItemRow]]) -> Iterator[ItemRow]:
    """Yield rows in the order of the undivided items."""
    for row in chain.from_iterable(zip_longest(*parts)):
        if row is not None:
            yield row
