"""The ledger: one line of JSON per evaluation, appended, never rewritten.

It outlives run folders: which method scored what, on exactly which images and masks, under which
protocol, with which release.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from camoxpert.errors import DataError
from camoxpert.observe.runlog import finite, git_commit, versions

NEEDED = ("method", "dataset", "data_hash", "protocol", "empty_gt", "scores")


def ledger_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the ledger keeps of an evaluation's result."""
    software = versions()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "method": result["method"],
        "dataset": result["dataset"],
        "num_images": result["num_images"],
        "data_hash": result["data_hash"],
        "protocol": result["protocol"],
        "empty_gt": result["empty_gt"],
        "resize": result.get("resize", "model"),
        "version": software["camoxpert"],
        "commit": git_commit(Path(__file__).parents[2]),
        "scores": dict(result["scores"]),
    }


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows in one write, under a lock: parallel evaluations never tear each other's lines.

    Raises:
        DataError: the file cannot be written, or is no ledger.
    """
    if path.exists():
        read_ledger(path)
    text = "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # A writer that was killed may have left half a line: it must not swallow this one.
            if file.seek(0, os.SEEK_END) and not _ends_line(file):
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"The ledger {path} could not be written: {error}.") from error


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read all rows; half a line, left by a writer that was killed, is passed over.

    Raises:
        DataError: no such file, or its rows are not a ledger's.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The ledger {path} cannot be read: {error}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if line.startswith('{"time"') or not line.strip():
                continue
            raise DataError(f"{path}, line {number}: not a ledger (JSON lines).") from None
        if not isinstance(row, dict) or any(key not in row for key in NEEDED):
            raise DataError(
                f"{path}, line {number}: not a ledger row; it needs {', '.join(NEEDED)}."
            )
        rows.append(row)
    return rows


def comparable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest row of each method and data set, ready for a table.

    Raises:
        DataError: a data set's rows were scored on different images or masks, or in different
            ways: their numbers do not belong in one column.
    """
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        newest[row["dataset"], row["method"]] = dict(row)
    problems = []
    for dataset in dict.fromkeys(row["dataset"] for row in newest.values()):
        group = [row for (own, _), row in newest.items() if own == dataset]
        for field, meaning in (
            ("data_hash", "other images or masks (data hash)"),
            ("protocol", "another --protocol"),
            ("empty_gt", "another --empty-gt"),
        ):
            kinds: dict[str, list[str]] = {}
            for row in group:
                kinds.setdefault(str(row[field]), []).append(row["method"])
            if len(kinds) > 1:
                shown = "; ".join(f"{k[:12]}: {', '.join(v[:5])}" for k, v in kinds.items())
                problems.append(f"{dataset}: {meaning}: {shown}")
    if problems:
        raise DataError(
            "These rows of the ledger cannot stand in one column:\n  "
            + "\n  ".join(problems)
            + "\nScore them again on the same data, or choose rows with --dataset and --method."
        )
    order = {name: i for i, name in enumerate(dict.fromkeys(row["dataset"] for row in rows))}
    return sorted(newest.values(), key=lambda row: order[row["dataset"]])
