"""Run an engine over the items that are left, keep the ledger, and see that nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from camoxpert import console, stop
from camoxpert.errors import DataError
from camoxpert.inference.engine import ChunkResult, Row
from camoxpert.inference.ledger import FAILED, Ledger
from camoxpert.inference.plan import AnyMade, Made, Plan
from camoxpert.runs.jobs import JobSummary
from camoxpert.text import count, shorten

SAME = ("digest", "every", "smooth")
"""Fields of a row that say that an earlier attempt's files belong to the same content."""


@dataclass
class BatchResult:
    """Counts of a list of items, and (path, reason) of those that failed.

    Attributes:
        done: by this call.
        skipped: with up-to-date results before.
        replaced: of ``done``, those whose file had changed.
        failed: (path, reason).
        summary: where the time went; the content of ``predict.json``.
    """

    done: int = 0
    skipped: int = 0
    replaced: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)
    summary: JobSummary = field(default_factory=JobSummary)


class Engine(Protocol):
    """Decides who does which chunk: ``LocalEngine``, ``DeviceEngine``."""

    def results(self, items: Sequence[Any]) -> Iterator[ChunkResult]:
        """Yield the rows of all items, a chunk at a time."""

    def summary(self) -> JobSummary:
        """Return where the time went."""


def do_items(
    engine: Engine, todo: Sequence[Made], ledger: Ledger, result: BatchResult, title: str
) -> None:
    """Run the engine; append the rows of each chunk when its files are in place.

    Args:
        engine: that does the work.
        todo: items.
        ledger: receives the rows.
        result: receives counts.
        title: of the progress bar.
    """
    with console.progress(title, total=len(todo)) as bar:
        for chunk in engine.results(todo):
            with stop.current().deferred():
                ledger.append([joined_row(row, ledger) for row in chunk.rows])
                result.done += sum(row["status"] == "ok" for row in chunk.rows)
            bar.update(len(chunk.rows))
            stop.check()


def joined_row(row: Row, ledger: Ledger) -> Row:
    """Return a row with its attempt, and with the earlier pictures of the same file."""
    name, index = row["item"], ledger.index
    kinds = row.get("kinds")
    others = index.has_kinds(name) - set(kinds or ())
    if kinds is not None and others and row["digest"] is not None:
        before = ledger.row(name)
        if all(before.get(key) == row.get(key) for key in SAME):
            kinds = sorted({*kinds, *others})
    head = {"item": name, "status": row["status"], "attempt": index.attempts(name) + 1}
    return head | row | ({} if kinds is None else {"kinds": kinds})


def audit(ledger: Ledger, plan: Plan[AnyMade], result: BatchResult, noun: str = "photo") -> None:
    """Compare the ledger with what was planned; collect what failed.

    Raises:
        DataError: an item has no row: a fault of the program, which must not pass for success.
    """
    lost = []
    for item in (*plan.todo, *plan.failed):
        status = ledger.index.status(item.name)
        if status == FAILED:
            result.failed.append((Path(item.path), str(ledger.row(item.name)["reason"])))
        elif not status:
            lost.append(str(item.path))
    if lost:
        raise DataError(
            f"{count(len(lost), noun)} of {len(plan.todo)} have neither a result nor a reason "
            f"in {ledger.path}: {shorten(lost)}. The same command does what is missing."
        )
