"""Golden files: reading, writing, and what two tables differ in, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "frozen"


def read(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def write(name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (GOLDEN / f"{name}.json").write_text(text)


def plain(value: Any) -> Any:
    """Return what a golden file would give back: tuples are lists there."""
    return json.loads(json.dumps(value))


def differences(golden: dict[str, Any], now: dict[str, Any], what: str) -> str:
    """Say what was added, removed and changed; empty where nothing was."""
    lines = [f"removed: {key}" for key in sorted(golden.keys() - now.keys())]
    lines += [f"added: {key}" for key in sorted(now.keys() - golden.keys())]
    for key in sorted(golden.keys() & now.keys()):
        before, after = golden[key], now[key]
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            # Only the parts that differ: the rest hides them.
            parts = [part for part in before | after if before.get(part) != after.get(part)]
            before = {part: before.get(part) for part in parts}
            after = {part: after.get(part) for part in parts}
        lines.append(f"changed: {key}: {before} is now {after}")
    if not lines:
        return ""
    again = f"If that is what you want: python tests/golden/freeze.py {what}, and say so."
    return "\n".join([*lines, again])
