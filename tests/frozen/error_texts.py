"""The texts of the program's own faults, read from its sources, wherever they stand."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import camoxpert
from camoxpert import errors

WORDS = 8
CLASSES = ("ConfigError", "DataError", "CheckpointError", "NumericError", "PeerError", "Stopped")


def text_of(node: ast.expr) -> str | None:
    """Return a text with {} for what is filled in; None where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text_of(part) or "" if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [text_of(node.left), text_of(node.right)]
        if any(side is not None for side in sides):
            return "".join("{}" if side is None else side for side in sides)
    return None


def texts_in(source: str) -> Counter[str]:
    """Count "Class: first words" of every fault that a source makes with a text."""
    found: Counter[str] = Counter()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        text = text_of(node.args[0])
        if name in CLASSES and text is not None:
            found[f"{name}: {' '.join(text.split()[:WORDS])}"] += 1
    return found


def collect() -> dict[str, dict[str, int]]:
    """Return how often each text is made, and the exit code of each class."""
    texts: Counter[str] = Counter()
    for path in sorted(Path(camoxpert.__file__).parent.rglob("*.py")):
        texts += texts_in(path.read_text(encoding="utf-8"))
    codes = {name: getattr(errors, name).exit_code for name in ("CamoXpertError", *CLASSES)}
    return {"texts": dict(texts), "exit_codes": codes}


def changes(golden: dict[str, int], now: dict[str, int]) -> str:
    """Say which texts are gone and which are new; empty where none is."""
    gone, new = Counter(golden) - Counter(now), Counter(now) - Counter(golden)
    if not gone and not new:
        return ""
    lines = [f"gone: {text}" for text in sorted(gone.elements())]
    lines += [f"new: {text}" for text in sorted(new.elements())]
    again = "People search for these texts. If you mean it: python tests/golden/freeze.py errors."
    return "\n".join([*lines, again])
