"""The ledger: one line of JSON per evaluation, appended, never rewritten.

It outlives run folders, and records which method scored what, on which images and masks, under
which protocol and with which release.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, TypedDict, TypeGuard

from camoxpert.errors import DataError
from camoxpert.evaluation.results import EvaluationResult, MapSource
from camoxpert.files import finite, lock, require_writable, why_unwritable
from camoxpert.runs.info import git_commit, versions
from camoxpert.text import shorten

if TYPE_CHECKING:
    from typing import NotRequired

TEXTS = ("method", "dataset", "data_hash", "protocol", "empty_gt")
OTHERWISE: dict[Literal["data_hash", "protocol", "empty_gt"], str] = {
    "data_hash": "other images or masks (data hash)",
    "protocol": "another --protocol",
    "empty_gt": "another --empty-gt",
}
"""What it means that rows differ in a key."""
START = '{"time"'
"""How a row begins. A killed writer can leave a shorter line."""


class LedgerRow(TypedDict):
    """A row of the ledger: the result of one method on one data set.

    A file may hold rows of older releases and of other programs, which need not have the optional
    keys; every row that is written has all of them.
    """

    time: NotRequired[str]
    method: str
    dataset: str
    num_images: int
    num_unreadable: NotRequired[int]
    data_hash: str
    protocol: str
    empty_gt: str
    resize: NotRequired[str]
    gt_threshold: NotRequired[int | None]
    version: NotRequired[str]
    commit: NotRequired[str | None]
    scores: dict[str, float]


def ledger_row(result: EvaluationResult) -> LedgerRow:
    """Return the ledger's row of a result."""
    maps = result.source if isinstance(result.source, MapSource) else None
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "method": result.method,
        "dataset": result.dataset,
        "num_images": result.num_images,
        "num_unreadable": len(result.unreadable),
        "data_hash": result.data_hash,
        "protocol": result.protocol,
        "empty_gt": result.empty_gt,
        "resize": maps.resize if maps else "model",
        "gt_threshold": maps.gt_threshold if maps else None,
        "version": versions()["camoxpert"],
        "commit": git_commit(Path(__file__).parents[2]),
        "scores": result.scores,
    }


def append_rows(path: Path, rows: Sequence[LedgerRow]) -> None:
    """Append rows in one write, under a lock, so that parallel evaluations never mix their lines.

    Raises:
        DataError: the file cannot be written, or is not a ledger.
    """
    check_ledger(path)
    text = "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The ledger is its own lock file.
        with lock(path.resolve()), path.open("a+b") as file:
            # A killed writer may have left half a line: start a new one.
            if file.seek(0, os.SEEK_END) and not _ends_line(file):
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"The ledger {path} could not be written: {error}.") from error


def check_ledger(path: Path) -> None:
    """Raise DataError if rows could not be appended: not a ledger, or not writable."""
    known = path.exists()
    if known:
        read_ledger(path)
    try:
        # Also for a file that exists: the disk may be full.
        require_writable(path.parent)
        if known:
            path.open("ab").close()
    except OSError as error:
        raise DataError(
            f"The ledger {path} cannot be written: {why_unwritable(error)}. Name another file with "
            "--ledger."
        ) from error


def _ends_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_ledger(path: Path) -> list[LedgerRow]:
    """Return all rows; half a line, left by a killed writer, is skipped.

    Raises:
        DataError: no such file, or its rows are not a ledger's.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The ledger {path} cannot be read: {error}.") from error
    rows: list[LedgerRow] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if not line.strip() or line.startswith(START) or START.startswith(line):
                continue
            raise DataError(
                f"{path}, line {number}: not a ledger (JSON lines). Name a file that "
                "`evaluate --ledger` wrote."
            ) from None
        if not _is_row(row):
            raise DataError(
                f"{path}, line {number}: not a ledger row; it needs {', '.join(TEXTS)}, num_images "
                "and scores."
            )
        rows.append(row)
    return rows


def _is_row(row: object) -> TypeGuard[LedgerRow]:
    if not isinstance(row, dict) or not isinstance(row.get("num_images"), int):
        return False
    scores = row.get("scores")
    return (
        all(isinstance(row.get(key), str) for key in TEXTS)
        and isinstance(scores, dict)
        and all(value is None or isinstance(value, (int, float)) for value in scores.values())
    )


def comparable(rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Return the newest row of each method and data set, ready for a table.

    Raises:
        DataError: a data set's rows were scored on different images or masks, or under different
            protocols, so their numbers are not comparable.
    """
    newest: dict[tuple[str, str], LedgerRow] = {}
    for row in rows:
        entry = row.copy()
        if row.get("resize") == "bilinear":
            # Resizing changes the third decimal: these scores do not depend on the method alone.
            entry["method"] = f"{row['method']} (resized)"
        newest[row["dataset"], entry["method"]] = entry
    problems = []
    for dataset in dict.fromkeys(row["dataset"] for row in newest.values()):
        group = [row for (own, _), row in newest.items() if own == dataset]
        for field, meaning in OTHERWISE.items():
            kinds: dict[str, list[str]] = {}
            for row in group:
                kinds.setdefault(str(row[field]), []).append(row["method"])
            if len(kinds) > 1:
                shown = "; ".join(f"{k[:12]}: {shorten(v, 5)}" for k, v in kinds.items())
                problems.append(f"{dataset}: {meaning}: {shown}")
    if problems:
        raise DataError(
            "These rows of the ledger cannot be compared in one table:\n  "
            + "\n  ".join(problems)
            + "\nScore them again on the same data, or choose rows with --dataset and --method."
        )
    order = {name: i for i, name in enumerate(dict.fromkeys(row["dataset"] for row in rows))}
    return sorted(newest.values(), key=lambda row: order[row["dataset"]])
